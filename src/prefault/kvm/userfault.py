# SPDX-License-Identifier: Apache-2.0
"""userfaultfd(2): faults of the VMM's own memory, served by a thread of the VMM.

Source: Documentation/admin-guide/mm/userfaultfd.rst
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import select
import signal
import threading

from prefault.abi import userfaultfd as abi
from prefault.closing import Closing
from prefault.errors import CapabilityMissing, PrefaultError, UsageError
from prefault.kvm.descriptor import ioctl
from prefault.machine import UserfaultHandler, UserfaultMode

_NR_USERFAULTFD = 323 if platform.machine() == "x86_64" else 282
"""Number of the system call: x86-64 has a table of its own, newer architectures share one."""
_SIGNAL = signal.SIGUSR1

_MODES = {
    UserfaultMode.MISSING: (abi.UFFDIO_REGISTER_MODE_MISSING, abi.UFFD_FEATURE_MISSING_SHMEM),
    UserfaultMode.MINOR: (abi.UFFDIO_REGISTER_MODE_MINOR, abi.UFFD_FEATURE_MINOR_SHMEM),
    UserfaultMode.WRITE_PROTECT: (abi.UFFDIO_REGISTER_MODE_WP, abi.UFFD_FEATURE_PAGEFAULT_FLAG_WP),
}
"""How to register, and the feature that it needs."""

_RANGED = {
    abi.UFFDIO_REGISTER: "UFFDIO_REGISTER",
    abi.UFFDIO_ZEROPAGE: "UFFDIO_ZEROPAGE",
    abi.UFFDIO_CONTINUE: "UFFDIO_CONTINUE",
    abi.UFFDIO_POISON: "UFFDIO_POISON",
}

_libc = ctypes.CDLL(None, use_errno=True)


class Userfault(Closing):
    """A range of guest memory whose faults a handler serves, in a thread of its own.

    Make and close it in the main thread, the only one that can put a handler in a signal's way.
    """

    def __init__(
        self, hva: int, gpa: int, size: int, mode: UserfaultMode, handler: UserfaultHandler, page_size: int
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise UsageError(
                "faults are handed to a handler from the main thread only, which has the signals"
            )
        self._offset = hva - gpa
        self._page_mask = -page_size
        self._handler = handler
        self._asking = 0
        self._error: BaseException | None = None
        self._fd = _open(mode)
        try:
            self._ranged(abi.UFFDIO_REGISTER, gpa, size, _MODES[mode][0])
        except BaseException:
            os.close(self._fd)
            raise
        self._closing, self._close = os.pipe()
        self._signal_before = signal.signal(_SIGNAL, lambda number, frame: None)
        self._thread = threading.Thread(target=self._serve, name="userfault", daemon=True)
        self._thread.start()

    # The verbs.

    def copy(self, gpa: int, data: bytes) -> None:
        """UFFDIO_COPY: the pages from ``gpa`` on hold ``data``, whole pages of it."""
        source = ctypes.create_string_buffer(data, len(data))
        self.copy_from(gpa, ctypes.addressof(source), len(data))

    def copy_from(self, gpa: int, source: int, size: int) -> None:
        """``copy`` from an address of ours, which must not be memory whose faults are served."""
        while size:
            request = abi.uffdio_copy(gpa + self._offset, source, size)
            result, error = ioctl(self._fd, abi.UFFDIO_COPY, request)
            # Stopped on the way, for instance by a signal: what was done is said, the rest is another call.
            done = max(0, request.copy) if result else size
            if result and not done and error == errno.EEXIST:
                return
            if result and error != errno.EAGAIN:
                raise PrefaultError(
                    f"UFFDIO_COPY failed: {os.strerror(error)}; is the memory registered for it?"
                )
            gpa, source, size = gpa + done, source + done, size - done

    def zero(self, gpa: int, size: int) -> None:
        """UFFDIO_ZEROPAGE: the pages hold zeroes."""
        self._ranged(abi.UFFDIO_ZEROPAGE, gpa, size)

    def proceed(self, gpa: int, size: int) -> None:
        """UFFDIO_CONTINUE: map what shared memory has there."""
        self._ranged(abi.UFFDIO_CONTINUE, gpa, size)

    def poison(self, gpa: int, size: int) -> None:
        """UFFDIO_POISON: the pages are lost, as if memory had failed."""
        self._ranged(abi.UFFDIO_POISON, gpa, size)

    def write_protect(self, gpa: int, size: int, *, protect: bool) -> None:
        """UFFDIO_WRITEPROTECT: ask before pages that are there are written, or no more."""
        mode = abi.UFFDIO_WRITEPROTECT_MODE_WP if protect else 0
        request = abi.uffdio_writeprotect(abi.uffdio_range(gpa + self._offset, size), mode)
        self._ioctl(abi.UFFDIO_WRITEPROTECT, request, "UFFDIO_WRITEPROTECT")

    def interrupt(self) -> None:
        """Send a signal to the thread whose fault the handler was asked about last."""
        _libc.tgkill(os.getpid(), self._asking, int(_SIGNAL))

    def _ranged(self, number: int, gpa: int, size: int, mode: int = 0) -> None:
        request = abi.uffdio_ranged(abi.uffdio_range(gpa + self._offset, size), mode)
        self._ioctl(number, request, _RANGED[number])

    def _ioctl(self, number: int, request: ctypes.Structure, name: str) -> None:
        while True:
            result, error = ioctl(self._fd, number, request)
            # EEXIST: somebody was faster, for instance the same handler, asked twice by one thread.
            if result == 0 or error == errno.EEXIST:
                return
            if error != errno.EAGAIN:
                raise PrefaultError(f"{name} failed: {os.strerror(error)}; is the memory registered for it?")

    # The thread.

    def _serve(self) -> None:
        waiter = select.poll()
        for fd in (self._fd, self._closing):
            waiter.register(fd, select.POLLIN)
        while not any(fd == self._closing for fd, _ in waiter.poll()):
            with contextlib.suppress(BlockingIOError):
                message = abi.uffd_msg.from_buffer_copy(os.read(self._fd, ctypes.sizeof(abi.uffd_msg)))
                if not self._ask(message):
                    return

    def _ask(self, message: abi.uffd_msg) -> bool:
        """Have a fault served; False if the handler could not."""
        self._asking = message.ptid
        write = bool(message.flags & (abi.UFFD_PAGEFAULT_FLAG_WRITE | abi.UFFD_PAGEFAULT_FLAG_WP))
        try:
            self._handler(self, (message.address & self._page_mask) - self._offset, write)
        except BaseException as error:
            self._error = error
            self._release()  # or who waits would wait for ever
            return False
        return True

    def _release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Serve no more; who waits goes on as if nobody had served. Safe to call again.

        :raises Exception: what the handler raised, if it did
        """
        if self._close < 0:
            return
        os.write(self._close, b"x")
        self._thread.join()
        self._release()
        os.close(self._closing)
        os.close(self._close)
        self._close = -1
        signal.signal(_SIGNAL, self._signal_before)
        if self._error:
            raise self._error


def _open(mode: UserfaultMode) -> int:
    """A userfaultfd with the features that a mode needs."""
    fd = int(_libc.syscall(_NR_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        reason = os.strerror(ctypes.get_errno())
        raise CapabilityMissing(
            f"userfaultfd(2) failed: {reason}; it takes CONFIG_USERFAULTFD, and to serve KVM's faults also "
            "root or vm.unprivileged_userfaultfd=1"
        )
    wanted = abi.UFFD_FEATURE_THREAD_ID | _MODES[mode][1]
    result, error = ioctl(fd, abi.UFFDIO_API, abi.uffdio_api(abi.UFFD_API, wanted))
    if result:
        os.close(fd)
        raise CapabilityMissing(
            f"UFFDIO_API with features {wanted:#x} failed: {os.strerror(error)}; "
            f"this kernel's userfaultfd has no {mode.value} mode"
        )
    return fd
