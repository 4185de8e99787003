# SPDX-License-Identifier: Apache-2.0
"""What ``prefault bench`` measures on the lab's kernel can be trusted."""

from __future__ import annotations

import functools
import math

import pytest

from prefault.bench.cases import MIB, choose
from prefault.bench.measure import Measured
from prefault.bench.pairs import PairAsk
from prefault.bench.waits import KINDS, Ask
from prefault.lab import bench
from prefault.lab.bench import Boot, Settings
from prefault.lab.profile import profile
from prefault.report.bench import per_leaf, share_of_one
from prefault.report.profile import INTERRUPTS, MMU_LOCK, SPINNING

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

NAMES = (
    "private/resident",
    "private/resident/contiguous",
    "private/resident/nested",
    "shared/resident/contiguous",
    "shared/absent",
    "thp/resident",
)
TWICE = ("private/resident", "shared/absent", "thp/resident")


@functools.cache
def measured(*names: str) -> dict[str, Measured]:
    """Cases, each by its name; from a boot of their own for each choice of them."""
    found: dict[str, Measured] = {}
    cases = choose(names, sizes=(8 * MIB,))
    bench.measure(Boot("nested", cases), Settings(repeat=3), lambda one: found.update({one.case: one}))
    return found


def test_two_runs_give_the_same_figures_to_a_percent_whatever_else_was_measured() -> None:
    first, second = measured(*NAMES), measured(*TWICE)
    different = {
        (case, name): (per_leaf(first[case], name), per_leaf(one, name))
        for case, one in second.items()
        for name in one.samples
        if not math.isclose(
            per_leaf(first[case], name) or 0,
            per_leaf(one, name) or 0,
            rel_tol=0.01,
            # A call of a thousand instructions is not measured to a percent.
            abs_tol=100 / (one.size // one.unit),
        )
    }
    assert not different


@pytest.mark.parametrize("case", NAMES)
def test_pre_faulting_spares_the_guest_its_faults(case: str) -> None:
    found = measured(*NAMES)[case]
    demand, touch = per_leaf(found, "demand"), per_leaf(found, "touch")
    assert demand and demand > 1000
    assert touch and touch < 20


@pytest.mark.parametrize("case", NAMES)
def test_leaves_are_as_many_as_the_figures_are_divided_by(case: str) -> None:
    found = measured(*NAMES)[case]
    assert sum(found.leaves.values()) == found.size // found.unit


def test_frames_lie_as_the_cases_say() -> None:
    found = measured(*NAMES)
    assert found["private/resident"].adjacent is not None
    assert found["private/resident"].adjacent < 0.02
    assert all((found[case].adjacent or 0) > 0.98 for case in found if "contiguous" in case)


def test_every_instruction_of_a_call_is_seen() -> None:
    (case,) = choose(["private/resident"], sizes=(2 * MIB,))
    seen = profile(case, "prefault", Boot("nested", (case,)), Settings(timeout=300))
    counted: list[Measured] = []
    bench.measure(Boot("nested", (case,)), Settings(repeat=3), counted.append)
    cost = per_leaf(counted[0], "prefault")
    assert cost is not None
    assert seen.counts.total() / 512 == pytest.approx(cost, rel=0.05)
    assert 0 < seen.longest[MMU_LOCK] <= seen.longest[SPINNING] < seen.counts.total() / 2
    assert seen.longest[INTERRUPTS] > 0


def test_others_go_on_while_memory_is_pre_faulted() -> None:
    ask = Ask(size=128 * MIB, rounds=2, samples=200)
    found = bench.waits(Boot("nested", ()), Settings(timeout=300), ask)
    assert {(one.kind, one.busy) for one in found} == {
        (kind, busy) for kind in KINDS for busy in (False, True)
    }
    assert all(one.ns for one in found)


def test_two_vcpus_do_not_do_the_work_twice() -> None:
    ask = PairAsk(size=64 * MIB, rounds=3)
    pairs = bench.pairs(Boot("nested", ()), Settings(timeout=300), ask, icount=True)
    assert max(done for done, _ in share_of_one(pairs, "halves")) < 1.1
    assert max(done for done, _ in share_of_one(pairs, "both all")) < 1.5
