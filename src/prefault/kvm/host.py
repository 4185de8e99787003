# SPDX-License-Identifier: Apache-2.0
"""What a host does to memory without being told by its VMM: fork, KSM, idle page tracking.

The last two take root: they are switched on in sysfs, and physical pages are named by their numbers.

Source: Documentation/admin-guide/mm (ksm.rst, idle_page_tracking.rst, pagemap.rst)
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prefault.closing import Closing
from prefault.errors import CapabilityMissing, PrefaultError
from prefault.kvm import mapping

_KSM = Path("/sys/kernel/mm/ksm")
_KSM_SETTINGS = {"pages_to_scan": "100000", "sleep_millisecs": "1", "run": "1"}
_KSM_PATIENCE = 10.0
_IDLE = Path("/sys/kernel/mm/page_idle/bitmap")
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_SPLIT = Path("/sys/kernel/debug/split_huge_pages")
_PAGEMAP = Path("/proc/self/pagemap")
_PRESENT = 1 << 63
_PFN = (1 << 55) - 1
_REQUEST = struct.Struct("QQ")


class Child(Closing):
    """A child of this process that has its memory as it was at the fork, until it is closed.

    :ivar pid: of the child
    :param hva_of: from a gpa to the address
    """

    def __init__(self, hva_of: Callable[[int], int]) -> None:
        self._hva_of = hva_of
        asked, self._ask = os.pipe()
        self._answer, answered = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _serve(asked, answered, (self._ask, self._answer))
        os.close(asked)
        os.close(answered)

    def read_memory(self, gpa: int, size: int) -> bytes:
        """Guest memory as the child sees it."""
        found = b""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._ask, _REQUEST.pack(self._hva_of(gpa), size))
            while piece := os.read(self._answer, size - len(found)):
                found += piece
        if len(found) < size:
            raise PrefaultError(f"the forked child is gone and cannot read {size} bytes at gpa {gpa:#x}")
        return found

    def close(self) -> None:
        """Let the child end. Safe to call again."""
        if self._ask < 0:
            return
        os.close(self._ask)
        os.close(self._answer)
        self._ask = -1
        os.waitpid(self.pid, 0)


def _serve(asked: int, answered: int, not_ours: tuple[int, int]) -> None:
    """What the child does; it never returns."""
    try:
        for fd in not_ours:
            os.close(fd)
        while request := os.read(asked, _REQUEST.size):
            hva, size = _REQUEST.unpack(request)
            os.write(answered, ctypes.string_at(hva, size))
    finally:
        os._exit(0)


def merge(hva: int, size: int, page_size: int) -> None:
    """Have KSM make one page of all the pages of a range, which must be equal.

    :raises CapabilityMissing: there is no KSM, or it did not get round to it
    """
    with _ksm_running():
        mapping.advise(hva, size, mapping.MADV_MERGEABLE, "MADV_MERGEABLE")
        give_up = time.monotonic() + _KSM_PATIENCE
        while len(set(frames(hva, size, page_size))) > 1:
            if time.monotonic() > give_up:
                raise CapabilityMissing(
                    f"KSM has not merged {size:#x} bytes within {_KSM_PATIENCE:.0f} s: are all pages equal, "
                    f"and is {_KSM}/max_page_sharing large enough?"
                )
            time.sleep(0.005)


@contextlib.contextmanager
def _ksm_running() -> Iterator[None]:
    try:
        before = {name: (_KSM / name).read_text() for name in _KSM_SETTINGS}
        for name, value in _KSM_SETTINGS.items():
            (_KSM / name).write_text(value)
    except OSError as error:
        raise CapabilityMissing(f"KSM cannot be started: {error}; it takes CONFIG_KSM and root") from error
    try:
        yield
    finally:
        for name, value in before.items():
            (_KSM / name).write_text(value)


def frames(hva: int, size: int, page_size: int) -> list[int]:
    """The frames behind a range, 0 for pages that are not there.

    :raises CapabilityMissing: we may not know them
    """
    with _PAGEMAP.open("rb") as pagemap:
        pagemap.seek(hva // page_size * 8)
        entries = struct.unpack(f"{size // page_size}Q", pagemap.read(size // page_size * 8))
    found = [entry & _PFN if entry & _PRESENT else 0 for entry in entries]
    if not any(found) and any(entry & _PRESENT for entry in entries):
        raise CapabilityMissing(f"{_PAGEMAP} shows frames to root only")
    return found


def make_contiguous(hva: int, size: int) -> None:
    """Give neighbouring pages neighbouring frames: make THPs of them, and split these into pages again.

    Their contents are lost: they hold zeroes afterwards.

    :raises CapabilityMissing: there are no THPs, or they cannot be split
    """
    mapping.advise(hva, size, mapping.MADV_HUGEPAGE, "MADV_HUGEPAGE")
    mapping.advise(hva, size, mapping.MADV_COLLAPSE, "MADV_COLLAPSE")
    mapping.advise(hva, size, mapping.MADV_NOHUGEPAGE, "MADV_NOHUGEPAGE")
    # Who splits a THP puts the zero page in the place of pages that hold zeroes.
    ctypes.memset(hva, 1, size)
    try:
        _SPLIT.write_text(f"{os.getpid()},{hva:#x},{hva + size:#x}")
    except OSError as error:
        raise CapabilityMissing(
            f"{_SPLIT} cannot be written: {error}; it takes CONFIG_DEBUG_FS, debugfs mounted, and root"
        ) from error
    ctypes.memset(hva, 0, size)


def age(hva: int, size: int, page_size: int) -> None:
    """Have the kernel take note that nobody has used a range lately, as reclaim would.

    :raises CapabilityMissing: there is no idle page tracking, or we may not use it
    """
    onto_the_lists()
    words: dict[int, int] = {}
    for frame in frames(hva, size, page_size):
        words[frame // 64] = words.get(frame // 64, 0) | 1 << frame % 64
    try:
        with _IDLE.open("r+b", buffering=0) as bitmap:
            for word, bits in words.items():
                bitmap.seek(word * 8)
                bitmap.write(bits.to_bytes(8, "little"))
    except OSError as error:
        raise CapabilityMissing(
            f"{_IDLE} cannot be written: {error}; it takes CONFIG_IDLE_PAGE_TRACKING and root"
        ) from error


def drop_caches() -> None:
    """Have the kernel drop clean pages of files that nobody has mapped.

    :raises CapabilityMissing: we may not
    """
    try:
        _DROP_CACHES.write_text("1")
    except OSError as error:
        raise CapabilityMissing(f"{_DROP_CACHES} cannot be written: {error}; it takes root") from error


def onto_the_lists() -> None:
    """Empty the lists of each CPU in which new pages, and used ones, wait to be put in order.

    Pages cannot be marked or migrated there. The kernel empties those of a CPU when a file is sealed there.
    """
    before = os.sched_getaffinity(0)
    try:
        for cpu in before:
            os.sched_setaffinity(0, {cpu})
            fd = os.memfd_create("prefault-lists", os.MFD_ALLOW_SEALING)
            try:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            finally:
                os.close(fd)
    finally:
        os.sched_setaffinity(0, before)
