# SPDX-License-Identifier: Apache-2.0
"""vCPUs that run, each on a thread of its own, until one of them has something to say."""

from __future__ import annotations

import ctypes
import enum
import os
import signal
import threading
from collections.abc import Callable, Sequence

from prefault.errors import PrefaultError
from prefault.kvm.vcpu import Bus, Vcpu
from prefault.machine import Exit, Interrupted

KICK = signal.SIGUSR1
"""Sent to a vCPU's thread to get it out of the guest. SIGUSR2 is the user's."""
_PATIENCE = 0.02
STOP_SECONDS = 60.0
"""A vCPU leaves the guest in microseconds; on a busy host, and under emulation, it may take longer."""


_libc = ctypes.CDLL(None)


class _Wanted(enum.Enum):
    RUN = enum.auto()
    PAUSE = enum.auto()
    STOP = enum.auto()


class Runner:
    """The threads.

    :param on_exit: told the vCPU and its exit, or what was raised, from that vCPU's thread; the thread ends
    """

    def __init__(
        self, vcpus: Sequence[Vcpu], bus: Bus, on_exit: Callable[[int, Exit | BaseException], None]
    ) -> None:
        self._vcpus = vcpus
        self._bus = bus
        self._on_exit = on_exit
        self._condition = threading.Condition()
        self._wanted = _Wanted.RUN
        self._resting = 0
        """Threads that are out of KVM_RUN and stay so, or have ended."""
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Let them run. From the main thread, the only one that can put a handler in a signal's way."""
        signal.signal(KICK, lambda number, frame: None)
        for number in range(len(self._vcpus)):
            thread = threading.Thread(target=self._run, args=(number,), name=f"vcpu{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def pause(self) -> None:
        """Return when no vCPU is in KVM_RUN, and none has an exit pending."""
        self._demand(_Wanted.PAUSE)

    def resume(self) -> None:
        """Go on after ``pause``."""
        with self._condition:
            self._wanted = _Wanted.RUN
            self._condition.notify_all()

    def halt(self) -> None:
        """Let no vCPU into the guest any more, without waiting for those that cannot leave KVM_RUN yet."""
        with self._condition:
            self._want(_Wanted.STOP)
            self._signal()

    def stop(self) -> None:
        """End all threads. Safe to call again."""
        if not self._threads:
            return
        self._demand(_Wanted.STOP)
        while self._threads:
            self._threads.pop().join()

    def _demand(self, wanted: _Wanted) -> None:
        with self._condition:
            self._want(wanted)
            for _ in range(int(STOP_SECONDS / _PATIENCE)):
                self._signal()
                if self._condition.wait_for(lambda: self._resting == len(self._threads), _PATIENCE):
                    return
        raise PrefaultError(f"a vCPU did not leave the guest within {STOP_SECONDS:.0f} s: see the host's log")

    def _want(self, wanted: _Wanted) -> None:
        self._wanted = wanted
        self._condition.notify_all()
        for vcpu in self._vcpus[: len(self._threads)]:
            vcpu.kick()

    def _signal(self) -> None:
        for thread in self._threads:
            if thread.native_id:
                # Not pthread_kill, which must not be called for a thread that has just ended.
                _libc.tgkill(os.getpid(), thread.native_id, int(KICK))

    def _run(self, number: int) -> None:
        vcpu = self._vcpus[number]
        try:
            while self._may_run(vcpu):
                exit_ = vcpu.run_with(self._bus)
                if not isinstance(exit_, Interrupted):
                    self._on_exit(number, exit_)
                    break
        except BaseException as error:
            self._on_exit(number, error)
        finally:
            with self._condition:
                self._resting += 1
                self._condition.notify_all()

    def _may_run(self, vcpu: Vcpu) -> bool:
        """Wait while there is a pause; whether to go on."""
        with self._condition:
            # Also if it is RUN by now: who came too late for a pause that was given up has been kicked.
            if self._demanded() is _Wanted.PAUSE:
                self._resting += 1
                self._condition.notify_all()
                self._condition.wait_for(lambda: self._wanted is not _Wanted.PAUSE)
                self._resting -= 1
            if self._demanded() is _Wanted.RUN:
                vcpu.settle()
                return True
            return False

    def _demanded(self) -> _Wanted:
        """What is wanted now; another thread may change it at any time."""
        return self._wanted
