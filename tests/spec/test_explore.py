# SPDX-License-Identifier: Apache-2.0
"""The explorer finds no violation in the spec, and each bug that is switched on."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Hashable

import pytest

from prefault.spec import Faults
from prefault.spec.explore import Exploration, Explorer
from prefault.spec.races import FAULTS, RACES, world
from prefault.spec.steps import RwLock, Srcu, Violation, step, wait
from prefault.spec.userfault import Context
from prefault.spec.world import Race, RaceWorld

LARGE = {"prefault-write-fork", "prefault-write-madvise", "prefault-write-start-log", "prefault-l2-madvise"}
"""Over 2,000 states: `prefault explore` follows all of their orders, the tests only some."""
QUICK = ("prefault-madvise", "prefault-write", "prefault-delete", "prefault-start-log")
SOUND = Faults()


def explore(
    name: str, faults: Faults = SOUND, limit: int = 10_000_000, *, reduce: bool = True
) -> Exploration:
    return Explorer(world(name, faults), limit, reduce).explore()


def switched_on(*names: str) -> Faults:
    return dataclasses.replace(SOUND, **dict.fromkeys(names, True))


KNOWN = {name for name, race in RACES.items() if race.known}


@pytest.mark.parametrize("name", sorted(set(RACES) - LARGE - KNOWN))
def test_no_order_of_a_race_violates_an_invariant(name: str) -> None:
    result = explore(name)
    assert result.found is None
    assert result.complete
    assert result.states > 10


@pytest.mark.parametrize("name", sorted(LARGE))
def test_no_order_of_a_large_race_violates_an_invariant_as_far_as_followed(name: str) -> None:
    result = explore(name, limit=20_000)
    assert result.found is None
    assert not result.complete


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_what_is_known_to_be_wrong_in_linux_is_found(name: str) -> None:
    assert explore(name).found is not None


def test_every_bug_that_can_be_switched_on_is_found_by_a_race() -> None:
    assert set(FAULTS) == {field.name for field in dataclasses.fields(Faults)}
    assert set(FAULTS.values()) <= set(RACES)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bug_that_is_switched_on_is_found_with_a_trace(fault: str) -> None:
    result = explore(FAULTS[fault], switched_on(fault))
    assert result.found is not None
    assert {actor for actor, _ in result.found.trace} & {"pre-fault", "pre-fault-in-l2"}
    assert explore(FAULTS[fault], switched_on(fault)).found == result.found


@pytest.mark.parametrize(
    ("fault", "name", "violation"),
    [
        ("no_sequence_check", "prefault-madvise", "taken back"),
        ("no_sequence_check", "prefault-fork", "the host's page is not"),
        ("no_sequence_check", "prefault-cow", "not what the host has"),
        ("no_mmu_lock", "prefault-madvise", "taken back"),
        ("no_srcu_wait", "prefault-delete", "taken back"),
        ("no_srcu_wait", "prefault-start-log", "the log does not know"),
        ("no_srcu_wait", "prefault-move", "memslot is not there"),
        ("wait_under_srcu", "prefault-delete", "no progress"),
        ("page_leaked", "prefault-madvise", "still pinned"),
        ("past_range", "prefault-thp-madvise", "left -0x"),
    ],
)
def test_a_bug_is_called_by_what_it_breaks(fault: str, name: str, violation: str) -> None:
    result = explore(name, switched_on(fault))
    assert result.found is not None
    assert violation in result.found.violation


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize(
    "faults",
    [
        (),
        ("no_sequence_check",),
        ("sequence_after_pin",),
        ("lock_dropped",),
        ("no_srcu_wait",),
        ("page_leaked",),
    ],
    ids=lambda faults: "".join(faults) or "sound",
)
def test_orders_that_are_not_told_apart_lose_no_verdict(name: str, faults: tuple[str, ...]) -> None:
    some, all_ = (explore(name, switched_on(*faults), reduce=reduce) for reduce in (True, False))
    assert (some.found is None) == (all_.found is None)
    assert some.complete == all_.complete
    if some.complete:
        assert some.states < all_.states


def test_a_wake_up_that_is_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "_must_wait", lambda *_: True)
    result = explore("prefault-read-userfault")
    assert result.found is not None
    assert "no progress" in result.found.violation


def test_a_world_cannot_call_memslots_quiet_that_change() -> None:
    def make() -> RaceWorld:
        made = RaceWorld(Race("", ("pre_fault", "delete")), SOUND)
        made.quiet = frozenset({"slots.lookup"})
        return made

    with pytest.raises(AssertionError, match="memslots changed"):
        Explorer(make).explore()


def test_pre_faulting_is_told_only_of_a_memslot_that_goes_away() -> None:
    seen: set[int] = set()

    class Watched(RaceWorld):
        def check(self, *, done: bool) -> None:
            super().check(done=done)
            seen.update(self.errors)

    Explorer(lambda: Watched(RACES["prefault-delete"], SOUND)).explore()
    assert seen == {0, errno.EAGAIN, errno.ENOENT}


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


def test_two_actors_that_wait_for_each_other_without_a_lock_are_found() -> None:
    def spin(world: Little, mine: int) -> None:
        while world.value != mine:
            step("again")

    def make() -> Little:
        world = Little()
        world.actors = {"a": lambda: spin(world, 1), "b": lambda: spin(world, 2)}
        return world

    result = Explorer(make).explore()
    assert result.found is not None
    assert "no order of the actors comes to an end" in result.found.violation


def test_waiting_for_nobody_is_a_deadlock_when_nothing_explores() -> None:
    with pytest.raises(Violation, match="deadlock"):
        wait("a thing", lambda: False)
    srcu = Srcu("srcu")
    srcu.read_lock()
    with pytest.raises(Violation, match="deadlock"):
        srcu.synchronize()
