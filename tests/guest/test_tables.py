# SPDX-License-Identifier: Apache-2.0
"""L1's stage-2 tables, read back by a walker of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import UsageError
from prefault.guest.program import L2Mapping
from prefault.guest.tables import Stage2Builder, check_granule, identity, leaf_size, tlbi_range

GRANULES = (0x1000, 0x4000, 0x1_0000)
START_LEVEL = {0x1000: 1, 0x4000: 1, 0x1_0000: 2}
BASE = 0x4010_0000
ADDRESS = ((1 << 48) - 1) & ~0xFFF


def walk(data: bytes, page_size: int, ipa: int) -> tuple[int, int] | None:
    """(level, descriptor) of the leaf that translates ``ipa``, as the architecture finds it."""
    table = 0
    for level in range(START_LEVEL[page_size], 4):
        index = ipa // leaf_size(page_size, level) % (page_size // 8)
        descriptor = int.from_bytes(data[table + 8 * index : table + 8 * index + 8], "little")
        if not descriptor & 1:
            return None
        if level == 3 or not descriptor & 2:
            return level, descriptor
        table = (descriptor & ADDRESS) - BASE
    raise AssertionError("unreachable")


@st.composite
def placed(draw: st.DrawFn) -> tuple[int, L2Mapping]:
    page_size = draw(st.sampled_from(GRANULES))
    level = draw(st.sampled_from([3, 2]))
    leaf = leaf_size(page_size, level)
    ipa = leaf * draw(st.integers(0, (1 << 36) // leaf - 8))
    gpa = leaf * draw(st.integers(0, (1 << 39) // leaf - 8))
    permissions = [draw(st.booleans()) for _ in range(3)]
    return page_size, L2Mapping(ipa, gpa, leaf * draw(st.integers(1, 4)), level, *permissions)


@given(case=placed(), offset=st.integers(0, (1 << 30) - 1))
def test_a_mapping_is_found_at_its_level_with_its_permissions(
    case: tuple[int, L2Mapping], offset: int
) -> None:
    page_size, mapping = case
    builder = Stage2Builder(page_size, BASE)
    builder.map(mapping)
    offset %= mapping.size
    found = walk(builder.finish(), page_size, mapping.ipa + offset)
    assert found is not None
    level, descriptor = found
    leaf = leaf_size(page_size, level)
    assert level == mapping.level
    assert descriptor & ADDRESS & ~(leaf - 1) == mapping.gpa + offset // leaf * leaf
    assert bool(descriptor >> 6 & 1) == mapping.readable
    assert bool(descriptor >> 7 & 1) == mapping.writable
    assert (descriptor >> 53 & 3 == 0) == mapping.executable
    assert descriptor >> 10 & 1


@given(case=placed())
def test_what_is_beside_a_mapping_is_not_mapped(case: tuple[int, L2Mapping]) -> None:
    page_size, mapping = case
    builder = Stage2Builder(page_size, BASE)
    builder.map(mapping)
    data = builder.finish()
    assert walk(data, page_size, mapping.ipa + mapping.size) is None
    assert mapping.ipa == 0 or walk(data, page_size, mapping.ipa - 1) is None


@pytest.mark.parametrize(("page_size", "tg0", "sl0"), [(0x1000, 0, 1), (0x4000, 2, 2), (0x1_0000, 1, 1)])
def test_vtcr_says_granule_and_start_level(page_size: int, tg0: int, sl0: int) -> None:
    vtcr = Stage2Builder(page_size, BASE).vtcr
    assert (vtcr >> 14 & 3, vtcr >> 6 & 3, 64 - (vtcr & 0x3F)) == (tg0, sl0, 39)


@pytest.mark.parametrize(
    "mapping",
    [
        L2Mapping(0x800, 0, 0x1000),
        L2Mapping(0, 0x800, 0x1000),
        L2Mapping(0, 0, 0x1000, 2),
        L2Mapping(0, 0, 1 << 39, 0),
        L2Mapping(1 << 39, 0, 0x1000),
    ],
)
def test_a_mapping_that_no_table_can_hold_is_refused(mapping: L2Mapping) -> None:
    with pytest.raises(UsageError):
        Stage2Builder(0x1000, BASE).map(mapping)


@pytest.mark.parametrize("levels", [(3, 3), (3, 2), (2, 3)])
def test_an_ipa_is_mapped_once(levels: tuple[int, int]) -> None:
    builder = Stage2Builder(0x1000, BASE)
    builder.map(L2Mapping(0, 0, leaf_size(0x1000, levels[0]), levels[0]))
    with pytest.raises(UsageError, match="twice"):
        builder.map(L2Mapping(0, 0, leaf_size(0x1000, levels[1]), levels[1]))


def test_high_output_addresses_widen_vtcr_ps() -> None:
    builder = Stage2Builder(0x1000, BASE)
    assert builder.vtcr >> 16 & 7 == 2
    builder.map(L2Mapping(0, 1 << 41, 0x1000))
    assert builder.vtcr >> 16 & 7 == 5


def test_identity_fills_only_what_is_missing() -> None:
    there = [L2Mapping(0x1000, 0x1000, 0x1000)]
    assert identity(there, 0, 0x3000, 0x1000) == [
        L2Mapping(0, 0, 0x1000),
        L2Mapping(0x2000, 0x2000, 0x1000),
    ]
    with pytest.raises(UsageError, match="one to one"):
        identity([L2Mapping(0, 0x5000, 0x1000)], 0, 0x1000, 0x1000)


def test_only_granules_are_page_sizes() -> None:
    with pytest.raises(UsageError, match="granule"):
        check_granule(0x2000)


@pytest.mark.parametrize(
    ("page_size", "pages", "scale", "number"),
    [
        (0x1000, 2, 0, 0),
        (0x1000, 64, 0, 31),
        (0x4000, 128, 1, 1),
        (0x1_0000, 2048, 1, 31),
        (0x1000, 65536, 2, 31),
    ],
)
def test_a_range_of_a_tlbi_is_its_number_and_scale(
    page_size: int, pages: int, scale: int, number: int
) -> None:
    value = tlbi_range(page_size, 7 * page_size, pages * page_size)
    assert (value >> 44 & 3, value >> 39 & 31, value & (1 << 37) - 1) == (scale, number, 7)
    assert (number + 1 << 5 * scale + 1) == pages


def test_a_range_that_no_tlbi_has_is_refused() -> None:
    for pages in (0, 1, 3, 66):
        with pytest.raises(UsageError, match="range"):
            tlbi_range(0x1000, 0, pages * 0x1000)
