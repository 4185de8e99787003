# SPDX-License-Identifier: Apache-2.0
"""userfaultfd: faults of the VMM's memory that a thread of the VMM serves.

Mirrors: mm/userfaultfd.c
"""

from __future__ import annotations

import errno
import os
import queue
import threading
from dataclasses import dataclass

from prefault.closing import Closing
from prefault.errors import PrefaultError
from prefault.machine import UserfaultHandler, UserfaultMode
from prefault.spec import steps
from prefault.spec.mm import PFN_SHIFT, WRITABLE, Vma
from prefault.spec.process import Process


@dataclass
class Wait:
    """Somebody who waits for a page. Mirrors: struct userfaultfd_wait_queue"""

    hva: int
    write: bool
    woken: bool = False
    interrupted: bool = False


class Context:
    """A range and those who wait for pages of it. Mirrors: struct userfaultfd_ctx"""

    def __init__(self, mm: Process, start: int, end: int, mode: UserfaultMode) -> None:
        self._mm = mm
        self._start, self._end, self._mode = start, end, mode
        self._released = False
        self.waiting: list[Wait] = []
        self.messages: queue.SimpleQueue[Wait | None] = queue.SimpleQueue()
        self._register(self.handle_userfault)

    def _register(self, handler: object) -> None:
        """Mirrors: userfaultfd_register_range()"""
        for vma in self._mm.isolate(self._start, self._end) or ():
            setattr(vma, self._mode.name.lower(), handler)

    def handle_userfault(self, hva: int, write: bool) -> bool:
        """Wait until the fault may be tried again; False is a signal. Mirrors: handle_userfault()"""
        if self._released:
            return True
        one = Wait(hva & -self._mm.page_size, write)
        self.waiting.append(one)
        self.messages.put(one)
        if self._must_wait(one.hva):
            steps.wait("uffd.wait", lambda: one.woken or one.interrupted)
        self.waiting.remove(one)
        return not one.interrupted

    def _must_wait(self, hva: int) -> bool:
        """Whether it was not served between the fault and here. Mirrors: userfaultfd_must_wait()"""
        if self._mode is UserfaultMode.WRITE_PROTECT:
            return hva >> self._mm.page_shift in self._mm.uffd_wp
        return self._mm.lookup(hva) is None

    def _wake(self, hva: int, size: int) -> None:
        """Mirrors: wake_userfault()"""
        for one in self.waiting:
            one.woken |= hva <= one.hva < hva + size
        steps.LOCK.notify_all()

    def release(self) -> None:
        """The descriptor is closed. Mirrors: userfaultfd_release(), userfaultfd_clear_vma()"""
        if self._released:
            return
        self._released = True
        if self._mode is UserfaultMode.WRITE_PROTECT:
            self._mm.uffd_wp_range(self._start, self._end, protect=False)
        self._register(None)
        self._mm.merge_vmas()
        self._wake(self._start, self._end - self._start)

    # Serving.

    def copy(self, hva: int, data: bytes) -> int:
        """UFFDIO_COPY; 0 or a negative errno. Mirrors: mfill_atomic_pte_copy()"""
        mm = self._mm
        for offset in range(0, len(data), mm.page_size):
            pfn = mm.memory.allocate()
            mm.memory.frame(pfn)[:] = data[offset : offset + mm.page_size]
            ret = self._install_new(hva + offset, pfn)
            if ret:
                return ret
        self._wake(hva, len(data))
        return 0

    def zeropage(self, hva: int, size: int) -> int:
        """UFFDIO_ZEROPAGE. Mirrors: mfill_atomic_pte_zeropage(), mfill_atomic_pte_zeroed_folio()"""
        mm = self._mm
        for page in range(hva, hva + size, mm.page_size):
            vma = self._vma(page)
            if vma.shared:
                ret = self._install_new(page, mm.memory.allocate())
            else:
                ret = self._install(page, mm.memory.zero_pfn, writable=False)
            if ret:
                return ret
        self._wake(hva, size)
        return 0

    def continue_(self, hva: int, size: int) -> int:
        """UFFDIO_CONTINUE: map pages of the file. Mirrors: mfill_atomic_pte_continue()"""
        for page in range(hva, hva + size, self._mm.page_size):
            vma = self._vma(page)
            pfn = vma.file.pages.get(self._mm.index(vma, page)) if vma.file else None
            if pfn is None:
                return -errno.EFAULT
            ret = self._install(page, pfn, writable=vma.writable and vma.shared)
            if ret:
                return ret
        self._wake(hva, size)
        return 0

    def poison(self, hva: int, size: int) -> int:
        """UFFDIO_POISON: faults find a marker. Mirrors: mfill_atomic_pte_poison()"""
        for page in range(hva, hva + size, self._mm.page_size):
            marker = self._mm.memory.allocate()
            self._mm.memory.poisoned.add(marker)
            ret = self._install(page, marker, writable=False)
            if ret:
                return ret
        self._wake(hva, size)
        return 0

    def writeprotect(self, hva: int, size: int, *, protect: bool) -> int:
        """UFFDIO_WRITEPROTECT. Mirrors: mwriteprotect_range()"""
        self._mm.uffd_wp_range(hva, hva + size, protect=protect)
        if not protect:
            self._wake(hva, size)
        return 0

    def _vma(self, hva: int) -> Vma:
        vma = self._mm.vma_lookup(hva)
        assert vma
        return vma

    def _install_new(self, hva: int, pfn: int) -> int:
        """Map a new page, which shared memory takes into its file."""
        vma = self._vma(hva)
        if vma.file and vma.shared:
            if self._mm.index(vma, hva) in vma.file.pages:
                return -errno.EEXIST
            vma.file.pages[self._mm.index(vma, hva)] = pfn
        return self._install(hva, pfn, writable=vma.writable)

    def _install(self, hva: int, pfn: int, *, writable: bool) -> int:
        """Mirrors: mfill_atomic_install_pte()"""
        if self._mm.lookup(hva) is not None:
            return -errno.EEXIST
        vma = self._vma(hva)
        vma.anon_vma |= not vma.shared
        entries = self._mm.ptes[self._mm.page_shift]
        entries[hva >> self._mm.page_shift] = pfn << PFN_SHIFT | (WRITABLE if writable else 0)
        return 0


