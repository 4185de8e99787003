# SPDX-License-Identifier: Apache-2.0
"""Views of a table show all of it, in as many parts as were asked for."""

from __future__ import annotations

import re
import time
from collections import Counter
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from prefault.errors import UsageError
from prefault.kvm import stage2
from prefault.kvm.stage2 import Dump, Hole
from prefault.machine import Leaf
from prefault.report import map_text
from prefault.report.map import (
    Look,
    Slot,
    TableMap,
    cells,
    changes,
    fitting,
    look_of,
    page_size_of,
    parts,
    regions,
)
from prefault.report.map_svg import CELLS, ROWS, Panel, svg
from prefault.spec import ptdump
from prefault.spec.descriptors import Granule, Prot
from prefault.spec.memory import PhysicalMemory
from prefault.spec.state import S2Mmu
from tests.spec.mmus import mmus

GIB, MIB, PAGE = 1 << 30, 1 << 20, 0x1000
slots = st.lists(
    st.tuples(st.integers(0, 64), st.integers(1, 16)), max_size=3, unique_by=lambda one: one[0] // 16
)


def dump_of(mmu: S2Mmu) -> Dump:
    (dump,) = stage2.read(ptdump.show(mmu).splitlines())
    return dump


def map_of(mmu: S2Mmu, memslots: list[tuple[int, int]] | None = None) -> TableMap:
    named = [Slot(f"slot {gpa}", gpa * MIB, size * MIB) for gpa, size in memslots or []]
    return TableMap("canonical MMU", dump_of(mmu), mmu.pgt.granule.page_size, slots=tuple(named))


def leaf(ipa: int, size: int = PAGE, level: int = 3, *, writable: bool = True) -> Leaf:
    return Leaf(ipa, size, level, True, writable, True, True, True, level < 3)


def map_with(*leaves: Leaf, bits: int = 40) -> TableMap:
    """A table of 4 KiB pages with some leaves, its holes at the level of the leaf before."""
    runs: list[stage2.Run] = []
    at = 0
    for one in leaves:
        if one.ipa > at:
            runs.append(Hole(at, one.ipa - at, one.level))
        runs.append(one)
        at = one.ipa + one.size
    return TableMap("canonical MMU", Dump((*runs, Hole(at, (1 << bits) - at, 1))), PAGE)


def total(table: TableMap) -> Counter[Look]:
    found: Counter[Look] = Counter()
    for run in table.runs:
        found[look_of(run)] += run.size
    return found


@settings(max_examples=60, deadline=None)
@given(mmus(), slots, st.integers(0, 12))
def test_parts_cover_the_table_and_are_no_more_than_asked_for(
    mmu: S2Mmu, memslots: list[tuple[int, int]], limit: int
) -> None:
    table = map_of(mmu, memslots)
    found = parts(table, limit)
    assert [part.ipa for part in found] == [0, *(part.end for part in found[:-1])]
    assert found[-1].end == table.end
    looks: Counter[Look] = Counter()
    for part in found:
        assert sum(part.looks.values()) == part.size
        looks.update(part.looks)
    assert looks == total(table)
    if limit:
        assert len(found) <= max(limit, 2 * len(table.slots) + 1)
    else:
        assert all(part.pure for part in found)


@settings(max_examples=60, deadline=None)
@given(mmus(), st.integers(0, 100), st.integers(1, 300), st.integers(0, 9))
def test_cells_cover_their_range(mmu: S2Mmu, first: int, pages: int, shift: int) -> None:
    table = map_of(mmu)
    page = table.page_size
    start, end = first * page, (first + pages) * page
    found = cells(table, start, end, page << shift)
    assert sum(part.size for part in found) == end - start
    looks: Counter[Look] = Counter()
    for number, part in enumerate(found):
        assert part.ipa == start + number * (page << shift)
        assert sum(part.looks.values()) == part.size
        looks.update(part.looks)
    expected: Counter[Look] = Counter()
    for run in table.runs:
        overlap = min(end, run.ipa + run.size) - max(start, run.ipa)
        if overlap > 0:
            expected[look_of(run)] += overlap
    assert looks == expected


