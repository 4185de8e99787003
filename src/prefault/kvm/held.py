# SPDX-License-Identifier: Apache-2.0
"""An invalidation of the VMM's memory that lasts as long as it is wanted.

Nothing that a process can do makes the kernel wait between the two calls of its MMU notifiers. A thread that
drops many pages is between them most of the time, though, and is preempted there as anywhere else: it runs
on a CPU of its own until the first page is gone, then another task with a higher priority takes that CPU. If
the last page is there by then, the thread is in the middle, and stays there.

It takes two CPUs, and real-time priorities, which root has. Failure modes, all CapabilityMissing: a machine
on which the thread always comes to its end first, after some tries; and a kernel that drops pages under the
mmap lock (before Linux 6.17), where the VMM could map nothing meanwhile, and would wait for itself. That is
tried out once, with a task that soon ends by itself.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from prefault.errors import CapabilityMissing, PrefaultError, UsageError
from prefault.kvm import mapping

_TRIES = 50
_SIGNAL = signal.SIGUSR1
_PAGEMAP = Path("/proc/self/pagemap")
_PRESENT = 1 << 63
"""In one of its entries."""
_LOW, _HIGH = 1, 2
"""Real-time priorities: of who invalidates, and of who keeps it from that."""
_SPIN = "ulimit -t {}; read go; echo; while :; do :; done"
"""Says when it runs, and then runs, for so many seconds at most."""
_SECONDS = 60
"""Should nobody be left to end it."""
_TRIAL_SECONDS = 5
_HOLDS_LOCK = (
    "this kernel drops pages under the mmap lock, so that an invalidation that is held stops the whole VMM; "
    "it takes a kernel that drops them under the lock of the VMA (Linux 6.17)"
)

_libc = ctypes.CDLL(None, use_errno=True)


class HeldInvalidation:
    """MADV_DONTNEED of a range of private memory that is in its middle from the start, until ``release``.

    :raises CapabilityMissing: the kernel cannot be made to stay there
    """

    _leaves_mmap_lock: bool | None = None
    """Whether others can map memory while pages are dropped, once that is known."""

    def __init__(self, hva: int, size: int, page_size: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("an invalidation is held from the main thread only, which has the signals")
        self._cpus = os.sched_getaffinity(0)
        if len(self._cpus) < 2:
            raise CapabilityMissing("to hold an invalidation takes two CPUs; boot the lab with two")
        self._caller = threading.get_native_id()
        self._range, self._last = (hva, size), hva + size - page_size
        self._page_size = page_size
        self._lock = threading.Lock()
        self._spinner: _Spinner | None = None
        self._thread: threading.Thread | None = None
        self._signal_before = signal.signal(_SIGNAL, lambda number, frame: None)
        try:
            self._hold(max(self._cpus))
        except BaseException:
            self.close()
            raise

    def _hold(self, cpu: int) -> None:
        """Try until the invalidation is in its middle."""
        os.sched_setaffinity(0, self._cpus - {cpu})
        if HeldInvalidation._leaves_mmap_lock is None:
            HeldInvalidation._leaves_mmap_lock = self._can_map_meanwhile(cpu)
        if not HeldInvalidation._leaves_mmap_lock:
            raise CapabilityMissing(_HOLDS_LOCK)
        self._until_held(cpu, _SECONDS)

    def _can_map_meanwhile(self, cpu: int) -> bool:
        """Hold one, map a page, and see who was first: this, or the end of the spinner."""
        spinner = self._until_held(cpu, _TRIAL_SECONDS)
        mmap.mmap(-1, self._page_size).close()
        found = spinner.runs()
        self.release()
        return found

    def _until_held(self, cpu: int, seconds: int) -> _Spinner:
        for _ in range(_TRIES):
            mapping.advise(*self._range, mapping.MADV_POPULATE_READ, "MADV_POPULATE_READ")
            spinner = _Spinner(cpu, seconds)
            if self._try(cpu, spinner):
                return spinner
            self.release()
        raise CapabilityMissing(
            f"in {_TRIES} tries no invalidation could be stopped in its middle; is the machine very busy?"
        )

    def _try(self, cpu: int, spinner: _Spinner) -> bool:
        self._spinner = spinner
        self._thread = thread = threading.Thread(target=self._drop, args=(cpu,), daemon=True)
        thread.start()
        with _PAGEMAP.open("rb", buffering=0) as pagemap:
            while self._is_there(pagemap.fileno(), self._range[0]) and thread.is_alive():
                pass
            spinner.spin()
            # The CPU is the spinner's now, so that what is there stays there.
            return self._is_there(pagemap.fileno(), self._last)

    def _drop(self, cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_LOW))
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
            if self._spinner:
                self._spinner.kill()
            if self._thread:
                self._thread.join()
            self._spinner = self._thread = None

    def close(self) -> None:
        """Let the invalidation end, and give back what it took to hold it. Safe to call again."""
        self.release()
        os.sched_setaffinity(0, self._cpus)
        signal.signal(_SIGNAL, self._signal_before)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Spinner:
    """A process that, when told to, takes a CPU for itself."""

    def __init__(self, cpu: int, seconds: int) -> None:
        # Not a child of fork(2), which would take the leaves of private memory.
        command = ("/bin/sh", "-c", _SPIN.format(seconds))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            os.sched_setaffinity(self._process.pid, {cpu})
            os.sched_setscheduler(self._process.pid, os.SCHED_FIFO, os.sched_param(_HIGH))
        except PermissionError as error:
            self.kill()
            raise CapabilityMissing(f"to hold an invalidation takes real-time priorities: {error}") from error

    def spin(self) -> None:
        """Take the CPU; when this returns it is taken."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise PrefaultError("the process that keeps a CPU busy ended; it needs /bin/sh")

    def runs(self) -> bool:
        """Whether it still has the CPU."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Give the CPU back."""
        self._process.kill()
        with self._process:
            pass
