# SPDX-License-Identifier: Apache-2.0
"""The points where two things can interleave, and the locks that say where they may not.

The spec calls ``step`` before the kernel takes a lock, samples the sequence count, writes a descriptor,
or touches in any other way what others may touch at the same time; and ``mark`` where it gives
something back or has done something that nobody else can notice. Running alone both do nothing.
A scheduler that is installed gets control at each of them and can let another actor go first; it
also decides what happens where an actor has to wait. Without one, threads of Python take turns: each
holds LOCK while it is in the spec, and lets go of it only where it has to wait.

The rule that the explorer relies on (docs/decisions/0014): between two steps an actor touches shared
things at one place only, right after the step, under locks that it holds, or by giving back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from prefault.errors import Mismatch


class Violation(Mismatch):
    """An invariant of the spec does not hold: a bug in the spec, or one that was switched on."""


class Scheduler(Protocol):
    """Decides who goes on at a step."""

    def step(self, name: str) -> None:
        """The running actor is about to do ``name``; returns when it may go on."""

    def mark(self, name: str) -> None:
        """The same, but it makes no difference to anybody whether others go first."""

    @property
    def actor(self) -> int:
        """The number of the running actor."""

    def wait(self, name: str, ready: Callable[[], bool]) -> None:
        """The running actor waits until ``ready()``."""


LOCK = threading.Condition()
"""Held by the thread that is in the spec."""

_PATIENCE = 5.0
"""Seconds after which a thread that waits for others is taken to wait for ever."""
_POLL = 0.002

_scheduler: Scheduler | None = None


def install(scheduler: Scheduler | None) -> None:
    """Give control at steps to ``scheduler``, or to nobody."""
    global _scheduler
    _scheduler = scheduler


def exploring() -> bool:
    """Whether a scheduler is installed, so that no step may be left out for speed."""
    return _scheduler is not None


def actor() -> int:
    """Who runs; alone, that is 0."""
    return 0 if _scheduler is None else _scheduler.actor


def step(name: str) -> None:
    """Others may go first here."""
    if _scheduler is not None:
        _scheduler.step(name)


def mark(name: str) -> None:
    """It makes no difference whether others go first: something is given back, or only the actor's own."""
    if _scheduler is not None:
        _scheduler.mark(name)


def wait(name: str, ready: Callable[[], bool]) -> None:
    """Go on only when ``ready()``, which only another actor can bring about."""
    if _scheduler is not None:
        _scheduler.wait(name, ready)
    elif not ready():
        _wait_for_threads(name, ready)


def _wait_for_threads(name: str, ready: Callable[[], bool]) -> None:
    """Let other threads into the spec until ``ready()``."""
    deadline = time.monotonic() + _PATIENCE
    while not ready():
        if threading.active_count() == 1 or time.monotonic() > deadline:
            raise Violation(f"deadlock: {name} waits for something that nobody is left to do")
        LOCK.wait(_POLL)


class Resched:
    """A loop that ends only if somebody else goes on; alone, it must not be taken for ever."""

    _ALONE = 100

    def __init__(self, what: str) -> None:
        self._what = what
        self._tries = 0

    def cond_resched(self) -> None:
        """cond_resched()."""
        if _scheduler is not None:
            _scheduler.step("resched")
            return
        self._tries += 1
        others = threading.active_count() > 1
        if self._tries > (_PATIENCE / _POLL if others else self._ALONE):
            raise Violation(f"no progress: {self._what} is tried again and again, and nobody else runs")
        if others:
            LOCK.wait(_POLL)


class Sequence:
    """A count that is sampled, and asked later whether it has moved on."""

    def __init__(self) -> None:
        self.value = 0

    def sample(self) -> Sample:
        """What it is now."""
        return Sample(self, self.value)


class Sample:
    """What a sequence was. Only whether it still is that can make a difference to anybody."""

    __slots__ = ("_sequence", "_value")

    def __init__(self, sequence: Sequence, value: int) -> None:
        self._sequence = sequence
        self._value = value

    @property
    def stale(self) -> bool:
        """Whether the sequence has moved on."""
        return self._sequence.value != self._value


class RwLock:
    """A lock for one writer or many readers, such as kvm->mmu_lock.

    :ivar broken: if True, nobody is kept out; a fault that the explorer must find
    """

    def __init__(self, name: str) -> None:
        self.readers = 0
        self.writer = False
        self.broken = False
        self._read_lock, self._read_unlock = f"{name}.read_lock", f"{name}.read_unlock"
        self._write_lock, self._write_unlock = f"{name}.write_lock", f"{name}.write_unlock"

    def read_lock(self) -> None:
        """read_lock()."""
        if _scheduler is not None:
            _scheduler.step(self._read_lock)
        if self.writer and not self.broken:
            wait(self._read_lock, lambda: not self.writer)
        self.readers += 1

    def read_unlock(self) -> None:
        """read_unlock()."""
        if _scheduler is not None:
            self._before_unlock(self._read_unlock)
        self.readers -= 1

    def write_lock(self) -> None:
        """write_lock(), mutex_lock()."""
        step(self._write_lock)
        if (self.writer or self.readers) and not self.broken:
            wait(self._write_lock, lambda: not self.writer and not self.readers)
        self.writer = True

    def write_unlock(self) -> None:
        """write_unlock(), mutex_unlock()."""
        self._before_unlock(self._write_unlock)
        self.writer = False

    def _before_unlock(self, name: str) -> None:
        """What a lock that works protects is not to be seen before it is given back."""
        (step if self.broken else mark)(name)


class Srcu:
    """Sleepable RCU: who synchronizes waits for the readers that were there before.

    As in the kernel, readers are counted in one of two places, and whoever synchronizes sends new
    ones to the other. Only one may synchronize at a time: kvm->slots_lock sees to that.
    """

    def __init__(self, name: str) -> None:
        self.readers = [0, 0]
        self.index = 0
        self._read_lock, self._read_unlock = f"{name}.read_lock", f"{name}.read_unlock"
        self._synchronize = f"{name}.synchronize"

    def read_lock(self) -> int:
        """srcu_read_lock(); the result is for read_unlock."""
        if _scheduler is not None:
            _scheduler.step(self._read_lock)
        index = self.index
        self.readers[index] += 1
        return index

    def read_unlock(self, index: int) -> None:
        """srcu_read_unlock()."""
        if _scheduler is not None:
            mark(self._read_unlock)
        self.readers[index] -= 1

    def synchronize(self) -> None:
        """synchronize_srcu()."""
        step(self._synchronize)
        before, self.index = self.index, self.index ^ 1
        if self.readers[before]:
            wait(self._synchronize, lambda: not self.readers[before])