@settings(max_examples=60, deadline=None)
@given(mmus(), slots, st.integers(1, 6))
def test_regions_have_every_leaf_and_memslot(mmu: S2Mmu, memslots: list[tuple[int, int]], limit: int) -> None:
    table = map_of(mmu, memslots)
    found = regions([table], limit)
    assert len(found) <= limit
    assert found == sorted(found)
    wanted = [(run.ipa, run.size) for run in table.dump.leaves] + [(s.gpa, s.size) for s in table.slots]
    for ipa, size in wanted:
        assert any(first <= ipa and ipa + size <= end for first, end in found)


@settings(max_examples=60, deadline=None)
@given(mmus())
def test_tables_and_leaves_are_counted_from_the_text_alone(mmu: S2Mmu) -> None:
    table = map_of(mmu)
    assert sum(table.tables.values()) == len(mmu.pgt.check())
    assert table.leaves == Counter(level for _, level, _ in mmu.pgt.leaves())
    assert table.mapped == sum(mmu.pgt.granule.size(level) for _, level, _ in mmu.pgt.leaves())
    assert (table.ipa_bits, table.start_level) == (mmu.pgt.ia_bits, mmu.pgt.start_level)


@settings(max_examples=60, deadline=None)
@given(mmus())
def test_the_granule_is_among_those_that_fit(mmu: S2Mmu) -> None:
    dump = dump_of(mmu)
    page_size = mmu.pgt.granule.page_size
    assert page_size in fitting([dump])
    assert page_size_of([dump], "file", page_size) == (page_size, ())
    if page_size == 0x1_0000:
        assert page_size_of([dump], "file")[0] == page_size


def flat(*leaves: Leaf, bits: int = 48) -> Dump:
    """What pKVM shows: leaves, and holes that are all at the last level."""
    runs: list[stage2.Run] = []
    at = 0
    for one in leaves:
        runs += [Hole(at, one.ipa - at, 3)] if one.ipa > at else []
        runs.append(one)
        at = one.ipa + one.size
    return Dump((*runs, Hole(at, (1 << bits) - at, 3)))


@pytest.mark.parametrize(
    "leaves",
    [(), (leaf(GIB),), (leaf(GIB), leaf(2 * GIB, 2 * MIB, 2)), (leaf(0, 2 * MIB, 2),)],
    ids=["none", "page", "page and block", "block at 0"],
)
def test_a_dump_of_pkvm_tells_of_no_tables(leaves: tuple[Leaf, ...]) -> None:
    dump = flat(*leaves)
    size, _ = page_size_of([dump], "file")
    table = TableMap("file", dump, size)
    assert (size, table.flat, table.tables, table.start_level) == (PAGE, True, {}, 0)
    assert "start level 0; tables not shown" in text_of(table, width=120)


@settings(max_examples=60, deadline=None)
@given(mmus())
def test_a_dump_with_tables_is_not_taken_for_one_of_pkvm(mmu: S2Mmu) -> None:
    assert not map_of(mmu).flat


def test_a_granule_that_does_not_fit_is_refused() -> None:
    mmu = S2Mmu(PhysicalMemory(12), Granule(12), 40, shadow=False)
    mmu.pgt.map(GIB, PAGE, 0, Prot.R, mmu.pgt.memory.allocate_table)
    dump = dump_of(mmu)
    assert page_size_of([dump], "file") == (PAGE, ())
    with pytest.raises(UsageError, match=r"do not fit 64 KiB; they fit 4 KiB"):
        page_size_of([dump], "file", 0x1_0000)
    with pytest.raises(UsageError, match="fit no granule"):
        page_size_of([map_with(leaf(0x4000_0800, 0x800)).dump], "file")


@settings(max_examples=60, deadline=None)
@given(mmus(), mmus())
def test_changes_lead_from_one_table_to_the_other(one: S2Mmu, other: S2Mmu) -> None:
    before, after = map_of(one), map_of(other)
    found = changes(before, after)
    assert changes(before, before) == []
    edges = {0, *(c.ipa for c in found), *(c.ipa + c.size for c in found)}
    edges |= {run.ipa for table in (before, after) for run in table.runs}
    for ipa in edges:
        was, now = at(before, ipa), at(after, ipa)
        here = [change for change in found if change.ipa <= ipa < change.ipa + change.size]
        assert [(change.before, change.after) for change in here] == ([(was, now)] if was != now else [])


