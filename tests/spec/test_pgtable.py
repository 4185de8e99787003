# SPDX-License-Identifier: Apache-2.0
"""Laws of the stage-2 tables, against a dictionary of pages."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefault.spec.descriptors import AF, S2AP_R, S2AP_W, VALID, XN, Granule, Prot
from prefault.spec.memory import PhysicalMemory
from prefault.spec.pgtable import PageTable
from prefault.spec.steps import Violation

RW = Prot.R | Prot.W
GRANULES = [Granule(12), Granule(12, lpa2=True), Granule(14), Granule(14, lpa2=True), Granule(16)]
granules = st.sampled_from(GRANULES)


def make(granule: Granule = GRANULES[0], ia_bits: int = 40) -> PageTable:
    return PageTable(PhysicalMemory(granule.page_shift), granule, ia_bits)


def map_(pgt: PageTable, ipa: int, size: int, phys: int, prot: int = RW) -> int:
    return pgt.map(ipa, size, phys, prot, pgt.memory.allocate_table)


def pages_of(pgt: PageTable) -> dict[int, tuple[int, int]]:
    """IPA of each mapped page → (PA, permissions)."""
    found = {}
    for ipa, level, pte in pgt.leaves():
        pa = pgt.granule.to_phys(pte)
        for offset in range(0, pgt.granule.size(level), pgt.granule.page_size):
            found[ipa + offset] = (pa + offset, pte & (S2AP_R | S2AP_W | XN))
    return found


operations = st.lists(
    st.tuples(
        st.sampled_from(["page", "block", "unmap", "wrprotect", "split"]),
        st.integers(0, 5),
        st.sampled_from([0, 1, 2, 510, 511]),
        st.integers(1, 600),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(operations)
def test_any_sequence_of_changes_equals_a_dictionary_of_pages(todo: list[tuple[str, int, int, int]]) -> None:
    pgt = make()
    model: dict[int, int] = {}
    page, block = 0x1000, 0x200000
    for number, (what, at, offset, count) in enumerate(todo):
        base = 0x4000_0000 + at * block
        ipa, size = base + offset * page, count * page
        phys = 0x1_0000_0000 * (number + 1)
        if what in ("page", "block"):
            ipa, size = (ipa, page) if what == "page" else (base, block)
            phys += ipa & (block - 1)
            # A block that is in the way goes as a whole; the rest of it is mapped again lazily.
            for lost in range(base, base + block, page) if pgt.get_leaf(ipa)[1] == 2 else ():
                model.pop(lost, None)
            assert map_(pgt, ipa, size, phys) == 0
            model |= {ipa + o: phys + o for o in range(0, size, page)}
        elif what == "unmap":
            gone = range(ipa, ipa + size, page)
            blocks = {one & -block for one in gone if pgt.get_leaf(one)[1] == 2}
            pgt.unmap(ipa, size)
            for lost in (*gone, *(b + o for b in blocks for o in range(0, block, page))):
                model.pop(lost, None)
        elif what == "wrprotect":
            pgt.wrprotect(ipa, size)
        else:
            assert pgt.split(base, block, pgt.memory.allocate_table) == 0
        assert pgt.check() == set(pgt.memory.tables)
    assert {ipa: pa for ipa, (pa, _) in pages_of(pgt).items()} == model


@settings(max_examples=100, deadline=None)
@given(granules, st.integers(32, 52), st.data())
def test_a_page_anywhere_in_any_ipa_space_is_found_again(
    granule: Granule, bits: int, data: st.DataObject
) -> None:
    if not granule.lpa2 and granule.page_shift != 16:
        bits = min(bits, 48)
    pgt = make(granule, bits)
    page = granule.page_size
    ipa = data.draw(st.integers(0, (1 << bits) // page - 1)) * page
    pa = (
        data.draw(st.integers(0, (1 << (52 if granule.lpa2 or granule.page_shift == 16 else 48)) // page - 1))
        * page
    )
    assert map_(pgt, ipa, page, pa) == 0
    pte, level = pgt.get_leaf(ipa)
    assert (level, granule.to_phys(pte), pte & VALID) == (3, pa, 1)
    assert len(pgt.pgd) <= 16
    assert pgt.check() == set(pgt.memory.tables)


@pytest.mark.parametrize(
    ("page_shift", "bits", "level", "tables"),
    [
        (12, 32, 2, 4),
        (12, 40, 1, 2),
        (12, 43, 1, 16),
        (12, 44, 0, 1),
        (12, 48, 0, 1),
        (12, 52, 0, 16),
        (14, 40, 2, 16),
        (14, 47, 1, 1),
        (14, 48, 1, 2),
        (16, 40, 2, 1),
        (16, 46, 2, 16),
        (16, 52, 1, 1),
    ],
)
def test_the_start_level_is_as_low_as_sixteen_concatenated_tables_allow(
    page_shift: int, bits: int, level: int, tables: int
) -> None:
    pgt = make(Granule(page_shift), bits)
    assert (pgt.start_level, len(pgt.pgd)) == (level, tables)


@pytest.mark.parametrize(
    ("page_shift", "sizes"), [(12, (1 << 30, 2 << 20)), (14, (32 << 20,)), (16, (512 << 20,))]
)
def test_a_block_is_used_where_size_and_alignment_allow_it(page_shift: int, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        pgt = make(Granule(page_shift))
        assert map_(pgt, 1 << 32, size, 1 << 36) == 0
        assert [pgt.granule.size(level) for _, level, _ in pgt.leaves()] == [size]
        misaligned = make(Granule(page_shift))
        assert map_(misaligned, 1 << 32, size, (1 << 36) + misaligned.granule.page_size) == 0
        assert all(misaligned.granule.size(level) < size for _, level, _ in misaligned.leaves())


def test_a_block_over_a_table_frees_the_table() -> None:
    pgt = make()
    map_(pgt, 0x4000_1000, 0x1000, 0x8000_1000)
    tables = len(pgt.memory.tables)
    assert map_(pgt, 0x4000_0000, 0x20_0000, 0x1_0000_0000) == 0
    assert len(pgt.memory.tables) == tables - 1
    assert pgt.check() == set(pgt.memory.tables)


def test_mapping_the_same_again_is_a_lost_race() -> None:
    pgt = make()
    assert map_(pgt, 0, 0x1000, 0x8000_0000) == 0
    assert map_(pgt, 0, 0x1000, 0x8000_0000, Prot.R) == -errno.EAGAIN


def test_a_map_beyond_the_ipa_space_is_refused() -> None:
    assert map_(make(ia_bits=32), (1 << 32) - 0x1000, 0x2000, 0) == -errno.ERANGE


def test_relaxing_adds_permissions_and_takes_none() -> None:
    pgt = make()
    map_(pgt, 0, 0x1000, 0x8000_0000, Prot.R)
    assert pgt.relax_perms(0, Prot.W) == 0
    assert pgt.get_leaf(0)[0] & (S2AP_R | S2AP_W) == S2AP_R | S2AP_W
    assert pgt.relax_perms(0x1000, Prot.W) == -errno.EAGAIN


def test_a_leaf_is_young_until_it_is_aged() -> None:
    pgt = make()
    map_(pgt, 0, 0x1000, 0x8000_0000)
    assert pgt.test_clear_young(0, 0x1000, mkold=False)
    assert pgt.test_clear_young(0, 0x1000, mkold=True)
    assert not pgt.test_clear_young(0, 0x1000, mkold=True)
    pgt.mkyoung(0)
    assert pgt.get_leaf(0)[0] & AF


def test_writing_over_a_valid_descriptor_violates_break_before_make() -> None:
    pgt = make()
    map_(pgt, 0, 0x1000, 0x8000_0000)
    table, index, _ = pgt.find(0)
    with pytest.raises(Violation, match="break-before-make"):
        pgt._set(table, index, table.entries[index] + 0x1000)


def test_a_lost_reference_is_found() -> None:
    pgt = make()
    map_(pgt, 0, 0x1000, 0x8000_0000)
    pgt.find(0)[0].refs += 1
    with pytest.raises(Violation, match="references"):
        pgt.check()


def test_unmapping_forgets_what_the_tlb_knew() -> None:
    pgt = make()
    map_(pgt, 0, 0x20_0000, 0x1_0000_0000)
    pgt.tlb.pages[7] = 0x8000_7001
    pgt.unmap(0x1000, 0x1000)
    assert 7 not in pgt.tlb.pages
