# SPDX-License-Identifier: Apache-2.0
"""Pre-faults whose CPU is taken away at any moment, for something else to happen in the meantime.

The call runs in a thread with a low real-time priority on a CPU of its own, and another process with a higher
one wakes there a little later. Where the kernel may be preempted, it is; where it may not, as soon as it may:
after a lock that it held, above all. It takes a preemptible kernel, two CPUs, and real-time priorities, which
root has.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from prefault.errors import CapabilityMissing
from prefault.kvm import thief
from prefault.machine import Vcpu

_LOW, _HIGH = 1, 2
"""Real-time priorities."""
_LONGEST = 2e-2
"""Seconds from the order to the moment, at most."""
_EVENLY = 0.618
"""Multiples of this, modulo 1, come everywhere in [0, 1)."""


class Preemption:
    """Takes the CPU away from pre-faults until it is closed.

    :raises CapabilityMissing: it cannot be done on this machine
    """

    def __init__(self) -> None:
        self._cpus = os.sched_getaffinity(0)
        if len(self._cpus) < 2:
            raise CapabilityMissing("to take the CPU away from a call takes two; boot the lab with two")
        self._cpu = max(self._cpus)
        self._turn, self._aim = 0, 2e-4
        self._begun = self._over = False
        os.sched_setaffinity(0, self._cpus - {self._cpu})
        self._thief = _Thief(self._cpu)

    def pre_fault(self, vcpu: Vcpu, gpa: int, size: int, meanwhile: Callable[[], None]) -> None:
        """Pre-fault a range up to its end or an error, and call ``meanwhile`` at some moment of that."""
        self._turn += 1
        self._begun = self._over = False
        delay = self._aim * (0.75 + self._turn * _EVENLY % 0.5)
        caller = threading.Thread(target=self._call, args=(vcpu, gpa, size, delay))
        caller.start()
        self._thief.wait()
        # How long it takes from the order to the call, and how long that is, each machine has to show. Most
        # moments are to be before its end.
        self._aim = min(self._aim * (0.9 if self._over else 1.02 if self._begun else 1.1), _LONGEST)
        try:
            meanwhile()
        finally:
            self._thief.release()
            caller.join()

    def _call(self, vcpu: Vcpu, gpa: int, size: int, delay: float) -> None:
        os.sched_setaffinity(0, {self._cpu})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_LOW))
        self._thief.order(delay)
        self._begun = True
        while size:
            progress = vcpu.pre_fault_memory_once(gpa, size)
            if progress.errno:
                break
            gpa, size = progress.gpa, progress.size
        self._over = True

    def close(self) -> None:
        """Leave all CPUs to all again. Safe to call again."""
        self._thief.close()
        os.sched_setaffinity(0, self._cpus)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Thief:
    """The other process."""

    def __init__(self, cpu: int) -> None:
        descriptor = os.memfd_create("thief")
        os.ftruncate(descriptor, mmap.PAGESIZE)
        self._shared = mmap.mmap(descriptor, mmap.PAGESIZE)
        # Not a child of fork(2), which would take the leaves of private memory.
        self._process = subprocess.Popen(
            (sys.executable, "-S", thief.__file__, str(descriptor)),
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(descriptor,),
        )
        os.close(descriptor)
        assert self._process.stdin and self._process.stdout
        self._orders, self._answers = self._process.stdin, self._process.stdout
        try:
            os.sched_setaffinity(self._process.pid, {cpu})
            os.sched_setscheduler(self._process.pid, os.SCHED_FIFO, os.sched_param(_HIGH))
        except PermissionError as error:
            self.close()
            raise CapabilityMissing(
                f"to take the CPU away from a call takes real-time priorities: {error}"
            ) from error

    def order(self, delay: float) -> None:
        """Have it take its CPU after ``delay`` seconds."""
        self._orders.write(thief.ORDER.pack(delay))

    def wait(self) -> None:
        """Wait until it has the CPU."""
        if not self._answers.read(1):
            raise CapabilityMissing("the process that takes CPUs ended; it needs Python as this one does")

    def release(self) -> None:
        """Have it leave the CPU."""
        self._shared[0] = 1

    def close(self) -> None:
        """End it. Safe to call again."""
        self._process.kill()
        with self._process:
            pass
