# SPDX-License-Identifier: Apache-2.0
"""Estimates of costs: linear in what was counted."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from prefault.machine import GUEST_MEMORY, FaultCounts, Resident
from prefault.report.estimate import Figures, estimate, load_figures, split
from prefault.scenarios.walk_result import Phase, WalkConfig, WalkResult, WalkRun

PAGE = 4096
KEY = "private/write"


def figures(**faults: float) -> Figures:
    sides = {"without": faults, "prefaulted": {}}
    filed = {name: {KEY: sides} for name in ("guest", "l2", "l1")}
    return Figures("a test", access=1, exit=10, call=100, prefault={KEY: 7}, faults=filed)


def walk_of(pages: int, faults: FaultCounts, prefaulted: int) -> WalkResult:
    config = WalkConfig(size=pages * PAGE, stride=PAGE)
    without = WalkRun((Phase("first half", 999, 2, faults),), 0, 0, {"3": pages}, {}, 0)
    spared = dataclasses.replace(
        without,
        phases=(Phase("first half", 999, 2),),
        prefault_ns=999,
        prefaulted_bytes=prefaulted * PAGE,
    )
    return WalkResult(config, PAGE, without, spared)


def test_a_walk_costs_its_accesses_exits_and_faults() -> None:
    found = estimate(walk_of(8, FaultCounts(read=3, write=1), 8), figures(read=1000, write=5000))
    assert found.without.walk_ns == 4 * 1 + 2 * 10 + 3 * 1000 + 5000
    assert found.with_prefault.walk_ns == 4 * 1 + 2 * 10


def test_prefaulting_costs_its_calls_and_leaves() -> None:
    assert estimate(walk_of(8, FaultCounts(), 8), figures()).with_prefault.prefault_ns == 100 + 8 * 7
    assert estimate(walk_of(8, FaultCounts(), 4), figures()).with_prefault.prefault_ns == 100 + 4 * 7
    assert estimate(walk_of(8, FaultCounts(), 0), figures()).with_prefault.prefault_ns == 0


def test_a_permission_fault_takes_the_write_after_it_along() -> None:
    counts = FaultCounts(read=1, write=5, permission=2)
    assert split(counts) == {"read": 1, "write": 1, "permission": 2}


def test_nothing_of_the_time_on_the_spec_is_left() -> None:
    found = estimate(walk_of(8, FaultCounts(), 8), figures())
    assert 999 not in (found.without.walk_ns, found.with_prefault.walk_ns, found.with_prefault.prefault_ns)


@pytest.mark.parametrize("name", ["guest", "l2", "l1"])
def test_there_are_figures_for_every_memory_that_run_offers(name: str) -> None:
    kept = load_figures()
    offered = set(GUEST_MEMORY)
    for backing, resident in itertools.product(offered, Resident):
        filed = f"{backing.value}/{resident.value}"
        assert kept.prefault[filed] > 0
        assert kept.faults[name][filed]["without"]["read"] > 0
