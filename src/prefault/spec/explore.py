# SPDX-License-Identifier: Apache-2.0
"""Runs two or three actors in every order that their steps allow, and checks what must hold.

An actor is ordinary code of the spec, in a greenlet that is switched away from at steps. An order is
followed from the beginning each time. Where two or more actors could go on, the state is looked up:
it is the world's (``World.state``) and, for each actor, where it is in its code and the plain values of
its local variables. A state that was seen before is not followed again. Orders with fewer switches
between actors come first, so that the first violation found is one with as few as possible.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from greenlet import greenlet

from prefault.spec import steps
from prefault.spec.memory import Table
from prefault.spec.steps import Violation

_PLAIN = (int, str, bytes, type(None), frozenset)


class World(Protocol):
    """A small program to explore. One object is made for each order."""

    actors: dict[str, Callable[[], object]]
    """By name; each is run once."""

    def state(self) -> Hashable:
        """All that is shared and can differ."""

    def check(self, *, done: bool) -> None:
        """The invariants; ``done`` if every actor has ended.

        :raises Violation: one does not hold
        """


@dataclass(frozen=True)
class Found:
    """A violation and the shortest way to it that was found: (actor, step it was at) in order."""

    violation: str
    trace: tuple[tuple[str, str], ...]


@dataclass
class Exploration:
    """What was seen.

    :ivar states: states in which more than one actor could go on
    :ivar orders: how many orders were followed, some only up to a state that was known
    :ivar complete: False if the limit on steps came first
    """

    states: int = 0
    steps: int = 0
    orders: int = 0
    complete: bool = True
    found: Found | None = None


@dataclass
class _Actor:
    name: str
    let: greenlet
    at: str = "start"
    ready: Callable[[], bool] | None = None

    @property
    def enabled(self) -> bool:
        return not self.let.dead and (self.ready is None or self.ready())


class _Run:
    """One world and its actors: the scheduler that is installed while it runs."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.actors = [_Actor(name, greenlet(function)) for name, function in world.actors.items()]
        self.running: _Actor | None = None
        self.trace: list[tuple[str, str]] = []

    def step(self, name: str) -> None:
        """An actor has come to a step: give control back to the explorer."""
        self._stop(name, None)

    def wait(self, name: str, ready: Callable[[], bool]) -> None:
        """An actor cannot go on by itself."""
        while not ready():
            self._stop(name, ready)

    def _stop(self, name: str, ready: Callable[[], bool] | None) -> None:
        actor = self.running
        if actor is None:
            return  # Setting up, or checking.
        actor.at, actor.ready = name, ready
        actor.let.parent.switch()  # type: ignore[union-attr]  # an actor has a parent
        actor.ready = None

    def advance(self, actor: _Actor) -> None:
        """Let an actor go on up to its next step."""
        self.trace.append((actor.name, actor.at))
        self.running = actor
        try:
            actor.let.switch()
        finally:
            self.running = None
        if actor.let.dead:
            actor.at = "end"

    def state(self) -> Hashable:
        """The world, and where each actor is."""
        return self.world.state(), tuple(_position(actor) for actor in self.actors)

    def abandon(self) -> None:
        """End all actors where they are."""
        for actor in self.actors:
            if not actor.let.dead and actor.let.gr_frame is not None:
                actor.let.throw()


def _position(actor: _Actor) -> Hashable:
    """Where an actor is in its code, with the values that it has at hand."""
    if actor.let.dead:
        return None
    found: list[Hashable] = [actor.at]
    frame: FrameType | None = actor.let.gr_frame
    while frame is not None:
        # The frames of the step itself, in this file, say nothing more.
        if frame.f_code.co_filename != __file__:
            found += (frame.f_code.co_name, frame.f_lasti)
            found += [value for value in map(_plain, frame.f_locals.values()) if value is not None]
        frame = frame.f_back
    return tuple(found)


def _plain(value: object) -> Hashable:
    """What of a local variable makes two states differ; None if nothing does."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Table):
        return value.refs  # Which of the free pages it was does not matter.
    if isinstance(value, set):
        return frozenset(value)
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if hasattr(value, "__slots__"):
        return tuple(_plain(getattr(value, name, None)) for name in value.__slots__)
    return None


@dataclass
class Explorer:
    """Explores the world that ``make`` makes.

    :ivar limit: end after so many steps
    """

    make: Callable[[], World]
    limit: int = 1_000_000
    _seen: set[int] = field(default_factory=set)
    _work: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)
    _result: Exploration = field(default_factory=Exploration)
    _count: itertools.count[int] = field(default_factory=itertools.count)

    def explore(self) -> Exploration:
        """Follow every order, or up to the first violation."""
        self._work = [(0, next(self._count), ())]
        result = self._result
        while self._work and result.found is None:
            if result.steps >= self.limit:
                result.complete = False
                break
            switches, _, choices = heapq.heappop(self._work)
            self._follow(choices, switches)
        result.states = len(self._seen)
        return result

    def _follow(self, choices: Sequence[int], switches: int) -> None:
        """Follow an order: first as ``choices`` say, then without switching unless one must."""
        steps.install(None)
        run = _Run(self.make())
        steps.install(run)
        self._result.orders += 1
        try:
            self._drive(run, list(choices), switches)
        except Violation as violation:
            self._result.found = Found(str(violation), tuple(run.trace))
        finally:
            steps.install(None)
            run.abandon()

    def _drive(self, run: _Run, made: list[int], switches: int) -> None:
        replay = iter(tuple(made))
        current: int | None = None
        here: set[int] = set()
        while True:
            enabled = [number for number, actor in enumerate(run.actors) if actor.enabled]
            if not enabled:
                self._end(run)
                return
            choice = next(replay, None) if len(enabled) > 1 else enabled[0]
            if choice is None:
                key = hash(run.state())
                if key in self._seen:
                    return
                self._seen.add(key)
                choice = self._branch(enabled, current, made, switches)
                made.append(choice)
            elif len(enabled) == 1:
                self._progress(run, here)
            current = choice
            run.advance(run.actors[choice])
            self._result.steps += 1
            run.world.check(done=False)

    def _branch(self, enabled: list[int], current: int | None, made: list[int], switches: int) -> int:
        """Go on with the same actor; leave the others for later."""
        first = current if current in enabled else enabled[0]
        assert first is not None
        for other in enabled:
            if other != first:
                more = switches + (current in enabled)
                heapq.heappush(self._work, (more, next(self._count), (*made, other)))
        return first

    def _progress(self, run: _Run, here: set[int]) -> None:
        """An actor that is the only one to go on must not come back to where it was."""
        key = hash(run.state())
        if key in here:
            raise Violation("no progress: the only actor that can go on comes back to the same state")
        here.add(key)

    def _end(self, run: _Run) -> None:
        waiting = [f"{actor.name} in {actor.at}" for actor in run.actors if not actor.let.dead]
        if waiting:
            raise Violation(f"deadlock: {', '.join(waiting)}")
        run.world.check(done=True)
