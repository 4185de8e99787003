# SPDX-License-Identifier: Apache-2.0
"""An invalidation of the VMM's memory that lasts as long as it is wanted.

Nothing that a process can do makes the kernel wait between the two calls of its MMU notifiers. A thread that
drops many pages is between them most of the time, though, and is preempted there as anywhere else: it runs
on a CPU of its own until the first page is gone, then another process with a higher priority takes that CPU
(thief.py). If the last page is there by then, the thread is in the middle, and stays there.

Failure modes, all CapabilityMissing: what thief.py lacks; a machine on which the thread always comes to its
end first, after some tries; and a kernel that drops pages under the mmap lock (before Linux 6.17), where the
VMM could map nothing meanwhile, and would wait for itself. That is tried out once, with little patience.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import threading
from pathlib import Path

from prefault.closing import Closing
from prefault.errors import CapabilityMissing, UsageError
from prefault.kvm import mapping
from prefault.kvm.thief import Thief

_TRIES = 50
_SIGNAL = signal.SIGUSR1
_PAGEMAP = Path("/proc/self/pagemap")
_PRESENT = 1 << 63
"""In one of its entries."""
_SECONDS = 60
"""Should nobody be left to end it."""
_TRIAL_SECONDS = 5
_DOUBT_SECONDS = 2
"""Until it is known that the thread is in the middle: where it has come to its end, it may have lost its CPU
with the interpreter's lock in its hands, and nothing here runs before it has the CPU again."""
_HOLDS_LOCK = (
    "this kernel drops pages under the mmap lock, so that an invalidation that is held stops the whole VMM; "
    "it takes a kernel that drops them under the lock of the VMA (Linux 6.17)"
)

_libc = ctypes.CDLL(None, use_errno=True)


class HeldInvalidation(Closing):
    """MADV_DONTNEED of a range of private memory that is in its middle from the start, until ``release``.

    :raises CapabilityMissing: the kernel cannot be made to stay there
    """

    _leaves_mmap_lock: bool | None = None
    """Whether others can map memory while pages are dropped, once that is known."""

    def __init__(self, hva: int, size: int, page_size: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("an invalidation is held from the main thread only, which has the signals")
        self._caller = threading.get_native_id()
        self._range, self._last = (hva, size), hva + size - page_size
        self._page_size = page_size
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._thief = Thief()
        self._signal_before = signal.signal(_SIGNAL, lambda number, frame: None)
        try:
            self._hold()
        except BaseException:
            self.close()
            raise

    def _hold(self) -> None:
        """Try until the invalidation is in its middle."""
        if HeldInvalidation._leaves_mmap_lock is None:
            HeldInvalidation._leaves_mmap_lock = self._can_map_meanwhile()
        if not HeldInvalidation._leaves_mmap_lock:
            raise CapabilityMissing(_HOLDS_LOCK)
        self._until_held(_SECONDS)

    def _can_map_meanwhile(self) -> bool:
        """Hold one, map a page, and see who was first: this, or the end of the thief's patience."""
        self._until_held(_TRIAL_SECONDS)
        mmap.mmap(-1, self._page_size).close()
        found = self._thief.has_cpu()
        self.release()
        return found

    def _until_held(self, seconds: float) -> None:
        for _ in range(_TRIES):
            mapping.advise(*self._range, mapping.MADV_POPULATE_READ, "MADV_POPULATE_READ")
            if self._try(seconds):
                return
            self.release()
        raise CapabilityMissing(
            f"in {_TRIES} tries no invalidation could be stopped in its middle; is the machine very busy?"
        )

    def _try(self, seconds: float) -> bool:
        self._thread = thread = threading.Thread(target=self._drop, daemon=True)
        thread.start()
        with _PAGEMAP.open("rb", buffering=0) as pagemap:
            while self._is_there(pagemap.fileno(), self._range[0]) and thread.is_alive():
                pass
            self._thief.order(0, _DOUBT_SECONDS)
            self._thief.wait()
            # The CPU is the thief's now, so that what is there stays there.
            if not self._is_there(pagemap.fileno(), self._last):
                return False
            # The next order is there when the thief leaves: it takes the CPU again at once.
            self._thief.order(0, seconds)
            self._thief.leave()
            self._thief.wait()
            return self._is_there(pagemap.fileno(), self._last) and self._thief.has_cpu()

    def _drop(self) -> None:
        self._thief.settle()
        mapping.advise(*self._range, mapping.MADV_DONTNEED, "MADV_DONTNEED")

    def _is_there(self, pagemap: int, hva: int) -> bool:
        (entry,) = struct.unpack("<Q", os.pread(pagemap, 8, hva // self._page_size * 8))
        return bool(entry & _PRESENT)

    def interrupt(self) -> None:
        """Send a signal to the thread that has made this, for the call that it is in."""
        _libc.tgkill(os.getpid(), self._caller, int(_SIGNAL))

    def release(self) -> None:
        """Let the invalidation end. Any thread may, again, too."""
        with self._lock:
            self._thief.leave()
            if self._thread:
                self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Let the invalidation end, and give back what it took to hold it. Safe to call again."""
        self.release()
        self._thief.close()
        signal.signal(_SIGNAL, self._signal_before)