class SpecUserfault(Closing):
    """A range of guest memory whose faults a handler serves, in a thread of its own."""

    def __init__(
        self, mm: Process, hva: int, gpa: int, size: int, mode: UserfaultMode, handler: UserfaultHandler
    ) -> None:
        self._offset = hva - gpa
        self._handler = handler
        self._asking: Wait | None = None
        self._error: BaseException | None = None
        with steps.LOCK:
            self._context = Context(mm, hva, hva + size, mode)
        self._thread = threading.Thread(target=self._serve, name="userfault", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while (one := self._context.messages.get()) is not None:
            self._asking = one
            try:
                self._handler(self, one.hva - self._offset, one.write)
            except BaseException as error:
                self._error = error
                with steps.LOCK:
                    self._context.release()
                return

    def copy(self, gpa: int, data: bytes) -> None:
        """UFFDIO_COPY: the pages from ``gpa`` on hold ``data``, whole pages of it."""
        with steps.LOCK:
            _served("UFFDIO_COPY", self._context.copy(gpa + self._offset, data))

    def zero(self, gpa: int, size: int) -> None:
        """UFFDIO_ZEROPAGE: the pages hold zeroes."""
        with steps.LOCK:
            _served("UFFDIO_ZEROPAGE", self._context.zeropage(gpa + self._offset, size))

    def proceed(self, gpa: int, size: int) -> None:
        """UFFDIO_CONTINUE: map what shared memory has there."""
        with steps.LOCK:
            _served("UFFDIO_CONTINUE", self._context.continue_(gpa + self._offset, size))

    def poison(self, gpa: int, size: int) -> None:
        """UFFDIO_POISON: the pages are lost, as if memory had failed."""
        with steps.LOCK:
            _served("UFFDIO_POISON", self._context.poison(gpa + self._offset, size))

    def write_protect(self, gpa: int, size: int, *, protect: bool) -> None:
        """UFFDIO_WRITEPROTECT: ask before pages that are there are written, or no more."""
        with steps.LOCK:
            error = self._context.writeprotect(gpa + self._offset, size, protect=protect)
            _served("UFFDIO_WRITEPROTECT", error)

    def interrupt(self) -> None:
        """Send a signal to the thread whose fault the handler was asked about last."""
        with steps.LOCK:
            if self._asking in self._context.waiting:
                self._asking.interrupted = True
                steps.LOCK.notify_all()

    def close(self) -> None:
        """Serve no more; who waits goes on as if nobody had served. Safe to call again.

        :raises Exception: what the handler raised, if it did
        """
        self._context.messages.put(None)
        self._thread.join()
        with steps.LOCK:
            self._context.release()
        error, self._error = self._error, None
        if error:
            raise error


def _served(name: str, error: int) -> None:
    # EEXIST: somebody was faster.
    if error not in (0, -errno.EEXIST):
        raise PrefaultError(f"{name} failed: {os.strerror(-error)}; is the memory registered for it?")
