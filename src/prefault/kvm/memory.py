# SPDX-License-Identifier: Apache-2.0
"""Host memory behind memslots: one ``Memory`` per backing that a ``MemoryRegion`` asks for.

KVM makes a block only where gpa and hva agree modulo the block size, so the HVA is given the same
remainder as the gpa, plus ``MemoryRegion.hva_offset``.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from prefault.errors import CapabilityMissing, UsageError
from prefault.kvm import devmem, host, hugepages, mapping
from prefault.machine import FILE_CONTENTS, Access, Advice, Backing, Frames, MemoryRegion, Resident

_MFD_HUGETLB = 4
_MFD_HUGE_SHIFT = 26
_CHUNK = 1 << 20

_ADVICE = {
    Advice.DONTNEED: mapping.MADV_DONTNEED,
    Advice.REMOVE: mapping.MADV_REMOVE,
    Advice.POPULATE_READ: mapping.MADV_POPULATE_READ,
    Advice.POPULATE_WRITE: mapping.MADV_POPULATE_WRITE,
    Advice.COLLAPSE: mapping.MADV_COLLAPSE,
    Advice.HUGEPAGE: mapping.MADV_HUGEPAGE,
    Advice.NOHUGEPAGE: mapping.MADV_NOHUGEPAGE,
    Advice.MERGEABLE: mapping.MADV_MERGEABLE,
}
_PROTECTION = {Access.NONE: 0, Access.READ: mmap.PROT_READ, Access.WRITE: mmap.PROT_READ | mmap.PROT_WRITE}


@dataclass
class Memory:
    """A mapping in this process.

    :ivar hva: address of the first byte of the slot
    :ivar size: bytes of the slot
    :ivar guest_memfd: descriptor for KVM_SET_USER_MEMORY_REGION2, or -1
    """

    hva: int
    size: int
    guest_memfd: int = -1
    _pieces: list[tuple[int, int]] = field(default_factory=list)
    """What of the address space is ours to unmap: (start, end)."""
    _fds: list[int] = field(default_factory=list)
    _reservation: hugepages.Reservation | None = None

    @property
    def fd(self) -> int:
        """The file behind, -1 for anonymous memory."""
        return self._fds[-1] if self._fds else -1

    def read(self, offset: int, size: int) -> bytes:
        """Bytes as the host sees them."""
        return ctypes.string_at(self.hva + offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes from the host."""
        ctypes.memmove(self.hva + offset, data, len(data))

    def advise(self, offset: int, size: int, advice: Advice) -> None:
        """madvise(2).

        The host tells whoever has a page mapped that it is broken now: SIGBUS, to us, which is no
        news. Call from the main thread, the only one that can put a handler in its way.
        """
        if advice is Advice.ALLOCATE:
            mapping.allocate(self.fd, offset, size)
        elif advice is Advice.SOFT_OFFLINE:
            _migrate(self.hva + offset, size)
        elif advice is not Advice.HWPOISON:
            mapping.advise(self.hva + offset, size, _ADVICE[advice], f"MADV_{advice.name}")
        else:
            with _without_sigbus():
                mapping.poison(self.hva + offset, size)

    def protect(self, offset: int, size: int, access: Access) -> None:
        """mprotect(2)."""
        mapping.protect(self.hva + offset, size, _PROTECTION[access])

    def unmap(self, offset: int, size: int) -> None:
        """munmap(2). Others may be given the addresses from now on."""
        start = self.hva + offset
        mapping.unmap(start, size)
        self._pieces = [part for piece in self._pieces for part in _without(piece, (start, start + size))]

    def map_anew(self, offset: int, size: int, *, secret: bool = False) -> None:
        """mmap(2) of private anonymous memory, or of secret memory, over what is mapped there."""
        if not secret:
            mapping.map_at(self.hva + offset, size, shared=False)
            return
        fd = mapping.secret_file()
        try:
            os.ftruncate(fd, size)
            mapping.map_at(self.hva + offset, size, shared=True, fd=fd)
        finally:
            os.close(fd)  # the mapping keeps the file

    def close(self) -> None:
        """Unmap, and close what was behind. Safe to call again."""
        while self._pieces:
            start, end = self._pieces.pop()
            mapping.unmap(start, end - start)
        while self._fds:
            os.close(self._fds.pop())
        self.guest_memfd = -1
        if self._reservation:
            self._reservation.close()


def _migrate(hva: int, size: int) -> None:
    """MADV_SOFT_OFFLINE, page by page.

    The call itself touches a page first, which can put it onto a list where it cannot be migrated.
    """
    page_size = os.sysconf("SC_PAGE_SIZE")
    for page in range(hva, hva + size, page_size):
        try:
            mapping.advise(page, page_size, mapping.MADV_SOFT_OFFLINE, "MADV_SOFT_OFFLINE")
        except CapabilityMissing:
            host.onto_the_lists()
            mapping.advise(page, page_size, mapping.MADV_SOFT_OFFLINE, "MADV_SOFT_OFFLINE")


@contextlib.contextmanager
def _without_sigbus() -> Iterator[None]:
    before = signal.signal(signal.SIGBUS, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGBUS, before)


def _without(piece: tuple[int, int], hole: tuple[int, int]) -> list[tuple[int, int]]:
    """The parts of ``piece`` outside of ``hole``."""
    parts = [(piece[0], min(piece[1], hole[0])), (max(piece[0], hole[1]), piece[1])]
    return [(start, end) for start, end in parts if start < end]


