# SPDX-License-Identifier: Apache-2.0
"""Runs two or three actors in every order that their steps allow, and checks what must hold.

An actor is ordinary code of the spec, in a greenlet that is switched away from at steps. An order is
followed from the beginning each time. Where two or more actors could go on, the state is looked up:
it is the world's (``World.state``) and, for each actor, where it is in its code and the plain values of
its local variables. A state that was seen before is not followed again. Orders with fewer switches
between actors come first, so that the first violation found is one with as few as possible.

Orders that cannot differ are not told apart: nobody is let go first at a mark, nor at a step that a
world calls quiet (docs/decisions/0014). ``Explorer.reduce`` switches that off.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from greenlet import getcurrent, greenlet

from prefault.spec import steps
from prefault.spec.faults import FaultDesc, VmaInfo
from prefault.spec.liveness import place
from prefault.spec.memory import Table
from prefault.spec.nested import S2Translation, S2WalkFault
from prefault.spec.state import Slot
from prefault.spec.steps import Sample, Violation

_PLAIN = (int, str, bytes, type(None), frozenset)
_LOCAL = (FaultDesc, VmaInfo, Slot, S2Translation, S2WalkFault)
"""Objects that belong to one actor, or never change."""
_END = 0
"""Stands for the state in which all actors have ended, and for the one before all others."""
_PATIENCE = 32
"""Steps after which an actor that is alone is looked at: it must not come back to where it was."""


class World(Protocol):
    """A small program to explore. One object is made for each order."""

    actors: dict[str, Callable[[], object]]
    """By name; each is run once."""
    quiet: frozenset[str]
    """Steps before something that no two actors of this world share."""

    def state(self) -> Hashable:
        """All that is shared and can differ."""

    def check(self, *, done: bool) -> None:
        """The invariants; ``done`` if every actor has ended.

        :raises Violation: one does not hold
        """


@dataclass(frozen=True)
class Found:
    """A violation and the way to it with the fewest switches.

    :ivar trace: (actor, what it does) in order
    """

    violation: str
    trace: tuple[tuple[str, str], ...]


@dataclass
class Exploration:
    """What was seen.

    :ivar states: states in which more than one actor could go on
    :ivar steps: steps that were taken, those that lead to a known state again included
    :ivar orders: how many orders were followed, some only up to a state that was known
    :ivar complete: every order was followed; False if the limit on steps came first
    """

    states: int = 0
    steps: int = 0
    orders: int = 0
    complete: bool = False
    found: Found | None = None


@dataclass(slots=True)
class _Actor:
    name: str
    number: int
    let: greenlet
    at: str = "start"
    ready: Callable[[], bool] | None = None
    position: Hashable = None
    samples: list[Sample] = field(default_factory=list)

    @property
    def enabled(self) -> bool:
        return not self.let.dead and (self.ready is None or self.ready())


class _Run:
    """One world and its actors: the scheduler that is installed while it runs.

    :ivar actor: number of the actor that runs; outside of actors 0, as for the spec that runs alone
    :ivar trace: what was done, if that is wanted
    """

    def __init__(self, world: World, *, reduce: bool) -> None:
        self.world = world
        hub = getcurrent()
        self._switch = hub.switch
        self.actors = [
            _Actor(name, number, greenlet(function, hub))
            for number, (name, function) in enumerate(world.actors.items())
        ]
        self.actor = 0
        self.trace: list[tuple[str, str]] | None = None
        self._reduce = reduce
        self._quiet = world.quiet if reduce else frozenset()
        self._running: _Actor | None = None

    def step(self, name: str) -> None:
        """An actor has come to a step: give control back to the explorer."""
        actor = self._running
        if actor is None:
            return  # Setting up, or checking.
        if name not in self._quiet:
            actor.at = name
            self._switch()
        if self.trace is not None:
            self.trace.append((actor.name, name))

    def mark(self, name: str) -> None:
        """An actor goes by a mark."""
        if not self._reduce:
            self.step(name)
        elif self.trace is not None and self._running is not None:
            self.trace.append((self._running.name, name))

    def wait(self, name: str, ready: Callable[[], bool]) -> None:
        """An actor cannot go on by itself."""
        actor = self._running
        assert actor is not None
        while not ready():
            if name in self._quiet:
                raise AssertionError(f"{name} is waited for, but is said to be quiet")
            actor.at, actor.ready = name, ready
            if self.trace is not None:
                self.trace.append((actor.name, f"waits for {name}"))
            self._switch()
            actor.ready = None

    def advance(self, number: int) -> None:
        """Let an actor go on up to its next step."""
        actor = self._running = self.actors[number]
        self.actor = number + 1
        if self.trace is not None and actor.at == "start":
            self.trace.append((actor.name, "start"))
        try:
            actor.let.switch()
        finally:
            self._running = None
            self.actor = 0
        actor.position = None

    def enabled(self) -> list[int]:
        """The actors that can go on."""
        return [actor.number for actor in self.actors if actor.enabled]

    def state(self) -> int:
        """The world, and where each actor is."""
        for actor in self.actors:
            if actor.position is None:
                actor.samples.clear()
                actor.position = _position(actor, actor.samples)
        positions = [(actor.position, *[one.stale for one in actor.samples]) for actor in self.actors]
        return hash((self.world.state(), tuple(positions)))

    def stuck(self) -> str:
        """Who waits, and for what; empty if all have ended."""
        return ", ".join(f"{actor.name} in {actor.at}" for actor in self.actors if not actor.let.dead)

    def abandon(self) -> None:
        """End all actors where they are."""
        for actor in self.actors:
            if not actor.let.dead and actor.let.gr_frame is not None:
                actor.let.throw()


def _position(actor: _Actor, samples: list[Sample]) -> Hashable:
    """Where an actor is in its code, with the values that it has at hand; samples are put aside."""
    if actor.let.dead:
        return "end"
    found: list[Hashable] = [actor.at]
    frame: FrameType | None = actor.let.gr_frame
    while frame is not None:
        # The frames of the step itself, in this file, say nothing more.
        code = frame.f_code
        if code.co_filename != __file__:
            offset, live = place(code, frame.f_lasti)
            found.append((code.co_qualname, offset))
            found += [
                (name, _plain(value, samples)) for name, value in frame.f_locals.items() if name in live
            ]
        frame = frame.f_back
    return tuple(found)


def _plain(value: object, samples: list[Sample]) -> Hashable:
    """What of a local variable makes two states differ; None if nothing does."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Table):
        return value.pa
    if isinstance(value, Sample):
        samples.append(value)
    elif isinstance(value, tuple):
        return tuple([_plain(one, samples) for one in value])
    elif isinstance(value, _LOCAL):
        return tuple([_plain(getattr(value, name), samples) for name in value.__slots__])
    return None


