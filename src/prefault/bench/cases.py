# SPDX-License-Identifier: Apache-2.0
"""The cases that are measured, with what pre-faulting may cost in each.

Standard library only: this module also runs inside the lab's root file system.
"""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prefault.errors import UsageError
from prefault.machine import Backing, Frames, Resident, SlotFlags

MIB = 1 << 20
SIZE = 32 * MIB
"""What is measured unless told otherwise."""
SWEEP = (256 * MIB, 1024 * MIB, 4096 * MIB)
"""Larger sizes that cost must not depend on."""
AGAIN = 20
"""What a page may cost that is mapped already."""
HOLD = 10_000
"""For how many instructions the mmu_lock may be held: for a batch of 512 pages."""
PKVM_SHARE = 1 / 3
"""What a page may cost under pKVM, of what it costs there page at a time."""
SPREAD = 0.05
"""How far the costs of one case may lie apart over all sizes."""


class Context(enum.Enum):
    """Where the vCPU is when memory is pre-faulted, and who walks it."""

    ORDINARY = "ordinary"
    NESTED = "nested"
    """The vCPU is stopped in L2; L1 walks its memory afterwards."""
    L2 = "l2"
    """The same, and L2 walks: its shadow MMU is never pre-faulted."""


@dataclass(frozen=True)
class Case:
    """Memory in some state, and a guest that walks it.

    :ivar name: ``backing/state``, and what is particular
    :ivar size: bytes that are mapped
    :ivar bar: instructions that pre-faulting may cost for each leaf; None if nothing was set
    :ivar writes: the guest writes; otherwise it reads
    :ivar blocks: leaves are expected above level 3, as large as the backing and the granule allow
    :ivar page_size: of hugetlb
    :ivar dropped: the VMM has dropped its mapping since (MADV_DONTNEED); the file has the pages
    :ivar usual: measured unless told otherwise, and not just with ``--all``
    :ivar modes: of KVM, in which it is measured unless told otherwise
    """

    name: str
    backing: Backing
    resident: Resident = Resident.WRITE
    bar: int | None = None
    size: int = SIZE
    flags: SlotFlags = SlotFlags.NONE
    frames: Frames = Frames.SCATTERED
    context: Context = Context.ORDINARY
    writes: bool = False
    blocks: bool = False
    page_size: int = 0
    dropped: bool = False
    usual: bool = True
    modes: tuple[str, ...] = ("nested",)

    def to_json(self) -> dict[str, object]:
        """As JSON types."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: value.value if isinstance(value, enum.Enum) else value for name, value in values.items()
        }

    @classmethod
    def from_json(cls, values: dict[str, object]) -> Case:
        """Back from ``to_json``.

        :raises UsageError: a name or value is unknown
        """
        kinds: dict[str, type[enum.Enum]] = {
            "backing": Backing,
            "resident": Resident,
            "flags": SlotFlags,
            "context": Context,
            "frames": Frames,
        }
        try:
            made = {name: kinds[name](value) if name in kinds else value for name, value in values.items()}
            made["modes"] = tuple(made.get("modes", ()))  # type: ignore[arg-type]  # a list, from to_json()
            return cls(**made)  # type: ignore[arg-type]  # names and values come from outside
        except (TypeError, ValueError) as error:
            raise UsageError(f"not a case: {error}; see Case for what there is") from error

    def sized(self, size: int) -> Case:
        """The same over another size, as many huge pages of it as it takes."""
        whole = -(-size // self.page_size) * self.page_size if self.page_size else size
        return dataclasses.replace(self, size=whole)

    @property
    def has_peer(self) -> bool:
        """Whether x86 can have it, too: huge pages there are of 2 MiB and of 1 GiB, and there is no L1."""
        return self.context is Context.ORDINARY and self.page_size in (0, 2 * MIB, 1024 * MIB)

    @property
    def granularity(self) -> int:
        """What sizes must be multiples of, on every granule: a level-2 block of 4 KiB pages."""
        return max(2 * MIB, self.page_size)


_PKVM = ("nested", "protected")
_LOGGED, _READ_ONLY = SlotFlags.LOG_DIRTY_PAGES, SlotFlags.READONLY
_PRIVATE, _SHARED, _GMEM, _THP = Backing.PRIVATE, Backing.SHARED, Backing.GUEST_MEMFD, Backing.THP
_FILE_PRIVATE, _FILE_SHARED = Backing.FILE_PRIVATE, Backing.FILE_SHARED
_NOTHING, _READ = Resident.NOTHING, Resident.READ

_PAGES, _RESTRICTED, _FILES, _BLOCK, _ABSENT, _ZERO = 210, 300, 500, 2560, 3700, 1350


def _hugetlb(name: str, size: int, mib: int, *, usual: bool = True) -> Iterator[Case]:
    """One size of hugetlb, resident and not. Level 3 holds pages of 64 KiB; others are blocks."""
    blocks = size >= 2 * MIB
    made = Case(
        f"hugetlb-{name}/resident",
        Backing.HUGETLB,
        # One block is no more than the call itself, which is not what the figure is about.
        bar=None if mib * MIB == size else _BLOCK if blocks else _PAGES,
        size=mib * MIB,
        blocks=blocks,
        page_size=size,
        frames=Frames.ANY,
        usual=usual,
    )
    yield made
    yield dataclasses.replace(made, name=f"hugetlb-{name}/absent", resident=_NOTHING, bar=None)


CASES = (
    Case("private/resident", _PRIVATE, bar=_PAGES, modes=_PKVM),
    Case("private/resident/contiguous", _PRIVATE, bar=_PAGES, frames=Frames.CONTIGUOUS),
    Case("private/resident/logged", _PRIVATE, bar=_RESTRICTED, flags=_LOGGED, modes=_PKVM),
    Case("private/resident/logged/written", _PRIVATE, bar=_RESTRICTED, flags=_LOGGED, writes=True),
    Case("private/resident/read-only", _PRIVATE, bar=_RESTRICTED, flags=_READ_ONLY),
    Case("private/resident/nested", _PRIVATE, bar=_PAGES, context=Context.NESTED),
    Case("private/resident/l2", _PRIVATE, bar=_PAGES, context=Context.L2),
    Case("private/untouched", _PRIVATE, _NOTHING, bar=_ZERO, modes=_PKVM),
    Case("private/untouched/written", _PRIVATE, _NOTHING, bar=_ZERO, writes=True),
    Case("private/zero-page", _PRIVATE, _READ, bar=_PAGES, usual=False),
    Case("shared/resident", _SHARED, bar=_PAGES, modes=_PKVM),
    Case("shared/resident/contiguous", _SHARED, bar=_PAGES, frames=Frames.CONTIGUOUS),
    Case("shared/resident/logged", _SHARED, bar=_RESTRICTED, flags=_LOGGED),
    Case("shared/resident/read-only", _SHARED, bar=_RESTRICTED, flags=_READ_ONLY, usual=False),
    Case("shared/absent", _SHARED, _NOTHING, bar=_ABSENT, modes=_PKVM),
    Case("shared/cached", _SHARED, dropped=True),
    Case("file-private/resident", _FILE_PRIVATE, _READ, bar=_FILES, modes=_PKVM),
    Case("file-private/cached", _FILE_PRIVATE, _NOTHING),
    Case("file-private/resident/written", _FILE_PRIVATE, _READ, bar=_FILES, writes=True),
    Case("file-shared/resident", _FILE_SHARED, bar=_FILES),
    Case("file-shared/absent", _FILE_SHARED, _NOTHING, bar=_ABSENT, usual=False),
    Case("guest-memfd/resident", _GMEM, bar=_FILES, modes=_PKVM),
    Case("guest-memfd/absent", _GMEM, _NOTHING, modes=_PKVM),
    Case("thp/resident", _THP, bar=_BLOCK, blocks=True, frames=Frames.ANY, modes=_PKVM),
    Case("thp/resident/logged", _THP, bar=_RESTRICTED, flags=_LOGGED, frames=Frames.ANY),
    Case("thp/absent", _THP, _NOTHING, blocks=True),
    *_hugetlb("64K", 64 << 10, 32, usual=False),
    *_hugetlb("2M", 2 * MIB, 32),
    *_hugetlb("32M", 32 * MIB, 64),
    *_hugetlb("1G", 1024 * MIB, 1024),
)
"""Names of one backing follow each other."""


def choose(
    patterns: Iterable[str], *, everything: bool = False, sizes: tuple[int, ...] = ()
) -> tuple[Case, ...]:
    """The cases with these names, over these sizes.

    :param patterns: as in the shell; without any, the usual cases, or all
    :param everything: all cases, and larger sizes of the first
    :param sizes: in place of the usual ones
    :raises UsageError: a pattern fits no case, or a size fits no case
    """
    patterns = tuple(patterns)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in CASES):
            raise UsageError(f"no case is called {pattern}; `prefault bench --list` names them")
    named = [case for case in CASES if any(fnmatch.fnmatchcase(case.name, one) for one in patterns)]
    chosen = named or [case for case in CASES if case.usual or everything]
    for size in sizes:
        if size % (2 * MIB):
            raise UsageError(f"size {size:#x} is not a multiple of 2 MiB, which a block may have")
    if sizes:
        resized = [case.sized(size) for case in chosen for size in sizes]
        return tuple(dict.fromkeys(resized))
    swept = [CASES[0].sized(size) for size in SWEEP] if everything and not patterns else []
    return (*chosen, *swept)
