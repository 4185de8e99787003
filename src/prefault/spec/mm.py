# SPDX-License-Identifier: Apache-2.0
"""Memory of the VMM's process: VMAs, its page table, and faults.

Only what KVM can see is here: which frame is behind an address, at which size, writable or not,
and which changes are announced to MMU notifiers. Every change of a translation that is there goes
``invalidate_start``, change, ``invalidate_end``; filling in what was not there needs no notice.

Mirrors: mm/memory.c, mm/gup.c, mm/huge_memory.c, mm/hugetlb.c, mm/mmu_notifier.c
"""

from __future__ import annotations

import contextlib
import errno
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from prefault.errors import EHWPOISON
from prefault.spec.memory import PhysicalMemory
from prefault.spec.steps import mark, step

WRITABLE = 1
PFN_SHIFT = 1
"""An entry of the host's page table is ``pfn << PFN_SHIFT | WRITABLE``."""

_FAULT_AROUND = 64 << 10

FaultHandler = Callable[[int, bool], bool]
"""Called with an address and whether it is written, for userfaultfd memory; False is a signal."""


class Notifier(Protocol):
    """What is told of changes. Mirrors: struct mmu_notifier_ops"""

    def invalidate_start(self, start: int, end: int) -> None:
        """Translations of [start, end) are about to change."""

    def invalidate_end(self, start: int, end: int) -> None:
        """They have."""

    def clear_young(self, start: int, end: int) -> bool:
        """Forget accesses to [start, end); whether there were any."""


@dataclass
class File:
    """A page cache: memfd, shmem, hugetlb or guest_memfd.

    :ivar shift: size of its pages
    :ivar pages: index in units of the file's page size → first frame
    :ivar fault_around: a read fault also maps neighbours that are in the cache
    """

    size: int
    shift: int
    fault_around: bool = False
    pages: dict[int, int] = field(default_factory=dict)


@dataclass
class Vma:
    """A mapping. Mirrors: struct vm_area_struct

    :ivar shared: MAP_SHARED; a private file mapping is copied on write
    :ivar pfn: first frame of a VM_PFNMAP mapping, else 0
    :ivar uncached: mapped as a device is
    :ivar secret: of a memfd_secret(2); nobody else gets at its pages
    :ivar thp: MADV_HUGEPAGE
    :ivar nohugepage: MADV_NOHUGEPAGE
    :ivar hugetlb: the file's pages are huge, of the size 1 << file.shift
    :ivar missing: userfaultfd handler for pages that are not there
    :ivar minor: userfaultfd handler for pages of the file that are not mapped
    :ivar write_protect: userfaultfd handler for writes to pages in ``Mm.uffd_wp``
    :ivar mergeable: MADV_MERGEABLE
    :ivar anon_vma: it has, or has had, pages of its own
    """

    start: int
    end: int
    shared: bool = False
    file: File | None = None
    offset: int = 0
    readable: bool = True
    writable: bool = True
    thp: bool = False
    pfn: int = 0
    uncached: bool = False
    secret: bool = False
    missing: FaultHandler | None = None
    minor: FaultHandler | None = None
    write_protect: FaultHandler | None = None
    hugetlb: bool = False
    nohugepage: bool = False
    mergeable: bool = False
    anon_vma: bool = False

    @property
    def accessible(self) -> bool:
        """Mirrors: vma_is_accessible()"""
        return self.readable or self.writable