def at(table: TableMap, ipa: int) -> Look:
    return next((look_of(run) for run in table.runs if run.ipa <= ipa < run.ipa + run.size), None)


def test_a_pattern_is_one_part_with_its_shares() -> None:
    table = map_with(*[leaf(GIB + page * PAGE, writable=page % 2 == 0) for page in range(1024)])
    (_, mixed, _) = parts(table, 8)
    assert (mixed.ipa, mixed.size) == (GIB, 4 * MIB)
    assert sorted(mixed.looks.values()) == [2 * MIB, 2 * MIB]


def text_of(table: TableMap, *, ascii_only: bool = False, width: int = 80) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        ranges = map_text.shown_regions([table])
        console.print(map_text.drawing(table, ranges, width, 8, ascii_only=ascii_only))
        console.print(map_text.legend(ascii_only=ascii_only))
    return captured.get()


def test_the_strip_shows_what_is_where() -> None:
    table = map_with(leaf(GIB), leaf(GIB + PAGE, writable=False), leaf(GIB + 2 * MIB, 2 * MIB, 2))
    lines = text_of(table, ascii_only=True, width=120).splitlines()
    assert lines[2].startswith("0x0000_4000_0000  %.......")
    assert lines[3].startswith("0x0000_4020_0000  BBBBBBBB")
    assert lines[0].startswith("4 KiB granule; 40-bit IPA; start level 1; ")
    assert "2 MiB + 8 KiB mapped by 1 level-2 block, 2 pages" in lines[0]


@settings(max_examples=50, deadline=None)
@given(mmus(), slots, st.integers(60, 200))
def test_text_fits_its_width_and_ascii_is_ascii(
    mmu: S2Mmu, memslots: list[tuple[int, int]], width: int
) -> None:
    table = map_of(mmu, memslots)
    text_of(table, ascii_only=True, width=width).encode("ascii")
    assert all(len(line.rstrip()) <= width for line in text_of(table, width=width).splitlines())


@settings(max_examples=30, deadline=None)
@given(mmus(), mmus(), slots)
def test_the_picture_is_well_formed_and_draws_every_kind(
    one: S2Mmu, other: S2Mmu, memslots: list[tuple[int, int]]
) -> None:
    tables = [map_of(one, memslots), map_of(other)]
    text = svg(
        "a <title> & more", [[Panel("first", tables[0])], [Panel("one", tables[0]), Panel("two", tables[1])]]
    )
    root = ElementTree.fromstring(text)
    classes = {element.get("class") for element in root.iter() if element.tag.endswith("rect")}
    for look in (look for table in tables for look in table.looks):
        wanted = {"RWX": "rwx", "RW-": "rw", "R-X": "rx", "R--": "r"}.get(look.access, "other")
        assert wanted in classes


def test_the_picture_of_an_enormous_vm_is_small_and_soon_made() -> None:
    sparse = [
        leaf(number * 64 * MIB + number % 512 * PAGE, writable=number % 3 > 0) for number in range(1 << 14)
    ]
    dense = [leaf((1 << 40) + page * PAGE, writable=page % 7 > 2) for page in range(1 << 17)]
    table = map_with(*sparse, *dense, bits=48)
    start = time.monotonic()
    text = svg("", [[Panel("canonical MMU", table)]])
    assert text_of(table).count("\n") < 60
    assert time.monotonic() - start < 20
    assert len(re.findall("<g>", text)) <= ROWS * CELLS
    assert len(text) < 4 * MIB


def test_a_dump_without_its_last_row_is_drawn_as_far_as_it_goes() -> None:
    whole = map_with(leaf(GIB, 4 * PAGE))
    table = TableMap("cut", Dump(whole.runs[:-1]), PAGE)
    assert table.ipa_bits is None
    assert "size of the IPA space unknown" in text_of(table)
    assert svg("", [[Panel("cut", table)]])
