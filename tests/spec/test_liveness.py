# SPDX-License-Identifier: Apache-2.0
"""A value that is not read again does not tell two states apart; one that is, does."""

from __future__ import annotations

import inspect
from types import CodeType, FrameType

import pytest

from prefault.spec import Faults
from prefault.spec.explore import Explorer
from prefault.spec.liveness import place
from prefault.spec.races import world


class Here:
    """Where a function was when it called."""

    def __init__(self) -> None:
        self.names: list[frozenset[str]] = []
        self.places: list[tuple[CodeType, int]] = []

    def __call__(self) -> bool:
        frame = inspect.currentframe()
        assert isinstance(frame, FrameType)
        caller = frame.f_back
        assert caller
        offset, live = place(caller.f_code, caller.f_lasti)
        self.places.append((caller.f_code, offset))
        self.names.append(live & caller.f_locals.keys())
        return len(self.names) < 3


def _loop(here: Here) -> int:
    total = 0
    while here():
        found = total + 1
        total = found
    return total


def _handler(here: Here) -> int:
    kept = 7
    lost = 8
    try:
        here()
        lost = 9
    except ValueError:
        return kept
    return lost


def test_what_a_loop_leaves_behind_is_not_live() -> None:
    here = Here()
    _loop(here)
    assert [names - {"here"} for names in here.names] == [{"total"}] * 3


def test_what_a_handler_reads_is_live() -> None:
    here = Here()
    _handler(here)
    assert "kept" in here.names[0]
    assert "lost" not in here.names[0]


def test_a_call_is_at_one_place_however_often_it_was_made() -> None:
    here = Here()
    _loop(here)
    first = set(here.places)
    for _ in range(200):
        here.names.clear()
        _loop(here)
    assert set(here.places) == first


@pytest.mark.parametrize("name", ["prefault-madvise", "prefault-delete"])
def test_a_race_has_the_same_states_each_time(name: str) -> None:
    seen = {Explorer(world(name, Faults())).explore().states for _ in range(4)}
    assert len(seen) == 1
