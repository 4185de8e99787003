# SPDX-License-Identifier: Apache-2.0
"""The cases are what they are called, and can be sent into the lab and back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import pytest

from prefault.bench.cases import CASES, MIB, SIZE, SWEEP, Case, Context, choose
from prefault.errors import UsageError
from prefault.machine import Backing, Frames, Resident, SlotFlags

WORDS: dict[str, Callable[[Case], bool]] = {
    "nested": lambda case: case.context is Context.NESTED,
    "l2": lambda case: case.context is Context.L2,
    "logged": lambda case: case.flags == SlotFlags.LOG_DIRTY_PAGES,
    "read-only": lambda case: case.flags == SlotFlags.READONLY,
    "contiguous": lambda case: case.frames is Frames.CONTIGUOUS,
    "written": lambda case: case.writes,
    "absent": lambda case: case.resident is Resident.NOTHING,
    "untouched": lambda case: case.resident is Resident.NOTHING,
    "cached": lambda case: case.dropped or case.resident is Resident.NOTHING,
    "zero-page": lambda case: case.resident is Resident.READ,
    "resident": lambda case: case.resident is not Resident.NOTHING and not case.dropped,
}


def test_names_are_unique() -> None:
    assert not [name for name, count in Counter(case.name for case in CASES).items() if count > 1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_name_says_what_the_case_is(case: Case) -> None:
    backing, *words = case.name.split("/")
    assert backing.partition("-")[0] == case.backing.value.partition("-")[0]
    assert all(WORDS[word](case) for word in words)
    particular = set(WORDS) - {"resident", "absent", "untouched", "cached", "zero-page"}
    assert not [word for word in particular - set(words) if WORDS[word](case)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_survives_the_way_into_the_lab(case: Case) -> None:
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case


def test_what_is_no_case_is_told() -> None:
    with pytest.raises(UsageError, match="not a case"):
        Case.from_json({"name": "x", "backing": "paper"})


def test_every_bar_of_resident_memory_is_for_scattered_frames() -> None:
    small = [case for case in CASES if "resident" in case.name and not case.blocks]
    bars = {case.name for case in small if case.frames is Frames.SCATTERED and case.bar}
    assert {case.name for case in small if case.backing is Backing.PRIVATE} - bars == {
        "private/resident/contiguous"
    }


def test_patterns_choose_by_name() -> None:
    assert {case.name for case in choose(["private/untouched*"])} == {
        "private/untouched",
        "private/untouched/written",
    }


def test_a_pattern_that_fits_nothing_is_told() -> None:
    with pytest.raises(UsageError, match="no case is called nobody"):
        choose(["private/*", "nobody"])


def test_everything_has_the_larger_sizes_too() -> None:
    usual, everything = choose([]), choose([], everything=True)
    assert set(usual) < set(everything)
    assert {case.size for case in everything if case.name == CASES[0].name} == {SIZE, *SWEEP}


def test_a_size_is_rounded_up_to_whole_huge_pages() -> None:
    (one,) = choose(["hugetlb-32M/resident"], sizes=(48 * MIB,))
    assert one.size == 64 * MIB


def test_a_size_that_cuts_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match="multiple of 2 MiB"):
        choose([], sizes=(MIB,))