@dataclass
class Explorer:
    """Explores the world that ``make`` makes.

    :ivar limit: end after so many steps
    :ivar reduce: tell only orders apart that can differ
    :ivar tell: called now and then with what was seen so far
    """

    make: Callable[[], World]
    limit: int = 10_000_000
    reduce: bool = True
    tell: Callable[[Exploration], object] | None = None
    _work: list[tuple[int, int, bytes, int]] = field(default_factory=list)
    """Switches, a number that breaks ties, an order to follow, the state before its last step."""
    _count: itertools.count[int] = field(default_factory=itertools.count)
    _result: Exploration = field(default_factory=Exploration)
    _first: dict[int, bytes] = field(default_factory=dict)
    """State → the order that came to it first."""
    _before: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """State → the states that come right before it."""

    def explore(self) -> Exploration:
        """Follow every order, or up to the first violation."""
        result = self._result
        self._work = [(0, next(self._count), b"", _END)]
        while self._work and result.found is None and result.steps < self.limit:
            self._follow(*heapq.heappop(self._work))
            if self.tell and result.orders % 256 == 0:
                self.tell(result)
        if not self._work and result.found is None:
            result.complete = True
            self._check_progress()
        return result

    @contextlib.contextmanager
    def _run(self) -> Iterator[_Run]:
        """A new world, in which the explorer has control."""
        run = _Run(self.make(), reduce=self.reduce)
        steps.install(run)
        try:
            yield run
        finally:
            steps.install(None)
            run.abandon()

    def _follow(self, switches: int, _: int, order: bytes, before: int) -> None:
        """Follow an order: first as it says, then without switching unless one must."""
        made = bytearray(order)
        self._result.orders += 1
        try:
            with self._run() as run:
                # All steps but the last were checked when they were first taken.
                for number in order:
                    run.advance(number)
                self._result.steps += len(order)
                run.world.check(done=False)
                self._drive(run, made, switches, before)
        except Violation as violation:
            self._found(str(violation), bytes(made))

    def _drive(self, run: _Run, made: bytearray, switches: int, before: int) -> None:
        alone: list[int] = []
        while enabled := run.enabled():
            number = enabled[0]
            if len(enabled) > 1:
                alone.clear()
                state = run.state()
                self._before[state].add(before)
                if state in self._first:
                    return
                before = state
                number = self._branch(state, enabled, made, switches)
            else:
                alone.append(run.state() if len(alone) > _PATIENCE else -len(alone))
                if alone[-1] in alone[:-1]:
                    raise Violation(f"no progress: {run.actors[number].name} is alone and goes on for ever")
            made.append(number)
            run.advance(number)
            self._result.steps += 1
            run.world.check(done=False)
        self._before[_END].add(before)
        if stuck := run.stuck():
            raise Violation(f"deadlock: {stuck}")
        run.world.check(done=True)

    def _branch(self, state: int, enabled: list[int], made: bytearray, switches: int) -> int:
        """Go on with the same actor; leave the others for later."""
        self._first[state] = order = bytes(made)
        self._result.states += 1
        current = made[-1] if made else None
        first = current if current in enabled else enabled[0]
        assert first is not None
        for other in enabled:
            if other != first:
                more = switches + (current in enabled)
                heapq.heappush(self._work, (more, next(self._count), order + bytes([other]), state))
        return first

    def _check_progress(self) -> None:
        """From every state, some order comes to an end."""
        ends, work = {_END}, [_END]
        while work:
            new = self._before[work.pop()] - ends
            ends |= new
            work += new
        endless = self._first.keys() - ends
        if endless:
            order = min((self._first[state] for state in endless), key=len)
            self._found("no progress: from here on, no order of the actors comes to an end", order)

    def _found(self, violation: str, order: bytes) -> None:
        """Follow an order again, and note what is done."""
        with self._run() as run:
            run.trace = []
            with contextlib.suppress(Violation):
                for number in order:
                    run.advance(number)
            self._result.found = Found(violation, tuple(run.trace))