class Mm:
    """An address space. Mirrors: struct mm_struct

    :ivar ptes: size of the entry, as a shift → number of the page in units of that → entry
    """

    def __init__(self, memory: PhysicalMemory) -> None:
        self.memory = memory
        self.page_shift = memory.page_shift
        self.page_size = memory.page_size
        self.pmd_shift = 2 * memory.page_shift - 3
        self.vmas: list[Vma] = []
        self.ptes: dict[int, dict[int, int]] = {self.page_shift: {}, self.pmd_shift: {}}
        self.notifiers: list[Notifier] = []
        self.pins: dict[int, int] = {}
        self.mapcount: Counter[int] = Counter()
        """Of anonymous frames that more than one page table or address uses: fork, KSM."""
        self.donated: set[int] = set()
        """Frames that protected guests have: this process faults on them."""
        self.uffd_wp: set[int] = set()
        """Numbers of pages that a userfaultfd handler has write-protected. Mirrors: pte_uffd_wp()"""
        self.thps: set[int] = set()
        """First frames of THPs."""
        self._huge_zero = 0
        self._next = 0x7F00_0000_0000

    # VMAs.

    def reserve(self, size: int, alignment: int) -> int:
        """Address space that nothing else has."""
        start = -(-self._next // alignment) * alignment
        self._next = start + size + alignment
        return start

    def mmap(self, vma: Vma) -> Vma:
        """mmap(2) with MAP_FIXED over nothing."""
        self.vmas.append(vma)
        if vma.file and vma.file.shift != self.page_shift:
            self.ptes.setdefault(vma.file.shift, {})
        return vma

    def vma_lookup(self, hva: int) -> Vma | None:
        """Mirrors: vma_lookup()"""
        for vma in self.vmas:
            if vma.start <= hva < vma.end:
                return vma
        return None

    def vmas_in(self, start: int, end: int) -> list[Vma]:
        """Mirrors: for_each_vma_range()"""
        return sorted(
            (one for one in self.vmas if one.start < end and start < one.end), key=lambda one: one.start
        )

    def isolate(self, start: int, end: int) -> list[Vma] | None:
        """The VMAs of [start, end), cut at its ends.

        None if an end is within a hugetlb page; it may have been cut at its start then already.

        Mirrors: split_vma(), hugetlb_vm_op_split()
        """
        for cut in (start, end):
            vma = self.vma_lookup(cut)
            if vma and vma.start < cut:
                if vma.hugetlb and vma.file and cut & ((1 << vma.file.shift) - 1):
                    return None
                self._adjust_trans_huge(vma, cut)
                tail = replace(vma, start=cut, offset=vma.offset + cut - vma.start)
                vma.end = cut
                self.vmas.append(tail)
        return self.vmas_in(start, end)

    def _adjust_trans_huge(self, vma: Vma, cut: int) -> None:
        """Before a VMA is cut, split a THP there; whether there is one is found out only afterwards.

        mm_find_pmd() asks for no more than a table of PMDs, which the VMM has for other memory near by.

        Mirrors: vma_adjust_trans_huge(), __split_huge_pmd()
        """
        size = 1 << self.pmd_shift
        start = cut & -size
        if start == cut or start < vma.start or start + size > vma.end:
            return
        if cut >> self.pmd_shift in self.ptes[self.pmd_shift]:
            self._split_pmd(cut)
        else:
            with self._invalidation(start, start + size):
                pass

    # The page table.

    def lookup(self, hva: int) -> tuple[int, int] | None:
        """The entry for an address and its size as a shift, or None."""
        for shift, entries in self.ptes.items():
            entry = entries.get(hva >> shift)
            if entry is not None:
                return entry, shift
        return None

    def pfn_of(self, hva: int, entry: int, shift: int) -> int:
        """The frame of an address within an entry."""
        return (entry >> PFN_SHIFT) + ((hva & ((1 << shift) - 1)) >> self.page_shift)

    @contextlib.contextmanager
    def _invalidation(self, start: int, end: int) -> Iterator[None]:
        for one in self.notifiers:
            one.invalidate_start(start, end)
        step("mm.change")
        yield
        for one in self.notifiers:
            one.invalidate_end(start, end)

    def _zap(self, start: int, end: int) -> None:
        """Drop all entries of [start, end), and anonymous frames with them."""
        for shift, entries in self.ptes.items():
            first, last = start >> shift, (end - 1 >> shift) + 1
            numbers = (
                range(first, last)
                if last - first < len(entries)
                else [n for n in entries if first <= n < last]
            )
            for number in numbers:
                entry = entries.pop(number, None)
                if entry is not None:
                    self.uffd_wp.discard(number)
                    self._put(number << shift, entry >> PFN_SHIFT, shift)

    def _put(self, hva: int, pfn: int, shift: int) -> None:
        """A frame is mapped once less; free it if it was anonymous and this was the last."""
        vma = self.vma_lookup(hva)
        if self._is_zero(pfn << PFN_SHIFT) or vma is None or vma.pfn:
            return
        if vma.file and vma.file.pages.get(self.index(vma, hva)) == pfn:
            return
        if self.mapcount[pfn] > 1:
            self.mapcount[pfn] -= 1
        else:
            self.memory.free(pfn, 1 << shift - self.page_shift)

    def index(self, vma: Vma, hva: int) -> int:
        """Which page of its file an address is. Mirrors: linear_page_index()"""
        assert vma.file
        return (hva - vma.start + vma.offset) >> vma.file.shift

    # Faults.

    def fault(self, hva: int, *, write: bool) -> int:
        """Make an address accessible; 0 or a negative errno. Mirrors: handle_mm_fault()"""
        vma = self.vma_lookup(hva)
        if vma is None or not vma.readable or (write and not vma.writable):
            return -errno.EFAULT
        found = self.lookup(hva)
        if found is None:
            ret = self._fault_missing(vma, hva, write)
        else:
            entry, shift = found
            ret = self._write_protected(vma, hva, entry, shift) if write and not entry & WRITABLE else 0
        if ret or not self.memory.poisoned:
            return ret
        found = self.lookup(hva)
        return -EHWPOISON if found and self.pfn_of(hva, *found) in self.memory.poisoned else 0

    def _fault_missing(self, vma: Vma, hva: int, write: bool) -> int:
        if vma.file:
            return self._fault_file(vma, hva, vma.file, write)
        if vma.missing:
            step("uffd.wait")
            return 0 if vma.missing(hva, write) else -errno.EINTR
        if self._thp_fits(vma, hva):
            vma.anon_vma = True  # before it is known whether the zero page will do
            number = hva >> self.pmd_shift
            pfn = self._allocate_pmd() if write else self._huge_zero_pfn()
            self.ptes[self.pmd_shift][number] = pfn << PFN_SHIFT | write
            return 0
        pfn = self.memory.allocate() if write else self.memory.zero_pfn
        vma.anon_vma |= write
        self.ptes[self.page_shift][hva >> self.page_shift] = pfn << PFN_SHIFT | write
        return 0

    def _fault_file(self, vma: Vma, hva: int, file: File, write: bool) -> int:
        """Mirrors: do_read_fault(), do_cow_fault(), do_shared_fault(), hugetlb_no_page()"""
        index = self.index(vma, hva)
        handler = vma.minor if index in file.pages else vma.missing
        if handler:
            step("uffd.wait")
            return 0 if handler(hva, write) else -errno.EINTR
        pfn = self.page_cache(file, index)
        if pfn is None:
            return -errno.EFAULT
        writable = vma.shared and vma.writable
        if not write and file.fault_around and not handler and not vma.minor:
            self._fault_around(vma, hva, file, writable)
        if write and not vma.shared:
            vma.anon_vma = True
            source, pfn, writable = pfn, self.memory.allocate(), True
            self.memory.copy(source, pfn)
        self.ptes[file.shift][hva >> file.shift] = pfn << PFN_SHIFT | writable
        return 0

    def _fault_around(self, vma: Vma, hva: int, file: File, writable: bool) -> None:
        """Map what is in the page cache near an address. Mirrors: do_fault_around()"""
        entries, shift = self.ptes[file.shift], file.shift
        start = max(hva & -_FAULT_AROUND, vma.start)
        end = min(start + _FAULT_AROUND, (hva >> self.pmd_shift) + 1 << self.pmd_shift, vma.end)
        for number in range(start >> shift, end >> shift):
            pfn = file.pages.get(self.index(vma, number << shift))
            if pfn is not None and number not in entries and pfn not in self.memory.poisoned:
                entries[number] = pfn << PFN_SHIFT | writable

    def page_cache(self, file: File, index: int) -> int | None:
        """The frame of a page of a file, made if it is not there; None beyond its end."""
        if index << file.shift >= file.size:
            return None
        if index not in file.pages:
            file.pages[index] = self.memory.allocate(file.shift - self.page_shift)
        return file.pages[index]

    def _thp_fits(self, vma: Vma, hva: int) -> bool:
        """Mirrors: thp_vma_suitable_order(), pmd_none()"""
        if not vma.thp:
            return False
        start = hva >> self.pmd_shift << self.pmd_shift
        if start < vma.start or start + (1 << self.pmd_shift) > vma.end:
            return False
        first, pages = start >> self.page_shift, self.ptes[self.page_shift]
        return not any(
            page in pages for page in range(first, first + (1 << self.pmd_shift - self.page_shift))
        )

    def _is_zero(self, entry: int) -> bool:
        """Mirrors: is_zero_pfn(), is_huge_zero_pfn()"""
        return entry >> PFN_SHIFT in (self.memory.zero_pfn, self._huge_zero)

    def _allocate_pmd(self) -> int:
        pfn = self.memory.allocate(self.pmd_shift - self.page_shift)
        self.thps.add(pfn)
        return pfn

    def _first_of_folio(self, pfn: int) -> int:
        """Mirrors: page_folio()"""
        first = pfn & -(1 << self.pmd_shift - self.page_shift)
        return first if first in self.thps else pfn

    def _is_thp(self, pfn: int) -> bool:
        """Whether a frame belongs to a THP, however that is mapped. Mirrors: folio_test_large()"""
        return self._first_of_folio(pfn) in self.thps

    def _huge_zero_pfn(self) -> int:
        self._huge_zero = self._huge_zero or self._allocate_pmd()
        return self._huge_zero

    def _write_protected(self, vma: Vma, hva: int, entry: int, shift: int) -> int:
        """Mirrors: do_wp_page(), do_huge_pmd_wp_page()"""
        if vma.write_protect and hva >> self.page_shift in self.uffd_wp:
            return 0 if vma.write_protect(hva, True) else -errno.EINTR
        pfn = entry >> PFN_SHIFT
        if vma.shared or self._exclusive(vma, hva, pfn):
            self.ptes[shift][hva >> shift] |= WRITABLE
            return 0
        if shift == self.pmd_shift and pfn != self._huge_zero:
            self._split_pmd(hva)
            shift, pfn = self.page_shift, self.pfn_of(hva, entry, shift)
        start = hva >> shift << shift
        with self._invalidation(start, start + (1 << shift)):
            if self.ptes[shift].get(hva >> shift) != pfn << PFN_SHIFT:
                return 0  # pte_same(): somebody else was here first.
            vma.anon_vma = True
            new = self._allocate_pmd() if shift == self.pmd_shift else self.memory.allocate()
            self.memory.copy(pfn, new, 1 << shift - self.page_shift)
            self._put(hva, pfn, shift)
            self.ptes[shift][hva >> shift] = new << PFN_SHIFT | WRITABLE
        return 0

    def _exclusive(self, vma: Vma, hva: int, pfn: int) -> bool:
        """Whether nobody else has an anonymous frame. Mirrors: PageAnonExclusive()"""
        if self._is_zero(pfn << PFN_SHIFT) or self.mapcount[pfn] > 1:
            return False
        return not (vma.file and vma.file.pages.get(self.index(vma, hva)) == pfn)

    def _split_pmd(self, hva: int) -> None:
        """Map a THP by pages. Mirrors: split_huge_pmd()"""
        shift = self.pmd_shift
        number = hva >> shift
        if number not in self.ptes[shift]:
            return
        vma = self.vma_lookup(hva)
        if vma is not None and vma.file is not None:
            return
        with self._invalidation(number << shift, number + 1 << shift):
            entry = self.ptes[shift].pop(number, None)
            if entry is None:
                return
            pfn, writable = entry >> PFN_SHIFT, entry & WRITABLE
            first = number << shift - self.page_shift
            count = 1 << shift - self.page_shift
            zero, shared = pfn == self._huge_zero, self.mapcount.pop(pfn, 0)
            for offset in range(count):
                page = self.memory.zero_pfn if zero else pfn + offset
                self.ptes[self.page_shift][first + offset] = page << PFN_SHIFT | writable
                if shared > 1:
                    self.mapcount[page] = shared

    def _split_thp(self, hva: int, pfn: int) -> None:
        """Make single pages of a THP that a frame may belong to; the zero page of those that are all zero.

        Mirrors: split_huge_page(), try_to_map_unused_to_zeropage()
        """
        first = self._first_of_folio(pfn)
        if first not in self.thps:
            return
        self._split_pmd(hva)
        entries, start = self.ptes[self.page_shift], hva - (pfn - first << self.page_shift)
        with self._invalidation(start, start + (1 << self.pmd_shift)):
            self.thps.discard(first)
            for offset in range(1 << self.pmd_shift - self.page_shift):
                number = (start >> self.page_shift) + offset
                mapped = entries.get(number, 0) >> PFN_SHIFT == first + offset
                if mapped and self.memory.identical(first + offset, self.memory.zero_pfn):
                    entries[number] = self.memory.zero_pfn << PFN_SHIFT
                    self.memory.free(first + offset)

    # GUP.

    def get_user_page_fast_only(self, hva: int) -> int | None:
        """The frame of a writable address, without faulting it in. Mirrors: get_user_page_fast_only()"""
        step("gup.fast")
        found, vma = self.lookup(hva), self.vma_lookup(hva)
        if found is None or not found[0] & WRITABLE or (vma and vma.secret):
            return None
        pfn = self.pfn_of(hva, *found)
        return None if pfn in self.memory.poisoned else self.pin(pfn)

    def get_user_page(self, hva: int, *, write: bool, interruptible: bool = False) -> int:
        """The frame of an address, faulted in if need be, or a negative errno.

        :param interruptible: give up a wait for userfaultfd if there is a signal; FOLL_INTERRUPTIBLE

        Mirrors: get_user_pages_unlocked()
        """
        while True:
            step("gup")
            vma = self.vma_lookup(hva)
            if vma is None or vma.pfn or vma.secret:
                return -errno.EFAULT
            found = self.lookup(hva)
            if found is None or (write and not found[0] & WRITABLE) or not vma.readable:
                ret = self.fault(hva, write=write)
                if ret and (ret != -errno.EINTR or interruptible):
                    return ret
                continue
            pfn = self.pfn_of(hva, *found)
            return -EHWPOISON if pfn in self.memory.poisoned else self.pin(pfn)

    def pin(self, pfn: int) -> int:
        """Take a reference to a frame."""
        self.pins[pfn] = self.pins.get(pfn, 0) + 1
        mark("page.pinned")
        return pfn

    def unpin(self, pfn: int) -> None:
        """Drop it."""
        mark("page.release")
        if self.pins[pfn] == 1:
            del self.pins[pfn]
        else:
            self.pins[pfn] -= 1

    def mapping_size(self, hva: int) -> int:
        """Bytes that the entry for an address maps, 0 if there is none. Mirrors: get_user_mapping_size()"""
        found = self.lookup(hva)
        if found is None:
            vma = self.vma_lookup(hva)
            return self.page_size if vma and vma.pfn else 0
        return 1 << found[1]
