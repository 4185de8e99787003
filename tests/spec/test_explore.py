# SPDX-License-Identifier: Apache-2.0
"""The explorer finds no violation in the spec, and each bug that is switched on."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import pytest

from prefault.spec import Faults
from prefault.spec.explore import Exploration, Explorer
from prefault.spec.races import RACES
from prefault.spec.steps import RwLock, Srcu, Violation, step, wait

QUICK = [
    "prefault-madvise",
    "prefault-fork",
    "prefault-cow",
    "prefault-delete",
    "prefault-log",
    "prefault-prefault",
    "prefault-read",
]


SOUND = Faults()


def explore(name: str, faults: Faults = SOUND, limit: int = 200_000) -> Exploration:
    return Explorer(lambda: RACES[name](faults), limit).explore()


@pytest.mark.parametrize("name", QUICK)
def test_no_order_of_a_race_violates_an_invariant(name: str) -> None:
    result = explore(name)
    assert result.found is None
    assert result.complete
    assert result.states > 30


@pytest.mark.parametrize("name", sorted(set(RACES) - set(QUICK)))
def test_no_order_of_a_large_race_violates_an_invariant_as_far_as_followed(name: str) -> None:
    assert explore(name, limit=10_000).found is None


@pytest.mark.parametrize(
    ("faults", "name", "violation"),
    [
        (Faults(no_sequence_check=True), "prefault-madvise", "taken back"),
        (Faults(no_sequence_check=True), "prefault-fork", "the host's page is not"),
        (Faults(no_sequence_check=True), "prefault-cow", "not what the host has"),
        (Faults(no_mmu_lock=True), "prefault-madvise", "taken back"),
        (Faults(no_mmu_lock=True), "prefault-cow", "not what the host has"),
        (Faults(no_srcu=True), "prefault-delete", "taken back"),
        (Faults(no_srcu=True), "prefault-log", "the log does not know"),
    ],
    ids=str,
)
def test_a_bug_that_is_switched_on_is_found_with_a_trace(faults: Faults, name: str, violation: str) -> None:
    result = explore(name, faults)
    assert result.found is not None
    assert violation in result.found.violation
    assert {actor for actor, _ in result.found.trace} >= {"pre-fault"}
    again = explore(name, faults)
    assert again.found == result.found


class Little:
    """A world of a few steps."""

    def __init__(self, **actors: Callable[[], object]) -> None:
        self.actors = dict(actors)
        self.quiet: frozenset[str] = frozenset()
        self.value = 0

    def state(self) -> Hashable:
        return self.value

    def check(self, *, done: bool) -> None:
        if done and self.value != 2:
            raise Violation(f"an increment was lost: {self.value}")


def _increment(world: Little) -> None:
    value = world.value
    step("add")
    world.value = value + 1


def _two_increments() -> Little:
    world = Little()
    world.actors = {"a": lambda: _increment(world), "b": lambda: _increment(world)}
    return world


def test_a_lost_update_is_found_with_the_fewest_switches() -> None:
    result = Explorer(_two_increments).explore()
    assert result.found is not None
    assert result.found.trace == (("a", "start"), ("b", "start"), ("b", "add"), ("a", "add"))


def _opposite_locks() -> Little:
    world = Little()
    left, right = RwLock("left"), RwLock("right")

    def take(first: RwLock, second: RwLock) -> None:
        first.write_lock()
        second.write_lock()

    world.actors = {"a": lambda: take(left, right), "b": lambda: take(right, left)}
    return world


def test_a_deadlock_is_found() -> None:
    result = Explorer(_opposite_locks).explore()
    assert result.found is not None
    assert "deadlock" in result.found.violation


def _spinner() -> Little:
    def spin() -> None:
        while True:
            step("again")

    return Little(a=spin, b=lambda: None)


def test_an_actor_that_never_ends_is_found() -> None:
    result = Explorer(_spinner).explore()
    assert result.found is not None
    assert "no progress" in result.found.violation


def test_the_limit_ends_the_exploration() -> None:
    assert not explore("prefault-madvise", limit=100).complete


def test_waiting_for_nobody_is_a_deadlock_when_nothing_explores() -> None:
    with pytest.raises(Violation, match="deadlock"):
        wait("a thing", lambda: False)
    srcu = Srcu("srcu")
    srcu.read_lock()
    with pytest.raises(Violation, match="deadlock"):
        srcu.synchronize()
