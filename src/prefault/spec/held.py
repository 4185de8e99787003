# SPDX-License-Identifier: Apache-2.0
"""Invalidations of the VMM's memory that last as long as they are wanted, or that come at some moment."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from prefault.closing import Closing
from prefault.spec.state import Host
from prefault.spec.steps import LOCK


class SpecHeld(Closing):
    """MADV_DONTNEED of a range of private memory that is in its middle from the start, until ``release``."""

    def __init__(self, host: Host, hva: int, size: int) -> None:
        self._host = host
        self._running = ExitStack()
        with LOCK:
            self._running.enter_context(host.mm.held_dontneed(hva, hva + size))

    def interrupt(self) -> None:
        """Send a signal to the thread that has made this, for the call that it is in."""
        with LOCK:
            # Outside of a call, its handler runs, and that is all.
            self._host.signal_pending = self._host.in_call

    def release(self) -> None:
        """Let the invalidation end. Any thread may, again, too."""
        with LOCK:
            self._running.close()

    def close(self) -> None:
        """Release it."""
        self.release()


class SpecPreemption(Closing):
    """Takes no CPU away: what comes at some moment comes afterwards. `prefault explore` tries all moments."""

    def run(self, call: Callable[[], object], meanwhile: Callable[[], None]) -> None:
        """Make a call, and then another."""
        call()
        meanwhile()

    def close(self) -> None:
        """Nothing is held."""
