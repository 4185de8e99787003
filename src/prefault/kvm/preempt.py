# SPDX-License-Identifier: Apache-2.0
"""Calls whose CPU is taken away at any moment, for something else to happen in the meantime.

The call runs on a CPU of its own, and another process with a higher priority wakes there a little later
(thief.py). Where the kernel may be preempted, it is; where it may not, as soon as it may: after a lock that
it held, above all. It takes a preemptible kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from prefault.closing import Closing
from prefault.kvm.thief import Thief

_LONGEST = 2e-2
"""Seconds from the order to the moment, at most."""
_PATIENCE = 0.02
"""Seconds, should what happens in the meantime wait for the call."""
_EVENLY = 0.618
"""Multiples of this, modulo 1, come everywhere in [0, 1)."""


class Preemption(Closing):
    """Takes the CPU away from calls until it is closed.

    :raises CapabilityMissing: it cannot be done on this machine
    """

    def __init__(self) -> None:
        self._thief = Thief()
        self._turn, self._aim = 0, 2e-4
        self._begun = self._over = False

    def run(self, call: Callable[[], object], meanwhile: Callable[[], None]) -> None:
        """Make a call, and another, ``meanwhile``, at some moment of it."""
        self._turn += 1
        self._begun = self._over = False
        delay = self._aim * (0.75 + self._turn * _EVENLY % 0.5)
        caller = threading.Thread(target=self._make, args=(call, delay))
        caller.start()
        self._thief.wait()
        # How long it takes from the order to the call, and how long that is, each machine has to show. Most
        # moments are to be before its end.
        self._aim = min(self._aim * (0.9 if self._over else 1.02 if self._begun else 1.1), _LONGEST)
        try:
            meanwhile()
        finally:
            self._thief.leave()
            caller.join()

    def _make(self, call: Callable[[], object], delay: float) -> None:
        self._thief.settle()
        self._thief.order(delay, _PATIENCE)
        self._begun = True
        call()
        self._over = True

    def close(self) -> None:
        """Leave all CPUs to all again."""
        self._thief.close()
