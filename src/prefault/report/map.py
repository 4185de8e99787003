# SPDX-License-Identifier: Apache-2.0
"""A stage-2 table as something to draw: what it holds, coarser views of it, and what changed in it.

Every view covers the whole range that it is of, and its bytes add up to what the table holds. However large
the table is, a view has no more parts than were asked for.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from prefault.errors import UsageError
from prefault.guest.tables import leaf_size
from prefault.kvm.stage2 import Dump, Hole, Run, Shadow
from prefault.machine import Leaf
from prefault.report.units import format_size
from prefault.spec.descriptors import LAST_LEVEL, Granule

PAGE_SIZES = (0x1000, 0x4000, 0x1_0000)


class Kind(NamedTuple):
    """What leaves are that differ in nothing but their place."""

    level: int
    readable: bool
    writable: bool
    px: bool
    ux: bool
    accessed: bool
    block: bool

    @property
    def access(self) -> str:
        """``RWX``; in place of the X, p or u if only EL1 or only EL0 may execute."""
        execute = "X" if self.px and self.ux else "p" if self.px else "u" if self.ux else "-"
        return f"{'R' if self.readable else '-'}{'W' if self.writable else '-'}{execute}"


Look = Kind | None
"""What is at an IPA; None for a hole."""


def look_of(run: Run) -> Look:
    """What a run is, without its place."""
    if not isinstance(run, Leaf):
        return None
    return Kind(run.level, run.readable, run.writable, run.px, run.ux, run.accessed, run.block)


@dataclass(frozen=True)
class Slot:
    """A memslot."""

    name: str
    gpa: int
    size: int


@dataclass(frozen=True)
class Part:
    """A range of a table, and how many bytes of it are what.

    :ivar slot: name of the memslot that it is in, if that is known
    """

    ipa: int
    size: int
    looks: Mapping[Look, int]
    slot: str = ""

    @property
    def end(self) -> int:
        """First IPA after it."""
        return self.ipa + self.size

    @property
    def pure(self) -> bool:
        """Whether all of it is the same."""
        return len(self.looks) == 1


@dataclass(frozen=True)
class Change:
    """A range that is something else than it was."""

    ipa: int
    size: int
    before: Look
    after: Look


@dataclass(frozen=True)
class TableMap:
    """A table with what is known of it.

    :ivar name: ``canonical``, ``shadow 0``, or a file's name
    :ivar page_size: the granule
    :ivar other_sizes: granules that the table would fit as well, if it does not tell
    :ivar slots: memslots of the VM, if they are known; empty for shadow tables
    """

    name: str
    dump: Dump
    page_size: int
    other_sizes: tuple[int, ...] = ()
    slots: tuple[Slot, ...] = ()

    @property
    def runs(self) -> tuple[Run, ...]:
        """What is in the table, exactly."""
        return self.dump.runs

    @functools.cached_property
    def pieces(self) -> list[tuple[int, int, Look]]:
        """(first, end, what is there) of every run."""
        return [(run.ipa, run.ipa + run.size, look_of(run)) for run in self.runs]

    def within(self, first: int, end: int) -> Iterator[tuple[int, int, Look]]:
        """Those pieces that have something of a range, cut to it."""
        begin = bisect.bisect_right(self.pieces, first, key=itemgetter(0)) - 1
        for start, stop, look in itertools.islice(self.pieces, max(begin, 0), None):
            if start >= end:
                return
            if stop > first:
                yield max(start, first), min(stop, end), look

    @property
    def shadow(self) -> Shadow | None:
        """Of a shadow table, what it is the shadow of."""
        return self.dump.shadow

    @property
    def end(self) -> int:
        """Where the IPA space ends."""
        return self.dump.end

    @property
    def ipa_bits(self) -> int | None:
        """Size of the IPA space; None if the dump does not reach its end."""
        return self.end.bit_length() - 1 if self.end & self.end - 1 == 0 else None

    @functools.cached_property
    def flat(self) -> bool:
        """Whether the dump does not tell of tables."""
        return is_flat(self.dump, self.page_size)

    @property
    def start_level(self) -> int:
        """The topmost level that has entries, or should have."""
        if self.flat and self.ipa_bits:
            return _start_level(self.ipa_bits, self.page_size)
        return min(run.level for run in self.runs)

    def number(self, look: Kind, size: int) -> int:
        """Leaves in ``size`` bytes."""
        return size // leaf_size(self.page_size, look.level)

    @functools.cached_property
    def looks(self) -> dict[Kind, int]:
        """Mapped bytes by kind."""
        found: Counter[Kind] = Counter()
        for start, end, look in self.pieces:
            if look:
                found[look] += end - start
        return dict(found)

    @property
    def mapped(self) -> int:
        """Bytes that are mapped."""
        return sum(self.looks.values())

    @property
    def leaves(self) -> dict[int, int]:
        """Leaves by level."""
        found: Counter[int] = Counter()
        for look, size in self.looks.items():
            found[look.level] += self.number(look, size)
        return dict(sorted(found.items()))

    @property
    def tables(self) -> dict[int, int]:
        """Tables by level, those of the first one concatenated.

        A table is where the walk goes deeper, so their number follows from the levels of the runs alone.
        Nothing if the dump is flat.
        """
        if self.flat:
            return {}
        top = self.start_level
        above = self.page_size << (LAST_LEVEL + 1 - top) * (self.page_size.bit_length() - 4)
        found = {top: -(-self.end // above)}
        for level in range(top, LAST_LEVEL):
            deeper = sum(run.size for run in self.runs if run.level > level)
            if deeper:
                found[level + 1] = -(-deeper // leaf_size(self.page_size, level))
        return found


def fitting(dumps: Sequence[Dump]) -> list[int]:
    """Granules that all of some tables of one host can have; the likeliest first.

    Tables of a larger granule look as if they could be of a smaller one, too, but hardly ever the other way
    round; and where no table is whole, 4 KiB pages are the usual ones.
    """
    sizes = [size for size in reversed(PAGE_SIZES) if all(_fits(dump, size) for dump in dumps)]
    whole = [size for size in sizes if not any(is_flat(dump, size) for dump in dumps)]
    exact = [size for size in whole if all(_starts_right(dump, size) for dump in dumps)]
    return exact or whole or sizes[::-1]


def is_flat(dump: Dump, page_size: int) -> bool:
    """Whether a dump does not tell the levels of holes: those of pKVM, whose host has no tables to look at.

    KVM frees a table with nothing in it, so a hole below the first level is smaller than a table.
    """
    top = min(run.level for run in dump.runs)
    for run in dump.runs:
        if isinstance(run, Hole) and run.level > (top if top < LAST_LEVEL else LAST_LEVEL - 1):
            table = leaf_size(page_size, run.level - 1)
            if -(-run.ipa // table) * table + table <= run.ipa + run.size:
                return True
    return False


def _fits(dump: Dump, page_size: int) -> bool:
    """Whether entries lie where they can, and each table is there as a whole."""
    for run in dump.runs:
        if run.ipa % leaf_size(page_size, run.level):
            return False
        if isinstance(run, Leaf) and run.block != (run.level < LAST_LEVEL):
            return False
    # Where the level changes, a table of the deeper one begins or ends.
    return not any(
        after.ipa % leaf_size(page_size, min(run.level, after.level))
        for run, after in itertools.pairwise(dump.runs)
        if run.level != after.level
    )


def _starts_right(dump: Dump, page_size: int) -> bool:
    """Whether the walk begins where KVM lets it begin for such an IPA space."""
    return _start_level(dump.end.bit_length() - 1, page_size) == min(run.level for run in dump.runs)


def _start_level(ipa_bits: int, page_size: int) -> int:
    return Granule(page_size.bit_length() - 1).start_level(ipa_bits)


def page_size_of(dumps: Sequence[Dump], name: str, told: int | None = None) -> tuple[int, tuple[int, ...]]:
    """The granule of some tables, and others that would fit as well.

    :param told: what somebody says who knows
    :raises UsageError: there is none, or not this one
    """
    sizes = fitting(dumps)
    if told in sizes:
        return told, ()
    if told:
        fit = " or ".join(format_size(size) for size in sizes) or "no granule"
        raise UsageError(f"{name}: the levels and sizes in it do not fit {format_size(told)}; they fit {fit}")
    if not sizes:
        raise UsageError(f"{name}: the levels and sizes in it fit no granule; are the tables of one VM?")
    return sizes[0], tuple(sizes[1:])


# Coarser views.

_MANY = 64
"""How many times too many parts call for bigger steps."""


def parts(table: TableMap, limit: int) -> list[Part]:
    """The whole table in parts, each within a memslot or outside of all; 0 is no limit to their number.

    Ranges are put together by ever larger aligned windows until there are no more than ``limit``, or one for
    each memslot and gap.
    """
    pieces = _joined(_by_slot(table))
    found = _alike(pieces)
    window = table.page_size
    while limit and len(found) > limit and window < table.end:
        window *= 16 if len(found) > _MANY * limit else 2
        pieces = _joined(_windows(pieces, window))
        found = _alike(pieces)
    return found


def _by_slot(table: TableMap) -> Iterator[Part]:
    """The runs, cut where memslots begin and end."""
    edges = sorted({edge for slot in table.slots for edge in (slot.gpa, slot.gpa + slot.size)})
    for first, last, look in table.pieces:
        inside = [edge for edge in edges if first < edge < last]
        for start, end in itertools.pairwise([first, *inside, last]):
            name = next((slot.name for slot in table.slots if slot.gpa <= start < slot.gpa + slot.size), "")
            yield Part(start, end - start, {look: end - start}, name)


def _joined(pieces: Iterable[Part]) -> list[Part]:
    """Neighbours that are all the same as one."""
    found: list[Part] = []
    for piece in pieces:
        last = found[-1] if found else None
        if last and last.pure and piece.pure and _same(last) == _same(piece):
            found[-1] = _together((last, piece))
        else:
            found.append(piece)
    return found


def _alike(pieces: Iterable[Part]) -> list[Part]:
    """Neighbours that are mixed of the same as one."""
    return [_together(tuple(group)) for _, group in itertools.groupby(pieces, key=_same)]


def _same(piece: Part) -> tuple[str, set[Look]]:
    return piece.slot, set(piece.looks)


def _together(pieces: Sequence[Part]) -> Part:
    if len(pieces) == 1:
        return pieces[0]
    looks: Counter[Look] = Counter()
    for piece in pieces:
        looks.update(piece.looks)
    return Part(pieces[0].ipa, sum(piece.size for piece in pieces), dict(looks), pieces[0].slot)


def _windows(pieces: Iterable[Part], window: int) -> Iterator[Part]:
    """What begins in one aligned window, and in one memslot, as one; what is as large as a window stays."""

    def place(piece: Part) -> tuple[str, int, bool]:
        return piece.slot, piece.ipa // window, piece.size >= window

    for _, group in itertools.groupby(pieces, key=place):
        yield _together(tuple(group))


_REGION = 2 << 20
"""What regions are aligned to, at least. Every granule has a power of two of pages in it."""


def regions(tables: Sequence[TableMap], limit: int) -> list[tuple[int, int]]:
    """Ranges (first, end) that have all leaves and memslots of some tables, at most ``limit`` of them.

    Holes between them are left out, the smallest ones last.
    """
    window = _REGION
    ranges = [(slot.gpa, slot.gpa + slot.size) for table in tables for slot in table.slots]
    ranges += [(run.ipa, run.ipa + run.size) for table in tables for run in table.dump.leaves]
    ranges = _aligned(ranges, window)
    while len(ranges) > limit:
        window *= 2
        ranges = _aligned(ranges, window)
    return ranges


def _aligned(ranges: Iterable[tuple[int, int]], window: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for first, last in sorted(
        (first // window * window, -(-last // window) * window) for first, last in ranges
    ):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return found


def cells(table: TableMap, first: int, end: int, size: int) -> list[Part]:
    """The range [first, end) in cells of ``size`` bytes, the last of which may be cut."""
    found: list[Counter[Look]] = [Counter() for _ in range(-(-(end - first) // size))]
    reached = first
    for start, stop, look in table.within(first, end):
        reached = stop
        while start < stop:
            index = (start - first) // size
            upto = min(stop, first + (index + 1) * size)
            found[index][look] += upto - start
            start = upto
    if reached < end:  # a dump without its last row
        for index in range((reached - first) // size, len(found)):
            cell = first + index * size
            found[index][None] += min(cell + size, end) - max(cell, reached)
    return [
        Part(first + index * size, min(size, end - first - index * size), dict(looks))
        for index, looks in enumerate(found)
    ]


# What changed.


def changes(before: TableMap, after: TableMap) -> list[Change]:
    """Where two tables differ, neighbours that changed alike as one."""
    found: list[Change] = []
    for ipa, end, was, now in _both(before.runs, after.runs):
        if was == now:
            continue
        last = found[-1] if found else None
        if last and (last.ipa + last.size, last.before, last.after) == (ipa, was, now):
            found[-1] = Change(last.ipa, end - last.ipa, was, now)
        else:
            found.append(Change(ipa, end - ipa, was, now))
    return found


def _both(one: Sequence[Run], other: Sequence[Run]) -> Iterator[tuple[int, int, Look, Look]]:
    """Two tables side by side, cut wherever one of them changes; beyond its end a table is a hole."""
    edges = sorted({edge for run in (*one, *other) for edge in (run.ipa, run.ipa + run.size)})
    looks = []
    for runs in (one, other):
        starts = {run.ipa: look_of(run) for run in runs}
        end = runs[-1].ipa + runs[-1].size if runs else 0
        look: Look = None
        column: list[Look] = []
        for edge in edges[:-1]:
            look = starts.get(edge, look) if edge < end else None
            column.append(look)
        looks.append(column)
    yield from zip(edges[:-1], edges[1:], *looks, strict=True)
