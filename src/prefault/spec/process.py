# SPDX-License-Identifier: Apache-2.0
"""The VMM's process: the system calls, and the doings of the host, that change its memory.

Mirrors: mm/madvise.c, mm/mprotect.c, mm/vma.c, mm/ksm.c, mm/khugepaged.c, mm/memory-failure.c, kernel/fork.c
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import replace

from prefault.spec.mm import PFN_SHIFT, WRITABLE, Mm, Vma
from prefault.spec.steps import step


class Process(Mm):
    """An address space with what can be asked of it."""

    def populate(self, start: int, end: int, *, write: bool) -> int:
        """MADV_POPULATE_READ, MADV_POPULATE_WRITE."""
        hva = start
        while hva < end:
            vma = self.vma_lookup(hva)
            if vma is None:
                return -errno.ENOMEM
            if vma.pfn or not (vma.writable if write else vma.readable):
                return -errno.EINVAL
            found = self.lookup(hva)
            if found is None or (write and not found[0] & WRITABLE):
                ret = self.fault(hva, write=write)
                if ret:
                    return ret
                found = self.lookup(hva)
            size = 1 << found[1] if found else self.page_size
            hva = (hva & -size) + size
        return 0

    def _has_hole(self, start: int, end: int) -> bool:
        """Whether some of a range is not mapped; the calls then fail with ENOMEM, but do the rest."""
        for vma in self.vmas_in(start, end):
            if vma.start > start:
                return True
            start = vma.end
        return start < end

    def dontneed(self, start: int, end: int) -> int:
        """MADV_DONTNEED: drop the pages of a mapping that stays; 0 or a negative errno."""
        hole = self._has_hole(start, end)
        for vma in self.vmas_in(start, end):
            ret = self._dontneed(vma, max(start, vma.start), min(end, vma.end))
            if ret:
                return ret
        return -errno.ENOMEM if hole else 0

    def _dontneed(self, vma: Vma, start: int, end: int) -> int:
        """Mirrors: madvise_dontneed_free()"""
        if vma.pfn:
            return -errno.EINVAL
        if vma.hugetlb and vma.file:
            if start & ((1 << vma.file.shift) - 1):
                return -errno.EINVAL
            end = end >> vma.file.shift << vma.file.shift
        if start == end:
            return 0
        for hva in (start, end):
            if hva & ((1 << self.pmd_shift) - 1):
                self._split_pmd(hva)
        with self._invalidation(start, end):
            self._zap(start, end)
        return 0

    @contextlib.contextmanager
    def held_dontneed(self, start: int, end: int) -> Iterator[None]:
        """MADV_DONTNEED of private memory that is in its middle as long as this is open."""
        with self._invalidation(start, end):
            yield
            self._zap(start, end)

    def remove(self, start: int, end: int) -> int:
        """MADV_REMOVE: punch a hole into the file of a shared mapping; 0 or a negative errno.

        Mirrors: madvise_remove(), shmem_fallocate(), hugetlbfs_punch_hole()
        """
        hole = self._has_hole(start, end)
        for vma in self.vmas_in(start, end):
            if not vma.shared or not vma.file:
                return -errno.EACCES if vma.file else -errno.EINVAL
            shift = vma.file.shift
            first = -(-max(start, vma.start) >> shift) << shift
            last = min(end, vma.end) >> shift << shift
            if first >= last:
                continue  # Parts of huge pages are zeroed by the kernel, which nobody here asks for.
            with self._invalidation(first, last):
                self._zap(first, last)
            for index in range(self.index(vma, first), self.index(vma, last - 1) + 1):
                pfn = vma.file.pages.pop(index, None)
                if pfn is not None:
                    self.memory.free(pfn, 1 << shift - self.page_shift)
        return -errno.ENOMEM if hole else 0

    def allocate(self, start: int, end: int) -> int:
        """fallocate(2) of the file behind a mapping; 0 or a negative errno.

        Mirrors: kvm_gmem_allocate()
        """
        for vma in self.vmas_in(start, end):
            if not vma.file:
                return -errno.EBADF
            for index in range(self.index(vma, start), self.index(vma, end - 1) + 1):
                if self.page_cache(vma.file, index) is None:
                    return -errno.ENOMEM
        return 0

    def munmap(self, start: int, end: int) -> int:
        """munmap(2); 0 or a negative errno."""
        gone = self.isolate(start, end)
        if gone is None:
            return -errno.EINVAL
        with self._invalidation(start, end):
            self._zap(start, end)
            self.vmas = [vma for vma in self.vmas if not any(vma is one for one in gone)]
        return 0

    def mprotect(self, start: int, end: int, *, readable: bool, writable: bool) -> int:
        """mprotect(2); 0 or a negative errno. Where nothing changes, nobody is told."""
        reached = start
        for vma in self.vmas_in(start, end):
            if vma.start > reached:
                break
            reached = vma.end
            if (vma.readable, vma.writable) == (readable, writable):
                continue
            first, last = max(start, vma.start), min(end, vma.end)
            parts = self.isolate(first, last)
            if parts is None:
                return -errno.EINVAL
            (part,) = parts
            with self._invalidation(first, last):
                part.readable, part.writable = readable, writable
                for shift, entries in self.ptes.items():
                    for number in [n for n in entries if first <= n << shift < last]:
                        self._protect(entries, number, shift, writable)
        self.merge_vmas()
        return -errno.ENOMEM if reached < end else 0

    def uffd_wp_range(self, start: int, end: int, *, protect: bool) -> None:
        """Write-protect pages that are there for userfaultfd, or no more. Mirrors: uffd_wp_range()"""
        entries, shift = self.ptes[self.page_shift], self.page_shift
        with self._invalidation(start, end):
            for number in [n for n in entries if start <= n << shift < end]:
                if protect:
                    self.uffd_wp.add(number)
                    entries[number] &= ~WRITABLE
                elif number in self.uffd_wp:
                    self.uffd_wp.discard(number)
                    self._protect(entries, number, shift, writable=True)

    def advise_hugepage(self, start: int, end: int, *, wanted: bool) -> int:
        """MADV_HUGEPAGE, MADV_NOHUGEPAGE; 0 or a negative errno. Mirrors: hugepage_madvise()"""
        return self._advise_vmas(start, end, thp=wanted, nohugepage=not wanted)

    def advise_mergeable(self, start: int, end: int) -> int:
        """MADV_MERGEABLE; 0 or a negative errno. What is no private memory is left alone.

        Mirrors: ksm_madvise(), ksm_compatible()
        """
        return self._advise_vmas(start, end, mergeable=True)

    def _advise_vmas(self, start: int, end: int, **flags: bool) -> int:
        """Mirrors: madvise_vma_behavior(), madvise_update_vma()"""
        for vma in self.vmas_in(start, end):
            unfit = "mergeable" in flags and (vma.shared or vma.pfn or vma.hugetlb)
            if unfit or all(getattr(vma, name) == value for name, value in flags.items()):
                continue
            first, last = max(start, vma.start), min(end, vma.end)
            parts = self.isolate(first, last)
            if parts is None:
                return -errno.EINVAL
            (part,) = parts
            for name, value in flags.items():
                setattr(part, name, value)
        self.merge_vmas()
        return -errno.ENOMEM if self._has_hole(start, end) else 0

    def merge_vmas(self) -> None:
        """Join neighbours that differ in nothing. Mirrors: vma_merge()"""
        merged: list[Vma] = []
        for vma in sorted(self.vmas, key=lambda one: one.start):
            last = merged[-1] if merged else None
            if last and last.end == vma.start:
                follows = last.offset + vma.start - last.start if vma.file else last.offset
                same = replace(
                    vma, start=last.start, end=last.end, offset=last.offset, anon_vma=last.anon_vma
                )
                if same == last and (not vma.file or follows == vma.offset):
                    last.end, last.anon_vma = vma.end, last.anon_vma or vma.anon_vma
                    continue
            merged.append(vma)
        self.vmas = merged

    def _protect(self, entries: dict[int, int], number: int, shift: int, writable: bool) -> None:
        """Mirrors: change_pte_range()"""
        vma = self.vma_lookup(number << shift)
        assert vma
        if not writable:
            entries[number] &= ~WRITABLE
        elif not vma.shared and self._exclusive(vma, number << shift, entries[number] >> PFN_SHIFT):
            entries[number] |= WRITABLE

    def fork(self) -> Process:
        """A child with the same private pages; both copy on write from now on.

        Mirrors: vma_needs_copy(), copy_page_range()
        """
        child = Process(self.memory)
        child.vmas = [replace(vma) for vma in self.vmas]
        child.ptes = {shift: {} for shift in self.ptes}
        child.mapcount = self.mapcount
        for vma in self.vmas:
            if vma.anon_vma:  # what is only read can be had from the file again
                with self._invalidation(vma.start, vma.end):
                    self._share(child, vma)
        return child

    def _share(self, child: Process, vma: Vma) -> None:
        for shift, entries in self.ptes.items():
            for number in [n for n in entries if vma.start <= n << shift < vma.end]:
                entries[number] &= ~WRITABLE
                pfn = entries[number] >> PFN_SHIFT
                self.mapcount[pfn] = max(1, self.mapcount[pfn]) + 1
                child.ptes[shift][number] = entries[number]

    def exit(self) -> None:
        """The process of a forked Mm ends."""
        for vma in list(self.vmas):
            self.munmap(vma.start, vma.end)

    def ksm_merge(self, addresses: list[int]) -> None:
        """KSM looks at the private pages at these addresses, and keeps one of those that are the same.

        Mirrors: cmp_and_merge_page()
        """
        seen: dict[bytes, int] = {}
        for hva in addresses:
            entry = self.ptes[self.page_shift].get(hva >> self.page_shift)
            pfn = self.memory.zero_pfn if entry is None else entry >> PFN_SHIFT
            if pfn == self.memory.zero_pfn:
                continue
            same = seen.setdefault(self.memory.read(pfn << self.page_shift, self.page_size), hva)
            if same != hva:
                self._merge_two_pages(same, hva)

    def _merge_two_pages(self, one: int, other: int) -> None:
        """Mirrors: try_to_merge_two_pages()"""
        stable, pfn = self._write_protect_page(one, keep=True), self._write_protect_page(other, keep=False)
        if stable is not None and pfn is not None and stable != pfn:
            self._replace_page(other, pfn, stable)

    def _write_protect_page(self, hva: int, *, keep: bool) -> int | None:
        """The frame of a page that is written to no more; None if it is gone, or pinned.

        :param keep: the page becomes KSM's. In the kernel its lock is held until then, so that a write
            meanwhile copies it; here both happen at once

        Mirrors: write_protect_page(), folio_set_stable_node()
        """
        entries, number = self.ptes[self.page_shift], hva >> self.page_shift
        with self._invalidation(hva, hva + self.page_size):
            entry = entries.get(number)
            if entry is None or entry >> PFN_SHIFT in self.pins:
                return None
            entries[number] &= ~WRITABLE
            if keep:
                # KSM's own tree holds it, too: even the last user copies on write.
                pfn = entry >> PFN_SHIFT
                self.mapcount[pfn] = max(2, self.mapcount[pfn])
        return entry >> PFN_SHIFT

    def _replace_page(self, hva: int, pfn: int, stable: int) -> None:
        """Mirrors: pages_identical(), replace_page()"""
        entries, number = self.ptes[self.page_shift], hva >> self.page_shift
        with self._invalidation(hva, hva + self.page_size):
            if entries.get(number) != pfn << PFN_SHIFT or not self.memory.identical(pfn, stable):
                return
            self._put(hva, pfn, self.page_shift)
            entries[number] = stable << PFN_SHIFT
            self.mapcount[stable] += 1

    def age(self, hva: int, size: int) -> None:
        """Forget that pages were used: the zero page and hugetlb are not tracked, a THP by its first page.

        Mirrors: page_idle_bitmap_write(), page_idle_get_folio()
        """
        end = hva + size
        while hva < end:
            vma, found = self.vma_lookup(hva), self.lookup(hva)
            shift = found[1] if found else self.page_shift
            if vma and found and not (vma.hugetlb or vma.pfn) and not self._is_zero(found[0]):
                for start, length in self._mappings_of(hva, self.pfn_of(hva, *found), shift):
                    for one in self.notifiers:
                        one.clear_young(start, start + length)
            hva = (hva >> shift) + 1 << shift

    def _mappings_of(self, hva: int, pfn: int, shift: int) -> Iterator[tuple[int, int]]:
        """Where all of a folio is mapped, of whose first page hva is an address; nothing for its other pages.

        Mirrors: page_idle_clear_pte_refs_one(), rmap_walk_ksm()
        """
        entries, first = self.ptes[self.page_shift], hva >> self.page_shift
        if pfn != self._first_of_folio(pfn):
            return
        if shift != self.page_shift:
            yield hva, 1 << shift
        elif self._is_thp(pfn):  # by pages: the page table was split, not the THP
            for offset in range(1 << self.pmd_shift - self.page_shift):
                entry = entries.get(first + offset)
                if entry is not None and entry >> PFN_SHIFT == pfn + offset:
                    yield hva + (offset << self.page_shift), self.page_size
        else:
            for number in [n for n, entry in entries.items() if entry >> PFN_SHIFT == pfn]:
                yield number << self.page_shift, self.page_size

    def poison(self, hva: int) -> int:
        """MADV_HWPOISON: the page is unmapped, and faults on it say so; 0 or a negative errno."""
        if self.populate(hva, hva + self.page_size, write=False):
            return -errno.EFAULT  # as from get_user_pages_fast()
        self._split_pmd(hva)
        found = self.lookup(hva)
        assert found
        pfn = self.pfn_of(hva, *found)
        if pfn == self.memory.zero_pfn:
            return -errno.EBUSY
        start = hva >> found[1] << found[1]
        with self._invalidation(start, start + (1 << found[1])):
            self.memory.poisoned.add(pfn)
        return 0

    def soft_offline(self, hva: int) -> int:
        """MADV_SOFT_OFFLINE: migrate a page, which may be one of hugetlb; 0 or a negative errno.

        Mirrors: soft_offline_in_use_page(), try_to_migrate(), remove_migration_ptes()
        """
        if self.populate(hva, hva + self.page_size, write=False):
            return -errno.EFAULT  # as from get_user_pages_fast()
        found, vma = self.lookup(hva), self.vma_lookup(hva)
        assert found
        assert vma
        if self._is_zero(found[0]):
            return -errno.EIO if found[1] == self.pmd_shift else -errno.ENOTRECOVERABLE
        if not vma.hugetlb:
            self._split_thp(hva, self.pfn_of(hva, *found))
            found = self.ptes[self.page_shift][hva >> self.page_shift], self.page_shift
            if self._is_zero(found[0]):
                return 0  # it was all zero, and is mapped nowhere any more
        entry, shift = found
        start, order = hva >> shift << shift, shift - self.page_shift
        with self._invalidation(start, start + (1 << shift)):
            old, new = entry >> PFN_SHIFT, self.memory.allocate(order)
            self.memory.copy(old, new, 1 << order)
            if vma.file and vma.file.pages.get(self.index(vma, hva)) == old:
                vma.file.pages[self.index(vma, hva)] = new
            self.ptes[shift][hva >> shift] = new << PFN_SHIFT | entry & WRITABLE
            self.memory.free(old, 1 << order)
        return 0

    def collapse(self, start: int, end: int) -> int:
        """MADV_COLLAPSE on private anonymous memory; 0 or a negative errno. Mirrors: collapse_huge_page()"""
        size = 1 << self.pmd_shift
        for one in self.vmas_in(start, end):
            room = -(-one.start // size) * size + size <= one.end
            if one.file or one.nohugepage or not room or not one.anon_vma:
                return -errno.EINVAL
        for hva in range(-(-start // size) * size, end - size + 1, size):
            vma = self.vma_lookup(hva)
            if vma is None or vma.start > hva or vma.end < hva + size:
                return -errno.EINVAL
            if hva >> self.pmd_shift not in self.ptes[self.pmd_shift] and not self._collapse(hva):
                return -errno.EINVAL
        return 0

    def _collapse(self, hva: int) -> bool:
        """Put the pages of a PMD into one THP."""
        entries, count = self.ptes[self.page_shift], 1 << self.pmd_shift - self.page_shift
        first = hva >> self.page_shift
        there = [number for number in range(first, first + count) if number in entries]
        if not there:
            return False
        with self._invalidation(hva, hva + (1 << self.pmd_shift)):
            huge = self._allocate_pmd()
            for number in there:
                pfn = entries.pop(number) >> PFN_SHIFT
                self.memory.copy(pfn, huge + number - first)
                self._put(number << self.page_shift, pfn, self.page_shift)
            self.ptes[self.pmd_shift][hva >> self.pmd_shift] = huge << PFN_SHIFT | WRITABLE
        return True

    # Bytes, as the VMM itself reads and writes them.

    def read(self, hva: int, size: int) -> bytes:
        """Read memory, faulting it in."""
        return b"".join(self.memory.read(pa, length) for pa, length in self._accesses(hva, size, write=False))

    def write(self, hva: int, data: bytes) -> None:
        """Write memory, faulting it in."""
        done = 0
        for pa, length in self._accesses(hva, len(data), write=True):
            self.memory.write(pa, data[done : done + length])
            done += length

    def _accesses(self, hva: int, size: int, *, write: bool) -> Iterator[tuple[int, int]]:
        end = hva + size
        while hva < end:
            step("mm.access")
            found = self.lookup(hva)
            if found is None or (write and not found[0] & WRITABLE):
                ret = self.fault(hva, write=write)
                if ret:
                    raise OSError(-ret, f"no memory at hva {hva:#x}")
                continue
            if self.donated and self.pfn_of(hva, *found) in self.donated:
                raise OSError(errno.EFAULT, f"the memory at hva {hva:#x} is a protected guest's")
            length = min(end - hva, self.page_size - hva % self.page_size)
            yield self.pfn_of(hva, *found) << self.page_shift | hva % self.page_size, length
            hva += length
