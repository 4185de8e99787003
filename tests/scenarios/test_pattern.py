# SPDX-License-Identifier: Apache-2.0
"""The walk's arithmetic, against memory that a bytearray is, and a guest that is a loop."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import Mismatch
from prefault.guest.program import Walk
from prefault.machine import Vm
from prefault.scenarios import pattern

GPA = 0x8000_0000
SIZE = 3 << 20


class Memory:
    """Guest memory from GPA, and the guest that walks it."""

    def __init__(self) -> None:
        self._bytes = bytearray(SIZE)

    def write_memory(self, gpa: int, data: bytes) -> None:
        self._bytes[gpa - GPA : gpa - GPA + len(data)] = data

    def read_memory(self, gpa: int, size: int) -> bytes:
        return bytes(self._bytes[gpa - GPA : gpa - GPA + size])

    def walk(self, walk: Walk) -> int:
        """What the machine code does."""
        assert isinstance(walk.start, int) and isinstance(walk.size, int)
        total = 0
        for index, gpa in enumerate(range(walk.start, walk.start + walk.size, walk.stride)):
            if walk.is_write(index):
                self.write_memory(gpa, gpa.to_bytes(8, "little"))
            else:
                total += int.from_bytes(self.read_memory(gpa, 8), "little")
        return total % (1 << 64)


@given(
    stride=st.sampled_from([512, 4096, 1 << 20]),
    permille=st.integers(0, 1000),
    first=st.integers(0, 1),
    filled=st.booleans(),
)
def test_a_right_walk_passes(stride: int, permille: int, first: int, filled: bool) -> None:
    memory = Memory()
    vm = cast(Vm, memory)
    if filled:
        pattern.fill(vm, GPA, SIZE, stride)
    walk = Walk(GPA + (first << 20), 2 << 20, stride, permille)
    assert memory.walk(walk) == pattern.expected_sum(walk, None if filled else 0)
    written = pattern.check_writes(vm, walk)
    again = Walk(walk.start, walk.size, stride)
    assert memory.walk(again) == (pattern.expected_sum(walk, None if filled else 0) + written) % (1 << 64)


@given(page=st.integers(0, 255), permille=st.integers(500, 1000))
def test_a_lost_write_is_found_and_named(page: int, permille: int) -> None:
    memory = Memory()
    walk = Walk(GPA, 1 << 20, 4096, permille)
    memory.walk(walk)
    gpa = GPA + 4096 * page
    memory.write_memory(gpa, bytes(8))
    if walk.is_write(page):
        with pytest.raises(Mismatch, match=f"{gpa:#x}"):
            pattern.check_writes(cast(Vm, memory), walk)
    else:
        pattern.check_writes(cast(Vm, memory), walk)


def test_two_pages_that_changed_places_change_the_sum() -> None:
    memory = Memory()
    vm = cast(Vm, memory)
    pattern.fill(vm, GPA, SIZE, 4096)
    memory.write_memory(GPA, memory.read_memory(GPA + 4096, 4096))
    walk = Walk(GPA, 1 << 20, 4096)
    assert memory.walk(walk) != pattern.expected_sum(walk, None)