def create(region: MemoryRegion, page_size: int, guest_memfd: int = -1, contents: int = -1) -> Memory:
    """Map what ``region`` asks for.

    :param page_size: the host's
    :param guest_memfd: for Backing.GUEST_MEMFD, the descriptor; the Memory owns it from now on
    :param contents: for Backing.FILE_PRIVATE, the file to map; it stays the caller's
    """
    memory = Memory(0, region.size, guest_memfd)
    if guest_memfd >= 0:
        memory._fds.append(guest_memfd)
    try:
        _check(region, page_size)
        _map(memory, region, page_size, contents)
        if region.backing is not Backing.DEVICE:  # all there from the beginning
            _populate(memory, region, page_size)
    except BaseException:
        memory.close()
        raise
    return memory


def _check(region: MemoryRegion, page_size: int) -> None:
    for name, value in (("gpa", region.gpa), ("size", region.size), ("hva_offset", region.hva_offset)):
        if value % page_size:
            raise UsageError(
                f"slot {region.slot}: {name} {value:#x} is not a multiple of the page size {page_size:#x}"
            )


def _map(memory: Memory, region: MemoryRegion, page_size: int, contents: int) -> None:
    huge = _huge_page_size(region, page_size)
    alignment = max(huge, hugepages.pmd_size(), page_size)
    lead = (region.gpa + region.hva_offset) % alignment
    whole, aligned = mapping.reserve(lead + region.size + huge, alignment)
    memory._pieces = [(whole, whole + lead + region.size + huge + alignment)]
    memory.hva = aligned + lead
    # hugetlb is mapped from page boundary to page boundary, whatever part of it the slot shows.
    start = memory.hva // huge * huge
    length = -(-(memory.hva + region.size - start) // huge) * huge
    fd = contents if contents >= 0 else _file(memory, region, length, huge)
    private = region.backing in (Backing.PRIVATE, Backing.THP, Backing.FILE_PRIVATE)
    offset = devmem.flash(length) if region.backing is Backing.DEVICE else 0
    mapping.map_at(start, length, shared=not private, fd=fd, offset=offset)
    if region.backing is Backing.THP:
        if hugepages.thp_mode() in ("", "never"):
            raise CapabilityMissing(
                "this host has no transparent huge pages; as root: "
                "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
            )
        mapping.advise(start, length, mapping.MADV_HUGEPAGE, "MADV_HUGEPAGE")
    elif region.backing in (Backing.PRIVATE, Backing.SHARED) and hugepages.thp_mode():
        mapping.advise(start, length, mapping.MADV_NOHUGEPAGE, "MADV_NOHUGEPAGE")


def _huge_page_size(region: MemoryRegion, page_size: int) -> int:
    """Page size of the backing: more than the host's for hugetlb only."""
    if region.backing is not Backing.HUGETLB:
        return page_size
    size = region.page_size or hugepages.default_size()
    if not size:
        raise CapabilityMissing("this kernel has no hugetlb (CONFIG_HUGETLBFS); use another backing")
    return size


def _file(memory: Memory, region: MemoryRegion, length: int, huge: int) -> int:
    """The descriptor to map, -1 for anonymous memory."""
    if region.backing is Backing.GUEST_MEMFD:
        return memory.guest_memfd
    if region.backing is Backing.HUGETLB:
        memory._reservation = hugepages.Reservation(huge, length // huge)
        flags = _MFD_HUGETLB | (huge.bit_length() - 1) << _MFD_HUGE_SHIFT
    elif region.backing is Backing.DEVICE:
        memory._fds.append(devmem.open_devmem())
        return memory._fds[-1]
    elif region.backing is Backing.SECRET:
        memory._fds.append(mapping.secret_file())
        os.ftruncate(memory.fd, length)
        return memory.fd
    elif region.backing in (Backing.FILE_PRIVATE, Backing.FILE_SHARED):
        flags = 0
    else:
        return -1
    fd = os.memfd_create(f"prefault-slot-{region.slot}", flags)
    memory._fds.append(fd)
    os.ftruncate(fd, length)
    if region.backing is Backing.FILE_PRIVATE:
        scattered = region.frames is Frames.SCATTERED
        step = os.sysconf("SC_PAGE_SIZE") if scattered else _CHUNK
        chunk = FILE_CONTENTS * (step // len(FILE_CONTENTS))
        for offset in _offsets(length, step, scattered=scattered):
            os.pwrite(fd, chunk[: length - offset], offset)
    return fd


def _offsets(size: int, step: int, *, scattered: bool) -> Sequence[int]:
    """Where each step begins, in the order in which to go there."""
    offsets = range(0, size, step)
    # Pages are handed out in order of their frames, so who asks in no order gets them in none.
    return random.Random(size).sample(offsets, len(offsets)) if scattered else offsets


def _populate(memory: Memory, region: MemoryRegion, page_size: int) -> None:
    if region.resident is Resident.READ:
        mapping.advise(memory.hva, memory.size, mapping.MADV_POPULATE_READ, "MADV_POPULATE_READ")
    if region.resident is not Resident.WRITE:
        return
    if region.frames is Frames.SCATTERED:
        cells = (ctypes.c_ubyte * memory.size).from_address(memory.hva)
        for offset in _offsets(memory.size, _huge_page_size(region, page_size), scattered=True):
            cells[offset] = cells[offset]
    mapping.advise(memory.hva, memory.size, mapping.MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE")
    if region.frames is Frames.CONTIGUOUS:
        host.make_contiguous(memory.hva, memory.size)


def close_all(memories: list[Memory]) -> None:
    """Close every one, whatever the others do."""
    with contextlib.ExitStack() as stack:
        for memory in memories:
            stack.callback(memory.close)
