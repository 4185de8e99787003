# SPDX-License-Identifier: Apache-2.0
"""The memory behind a memslot, mapped as the VMM on the real KVM maps it.

The HVA has the same remainder as the gpa modulo the block size, plus ``MemoryRegion.hva_offset``.
"""

from __future__ import annotations

import os

from prefault.errors import CapabilityMissing, PrefaultError, UsageError
from prefault.machine import FILE_CONTENTS, Access, Advice, Backing, MemoryRegion, Resident
from prefault.spec.mm import File, Vma
from prefault.spec.state import Host

FLASH = 0x400_0000
"""Physical address of the second bank of flash of the lab's machine."""
_PRIVATE = (Backing.PRIVATE, Backing.THP, Backing.FILE_PRIVATE)


def create(host: Host, region: MemoryRegion) -> Vma:
    """Map what ``region`` asks for; ``hva_of`` says where the slot is in it."""
    page_size = host.config.page_size
    for name, value in (("gpa", region.gpa), ("size", region.size), ("hva_offset", region.hva_offset)):
        if value % page_size:
            raise UsageError(
                f"slot {region.slot}: {name} {value:#x} is not a multiple of the page size {page_size:#x}"
            )
    huge = _huge_page_size(host, region)
    alignment = max(huge, 1 << host.mm.pmd_shift)
    lead = (region.gpa + region.hva_offset) % alignment
    hva = host.mm.reserve(lead + region.size + huge, alignment) + lead
    # hugetlb is mapped from page boundary to page boundary, whatever part of it the slot shows.
    start = hva // huge * huge
    end = -(-(hva + region.size) // huge) * huge
    vma = Vma(start, end, shared=region.backing not in _PRIVATE, file=_file(host, region, end - start, huge))
    vma.hugetlb = region.backing is Backing.HUGETLB
    vma.nohugepage = region.backing in (Backing.PRIVATE, Backing.SHARED)
    vma.thp = region.backing is Backing.THP
    if region.backing is Backing.DEVICE:
        vma.pfn, vma.uncached = FLASH >> host.memory.page_shift, True
    vma.secret = region.backing is Backing.SECRET
    host.mm.mmap(vma)
    if region.resident is not Resident.NOTHING and not vma.pfn:
        host.mm.populate(hva, hva + region.size, write=region.resident is Resident.WRITE)
    return vma


def advise(host: Host, hva: int, size: int, advice: Advice) -> None:
    """madvise(2). KSM does nothing before ``Mm.ksm_merge``."""
    mm, end = host.mm, hva + size
    error = 0
    match advice:
        case Advice.DONTNEED:
            error = mm.dontneed(hva, end)
        case Advice.REMOVE:
            error = mm.remove(hva, end)
        case Advice.ALLOCATE:
            error = mm.allocate(hva, end)
        case Advice.POPULATE_READ | Advice.POPULATE_WRITE:
            error = mm.populate(hva, end, write=advice is Advice.POPULATE_WRITE)
        case Advice.COLLAPSE:
            error = mm.collapse(hva, end)
        case Advice.MERGEABLE:
            error = mm.advise_mergeable(hva, end)
        case Advice.HUGEPAGE | Advice.NOHUGEPAGE:
            error = mm.advise_hugepage(hva, end, wanted=advice is Advice.HUGEPAGE)
        case Advice.SOFT_OFFLINE:
            pages = range(hva, end, mm.page_size)
            size = mm.page_size  # one at a time, as the bindings do
            error = next((ret for page in pages if (ret := mm.soft_offline(page))), 0)
        case Advice.HWPOISON:
            error = next((ret for page in range(hva, end, mm.page_size) if (ret := mm.poison(page))), 0)
    if error:
        raise CapabilityMissing(
            f"madvise(MADV_{advice.name}) of {size:#x} bytes failed: {os.strerror(-error)}; "
            "this kernel lacks it, or memory is short: use another backing or less memory"
        )


def protect(host: Host, hva: int, size: int, access: Access) -> None:
    """mprotect(2)."""
    readable, writable = access is not Access.NONE, access is Access.WRITE
    error = host.mm.mprotect(hva, hva + size, readable=readable, writable=writable)
    if error:
        raise PrefaultError(
            f"mprotect of {size:#x} bytes failed: {os.strerror(-error)}; hugetlb is protected by whole pages"
        )


def unmap(host: Host, hva: int, size: int) -> None:
    """munmap(2)."""
    error = host.mm.munmap(hva, hva + size)
    if error:
        raise PrefaultError(
            f"munmap of {size:#x} bytes failed: {os.strerror(-error)}; hugetlb is unmapped by whole pages"
        )


def map_anew(host: Host, hva: int, size: int, *, secret: bool) -> None:
    """mmap(2) with MAP_FIXED, of private or of secret memory."""
    unmap(host, hva, size)
    vma = Vma(hva, hva + size, shared=secret, file=File(size, host.memory.page_shift) if secret else None)
    vma.secret = secret
    host.mm.mmap(vma)


def hva_of(host: Host, region: MemoryRegion, vma: Vma) -> int:
    """Address of the slot in its mapping."""
    huge = _huge_page_size(host, region)
    return vma.start + (region.gpa + region.hva_offset) % huge


def _huge_page_size(host: Host, region: MemoryRegion) -> int:
    if region.backing is not Backing.HUGETLB:
        return host.config.page_size
    size = region.page_size or host.config.hugetlb[0]
    if size not in host.config.hugetlb:
        known = ", ".join(hex(one) for one in host.config.hugetlb)
        raise UsageError(f"hugetlb page size {size:#x} does not exist on this host; there are: {known}")
    return size


def _file(host: Host, region: MemoryRegion, length: int, huge: int) -> File | None:
    """Shared anonymous memory is a file, too: shmem."""
    if region.backing in (Backing.PRIVATE, Backing.THP, Backing.DEVICE):
        return None
    cached = region.backing not in (Backing.HUGETLB, Backing.GUEST_MEMFD, Backing.SECRET)
    file = File(length, huge.bit_length() - 1, fault_around=cached)
    if region.backing is Backing.FILE_PRIVATE:
        contents = FILE_CONTENTS * (huge // len(FILE_CONTENTS))
        for index in range(length // huge):
            pfn = host.mm.page_cache(file, index)
            assert pfn is not None
            host.memory.frame(pfn)[:] = contents
    return file
