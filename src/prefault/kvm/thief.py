# SPDX-License-Identifier: Apache-2.0
"""A CPU for one thread, and a process with a higher priority that takes it away from that one when told.

It takes two CPUs, and real-time priorities, which root has.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

from prefault.errors import CapabilityMissing, PrefaultError
from prefault.kvm import thief_main

_LOW, _HIGH = 1, 2
"""Real-time priorities: of the thread, and of who takes the CPU away from it."""


class Thief:
    """Keeps the thread that makes it off a CPU, for another thread to ``settle`` there, until it is closed.

    :raises CapabilityMissing: there is no second CPU, or this user has no real-time priorities
    """

    def __init__(self) -> None:
        self._cpus = os.sched_getaffinity(0)
        if len(self._cpus) < 2:
            raise CapabilityMissing("to take the CPU away from a thread takes two; boot the lab with two")
        self._cpu = max(self._cpus)
        os.sched_setaffinity(0, self._cpus - {self._cpu})
        descriptor = os.memfd_create("thief")
        os.ftruncate(descriptor, mmap.PAGESIZE)
        self._shared = mmap.mmap(descriptor, mmap.PAGESIZE)
        # Not a child of fork(2), which would take the leaves of private memory.
        self._process = subprocess.Popen(
            (sys.executable, "-S", thief_main.__file__, str(descriptor)),
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(descriptor,),
        )
        os.close(descriptor)
        assert self._process.stdin and self._process.stdout
        self._orders, self._answers = self._process.stdin, self._process.stdout
        try:
            os.sched_setaffinity(self._process.pid, {self._cpu})
            os.sched_setscheduler(self._process.pid, os.SCHED_FIFO, os.sched_param(_HIGH))
        except PermissionError as error:
            self.close()
            raise CapabilityMissing(
                f"to take the CPU away from a thread takes real-time priorities: {error}"
            ) from error

    def settle(self) -> None:
        """Put the calling thread onto the CPU, with a real-time priority, too."""
        os.sched_setaffinity(0, {self._cpu})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_LOW))

    def order(self, delay: float, patience: float) -> None:
        """Have the CPU taken in ``delay`` seconds, and left after ``patience`` seconds at the latest."""
        self._orders.write(thief_main.ORDER.pack(delay, patience))

    def wait(self) -> None:
        """Wait until it is taken."""
        if not self._answers.read(1):
            raise PrefaultError("the process that takes a CPU away ended; it needs Python as this one does")

    def has_cpu(self) -> bool:
        """Whether it is still taken."""
        return bool(self._shared[thief_main.HAS])

    def leave(self) -> None:
        """Have the CPU left."""
        self._shared[thief_main.LEAVE] = 1

    def close(self) -> None:
        """Leave all CPUs to all again. Safe to call again."""
        self._process.kill()
        with self._process:
            pass
        os.sched_setaffinity(0, self._cpus)
