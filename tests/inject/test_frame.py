# SPDX-License-Identifier: Apache-2.0
"""Signal frames of x86-64, made of a saved state as CPUs with AMX have it."""

from __future__ import annotations

import struct
from collections import defaultdict

import pytest

from prefault.inject.frame import fits_x86_64, x86_64

PLAIN, TILES = 2816, 8192
FEATURES, TILE_DATA = 0x602E7, 1 << 18


def state(in_use: int, size: int = PLAIN + TILES) -> bytes:
    saved = bytearray(size)
    struct.pack_into("<Q", saved, 464, FEATURES)
    struct.pack_into("<Q", saved, 512, in_use)
    return bytes(saved)


@pytest.mark.parametrize(("in_use", "fits"), [(0x7, True), (0x7 | 1 << 17, True), (0x7 | TILE_DATA, False)])
def test_a_frame_is_made_of_threads_that_use_no_tiles(in_use: int, fits: bool) -> None:
    assert fits_x86_64(state(in_use)) == fits


def test_a_state_without_room_for_what_is_in_use_is_none() -> None:
    assert not fits_x86_64(bytes(512))


def test_room_for_tiles_makes_no_difference_to_a_frame() -> None:
    registers: defaultdict[str, int] = defaultdict(int)
    with_room = x86_64(registers, 0, state(0x7), 0)
    without = x86_64(registers, 0, state(0x7, PLAIN), 0)
    assert with_room == without
    assert not struct.unpack_from("<Q", with_room, len(with_room) - 4 - PLAIN + 464 + 8)[0] & TILE_DATA
