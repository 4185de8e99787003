# SPDX-License-Identifier: Apache-2.0
"""Stage-2 tables as KVM prints them in debugfs (CONFIG_PTDUMP_STAGE2_DEBUGFS).

Source: arch/arm64/kvm/ptdump.c, arch/arm64/mm/ptdump.c

Linux 6.12 prints them in another way: an X stands at what may NOT be executed, the last row is left out, and
a text of more than a page has a wrong first row.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prefault.errors import CapabilityMissing, UsageError
from prefault.machine import Leaf

DEBUGFS_KVM = Path("/sys/kernel/debug/kvm")

_ROW = re.compile(r"0x([0-9a-f]+)-0x([0-9a-f]+)\s+\d+[KMGTPE] ([0-3])(.*)")
_HEADING = "---["
_EXECUTE = frozenset(("px", "ux", "PXNux", "PXNUXN", "UXN"))
"""One or two of these stand in each row with leaves, but for those of Linux 6.12."""
_SHADOW = re.compile(r"VTCR: 0x([0-9a-f]+) VTTBR: 0x([0-9a-f]+) s2: (en|dis)abled")


@dataclass(frozen=True)
class Hole:
    """A run of adjacent entries of one level that map nothing."""

    ipa: int
    size: int
    level: int


Run = Leaf | Hole
"""A row of a dump."""


@dataclass(frozen=True)
class Shadow:
    """What a dump says of the shadow MMU that it is of, besides its entries."""

    vtcr: int
    vttbr: int
    enabled: bool
    """Whether L1 has switched its stage 2 on."""


@dataclass(frozen=True)
class Dump:
    """One table, as debugfs prints it.

    :ivar runs: from IPA 0 on, without gaps
    :ivar shadow: None for a canonical table
    """

    runs: tuple[Run, ...]
    shadow: Shadow | None = None

    @property
    def leaves(self) -> list[Leaf]:
        """What is mapped."""
        return [run for run in self.runs if isinstance(run, Leaf)]

    @property
    def end(self) -> int:
        """Where the last row ends: that of the IPA space, but for kernels that leave the last row out."""
        return self.runs[-1].ipa + self.runs[-1].size if self.runs else 0


def read(lines: Iterable[str], name: str = "debugfs") -> Iterator[Dump]:
    """The tables in a text, one after the other.

    :param name: what to call the text in messages
    :raises UsageError: this is something else, from a line on that the message has
    """
    runs: list[Run] = []
    shadow: Shadow | None = None
    for number, line in enumerate(lines, start=1):
        line = line.rstrip()
        match = _ROW.fullmatch(line)
        if match:
            runs += _run(match, runs[-1] if runs else None, f"{name}, line {number}")
            continue
        match = _SHADOW.fullmatch(line)
        if runs and (match or line.startswith(_HEADING)):
            yield Dump(tuple(runs), shadow)
            runs, shadow = [], None
        if match:
            shadow = Shadow(int(match[1], 16), int(match[2], 16), match[3] == "en")
        elif line and not line.startswith(_HEADING):
            raise UsageError(
                f"{name}, line {number}: {line[:60]!r} is no line of stage2_page_tables; "
                "give what is in a VM's folder under /sys/kernel/debug/kvm"
            )
    if runs:
        yield Dump(tuple(runs), shadow)


def _run(match: re.Match[str], last: Run | None, where: str) -> list[Run]:
    """A row, which must begin where the last one ended; nothing if there is none of the table in it."""
    ipa, end, level = int(match[1], 16), int(match[2], 16), int(match[3])
    expected = last.ipa + last.size if last else 0
    if not last and end <= ipa:
        # Linux 6.12 begins a second time, with more room, and thinks itself still at the last run.
        if not end:
            return []
        ipa = 0
    if ipa != expected or end <= ipa:
        raise UsageError(
            f"{where}: the row {ipa:#x}-{end:#x} stands where one from {expected:#x} on must be; "
            "lines are missing or mixed up"
        )
    attributes = _attributes(match[4])
    return [Leaf(ipa, end - ipa, level, *attributes) if attributes else Hole(ipa, end - ipa, level)]


@functools.lru_cache(256)
def _attributes(text: str) -> tuple[bool, bool, bool, bool, bool, bool] | None:
    """The flags of a leaf in the order of its fields; None for a hole."""
    words = text.split()
    # A hole has no words; an entry that is not valid but not 0 either has an F.
    if not words or "F" in words:
        return None
    px, ux = "px" in words, "ux" in words or "PXNux" in words
    if _EXECUTE.isdisjoint(words):
        px = ux = "X" not in words
    return "R" in words, "W" in words, px, ux, "AF" in words, "BLK" in words


def parse(text: str) -> list[Leaf]:
    """Leaves, adjacent equal ones as one, from what ``stage2_page_tables`` says."""
    return merge(leaf for dump in read(text.splitlines()) for leaf in dump.leaves)


def merge(leaves: Iterable[Leaf]) -> list[Leaf]:
    """Join neighbours that differ in nothing but their place."""
    merged: list[Leaf] = []
    for leaf in leaves:
        last = merged[-1] if merged else None
        if last and last.ipa + last.size == leaf.ipa:
            grown = dataclasses.replace(last, size=last.size + leaf.size)
            if dataclasses.replace(leaf, ipa=last.ipa, size=grown.size) == grown:
                merged[-1] = grown
                continue
        merged.append(leaf)
    return merged


def canonical(vm_folder: Path) -> list[Leaf]:
    """Leaves of a VM's own table."""
    return parse(_read(vm_folder / "stage2_page_tables"))


def texts(vm_folder: Path) -> list[str]:
    """What debugfs says of a VM's own table and of every shadow table that is in use, by index."""
    return [_read(vm_folder / "stage2_page_tables"), *_shadow_texts(vm_folder)]


def shadows(vm_folder: Path) -> list[list[Leaf]]:
    """Leaves of every shadow table that is in use, by index."""
    return [parse(text) for text in _shadow_texts(vm_folder)]


def _shadow_texts(vm_folder: Path) -> list[str]:
    files = sorted((vm_folder / "nested").glob("nested_mmu*"), key=_shadow_index)
    texts = [_read_shadow(file) for file in files]
    return [text for text in texts if _SHADOW.match(text)]


def _shadow_index(file: Path) -> int:
    return int(file.name.removeprefix("nested_mmu"))


def _read_shadow(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""  # The MMU exists, but has no table yet.


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise CapabilityMissing(
            f"stage-2 tables cannot be read from {file}: {error.strerror}; they need root, a mounted "
            "debugfs, CONFIG_PTDUMP_STAGE2_DEBUGFS, and in protected mode a kernel with the series"
        ) from error
