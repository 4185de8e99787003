# SPDX-License-Identifier: Apache-2.0
"""The points where two things can interleave, and the locks that say where they may not.

The spec calls ``step`` where the kernel takes or drops a lock, samples or checks the sequence
count, writes a descriptor, pins or releases a page. Running alone that does nothing. A scheduler
that is installed gets control at each step and can let another actor go first; it also decides
what happens where an actor has to wait. Threads of Python take turns: each holds LOCK while it is
in the spec, and lets go of it only where it has to wait.
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
        """The running actor is at the step ``name``; returns when it may go on."""

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


def step(name: str) -> None:
    """Others may go first here."""
    if _scheduler is not None:
        _scheduler.step(name)


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

    _PATIENCE = 100

    def __init__(self, what: str) -> None:
        self._what = what
        self._tries = 0

    def cond_resched(self) -> None:
        """cond_resched()."""
        if _scheduler is not None:
            _scheduler.step("resched")
            return
        self._tries += 1
        if self._tries > self._PATIENCE:
            raise Violation(f"no progress: {self._what} is tried again and again, and nobody else runs")


class RwLock:
    """A lock for one writer or many readers, such as kvm->mmu_lock.

    :ivar broken: if True, nobody is kept out; a fault that the explorer must find
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.readers = 0
        self.writer = False
        self.broken = False

    def read_lock(self) -> None:
        """read_lock()."""
        if _scheduler is not None:
            _scheduler.step(f"{self.name}.read_lock")
        if self.writer and not self.broken:
            wait(f"{self.name}.read_lock", lambda: not self.writer)
        self.readers += 1

    def read_unlock(self) -> None:
        """read_unlock()."""
        self.readers -= 1
        if _scheduler is not None:
            _scheduler.step(f"{self.name}.read_unlock")

    def write_lock(self) -> None:
        """write_lock()."""
        step(f"{self.name}.write_lock")
        if (self.writer or self.readers) and not self.broken:
            wait(f"{self.name}.write_lock", lambda: not self.writer and not self.readers)
        self.writer = True

    def write_unlock(self) -> None:
        """write_unlock()."""
        self.writer = False
        step(f"{self.name}.write_unlock")


class Srcu:
    """Sleepable RCU: who synchronizes waits for the readers that were there before."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._next = 0
        self._active: set[int] = set()

    @property
    def active(self) -> frozenset[int]:
        """The readers that there are."""
        return frozenset(self._active)

    def read_lock(self) -> int:
        """srcu_read_lock(); the result is for read_unlock."""
        if _scheduler is not None:
            _scheduler.step(f"{self.name}.read_lock")
        self._next += 1
        self._active.add(self._next)
        return self._next

    def read_unlock(self, token: int) -> None:
        """srcu_read_unlock()."""
        self._active.discard(token)
        if _scheduler is not None:
            _scheduler.step(f"{self.name}.read_unlock")

    def synchronize(self) -> None:
        """synchronize_srcu()."""
        step(f"{self.name}.synchronize")
        before = set(self._active)
        if before:
            wait(f"{self.name}.synchronize", lambda: not before & self._active)
