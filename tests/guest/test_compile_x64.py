# SPDX-License-Identifier: Apache-2.0
"""Programs as x86-64 images: their layout, their tables, and what they cannot have."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import CapabilityMissing
from prefault.guest.compile_x64 import MAPPED, PAGE, compile_program
from prefault.guest.program import EnterL2, Execute, Marker, Program, Read, Step, TlbiIpa


def translate(base: int, data: bytes, tables: int, address: int) -> int:
    """Where the image's own tables lead, as a processor walks them."""

    def entry(table: int, index: int) -> int:
        (value,) = struct.unpack_from("<Q", data, (table & ~0xFFF) - base + 8 * index)
        assert value & 0x23 == 0x23, "present, writable, accessed"
        return int(value)

    pdpt = entry(tables, address >> 39 & 0x1FF)
    page = entry(pdpt, address >> 30 & 0x1FF)
    assert page & 0xC0 == 0xC0, "a page of 1 GiB that counts as written"
    return page & ~0x3FFF_FFFF & (1 << 52) - 1 | address & 0x3FFF_FFFF


@given(st.integers(0, MAPPED - 1), st.integers(0, 1 << 20).map(lambda number: number << 16))
def test_the_guest_sees_its_memory_where_it_is(address: int, base: int) -> None:
    image = compile_program(Program((Read(0x1000),), base))
    assert translate(image.base, image.data, image.tables, address) == address


@given(st.integers(0, 300))
def test_tables_follow_the_code_page_aligned(markers: int) -> None:
    image = compile_program(Program((Marker(1),) * markers))
    assert image.tables % PAGE == 0
    assert image.base + len(image.data) == image.tables + 2 * PAGE


@pytest.mark.parametrize("step", [EnterL2(()), Execute(0x1000), TlbiIpa(0)])
def test_what_is_a_matter_of_arm64_is_missing(step: Step) -> None:
    with pytest.raises(CapabilityMissing, match="arm64"):
        compile_program(Program((step,)))
