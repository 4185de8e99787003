# SPDX-License-Identifier: Apache-2.0
"""The image of a program; what its code does is tested on a real vCPU, in tests/lab."""

from __future__ import annotations

import pytest

from prefault.errors import UsageError
from prefault.guest import a64
from prefault.guest.compile import compile_program
from prefault.guest.program import PORT, EnterL2, L2Mapping, Program, Read, Step, Walk

GRANULES = (0x1000, 0x4000, 0x1_0000)


def _words(code: bytes) -> list[int]:
    return [int.from_bytes(code[at : at + 4], "little") for at in range(0, len(code), 4)]


@pytest.mark.parametrize("page_size", GRANULES)
def test_the_root_table_lies_where_vttbr_points(page_size: int) -> None:
    image = compile_program(Program((EnterL2(()),)), page_size)
    words = _words(image.data)
    at = words.index(a64.msr("vttbr_el2", 0))
    value = 0
    for word in words[:at]:
        if word & 31 == 0 and word >> 23 in (0x1A5, 0x1E5):
            shift = 16 * (word >> 21 & 3)
            value = (0 if word >> 23 == 0x1A5 else value) | (word >> 5 & 0xFFFF) << shift
    root = (value & (1 << 48) - 1) - image.base
    assert root % page_size == 0
    assert 0 < root < len(image.data)
    assert any(image.data[root : root + page_size])


def test_a_program_longer_than_a_page_still_fits_before_its_tables() -> None:
    steps: tuple[Step, ...] = (Read(0x8000_0000),) * 2000
    image = compile_program(Program((*steps, EnterL2(()))), 0x1000)
    assert len(image.data) > 4 * 2000 * 2


def test_programs_that_are_apart_have_vmids_of_their_own() -> None:
    images = [compile_program(Program((EnterL2(()),), 0x4000_0000 + at), 0x1000) for at in (0, 2 << 20)]
    assert images[0].data != images[1].data


def test_an_ordinary_program_has_no_tables() -> None:
    assert len(compile_program(Program((Read(0),)), 0x1000).data) < 0x2000


def test_a_walk_does_not_grow_with_its_size() -> None:
    sizes = [
        len(compile_program(Program((Walk(0, size, 4096, 500),)), 4096).data) for size in (1 << 20, 1 << 40)
    ]
    assert sizes[0] == sizes[1]


def test_a_step_without_code_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match="Step"):
        compile_program(Program((Step(),)), 0x1000)


@pytest.mark.parametrize("ipa", [PORT, 0x4000_0000])
def test_l2_cannot_hide_the_port_or_the_code(ipa: int) -> None:
    step = EnterL2((), (L2Mapping(ipa, 0x8000_0000, 0x1000),))
    with pytest.raises(UsageError, match="one to one"):
        compile_program(Program((step,)), 0x1000)
