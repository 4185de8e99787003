# SPDX-License-Identifier: Apache-2.0
"""Taking stage-2 mappings away: MMU notifiers, and ranges of the canonical and shadow MMUs.

Mirrors: virt/kvm/kvm_main.c (kvm_mmu_notifier_*), arch/arm64/kvm/mmu.c, arch/arm64/kvm/nested.c
"""

from __future__ import annotations

from collections.abc import Iterator

from prefault.spec.descriptors import LAST_LEVEL
from prefault.spec.state import KvmState, S2Mmu
from prefault.spec.steps import Violation, mark, step


def kvm_stage2_unmap_range(kvm: KvmState, mmu: S2Mmu, ipa: int, size: int) -> None:
    """Mirrors: __unmap_stage2_range(). The lock is not dropped half-way: the steps show no more by it."""
    _must_hold(kvm)
    mmu.pgt.unmap(ipa, size)


def kvm_stage2_wp_range(kvm: KvmState, mmu: S2Mmu, ipa: int, size: int) -> None:
    """Mirrors: kvm_stage2_wp_range()"""
    _must_hold(kvm)
    mmu.pgt.wrprotect(ipa, size)
    if mmu.shadow:
        # The VMID of a shadow is flushed with all others; kvm_flush_remote_tlbs() does not name one.
        mmu.pgt.tlb.flush_range(ipa, size)


def kvm_nested_s2_unmap(kvm: KvmState) -> None:
    """Mirrors: kvm_nested_s2_unmap()"""
    if kvm.host.faults.shadow_kept:
        return
    for mmu in kvm.nested_mmus:
        if mmu.tlb_vttbr is not None:
            kvm_stage2_unmap_range(kvm, mmu, 0, 1 << mmu.pgt.ia_bits)


def stage2_unmap_vm(kvm: KvmState) -> None:
    """Take what the VMM has mapped away from the guest. Mirrors: stage2_unmap_vm(), stage2_unmap_memslot()"""
    token = kvm.srcu.read_lock()
    step("mmap_lock.read_lock")
    kvm.mmu_lock.write_lock()
    for slot in kvm.slots:
        end = slot.hva + slot.size
        for vma in kvm.host.mm.vmas_in(slot.hva, end):
            first, last = max(vma.start, slot.hva), min(vma.end, end)
            if not vma.pfn:
                kvm_stage2_unmap_range(kvm, kvm.mmu, slot.base + first - slot.hva, last - first)
    kvm_nested_s2_unmap(kvm)
    kvm.mmu_lock.write_unlock()
    kvm.srcu.read_unlock(token)


def kvm_nested_s2_wp(kvm: KvmState) -> None:
    """Mirrors: kvm_nested_s2_wp()"""
    for mmu in kvm.nested_mmus:
        if mmu.tlb_vttbr is not None:
            kvm_stage2_wp_range(kvm, mmu, 0, 1 << mmu.pgt.ia_bits)


def _must_hold(kvm: KvmState) -> None:
    """Mirrors: lockdep_assert_held_write()"""
    if not kvm.mmu_lock.writer:
        raise Violation("a stage-2 table is changed without the mmu_lock held for writing")


class KvmNotifier:
    """KVM's place among the MMU notifiers of the VMM's process. Mirrors: kvm_mmu_notifier_ops"""

    def __init__(self, kvm: KvmState) -> None:
        self._kvm = kvm

    def _ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(IPA, size) of what the memslots have of a range of HVAs. Mirrors: kvm_handle_hva_range()"""
        for slot in self._kvm.slots:
            first, last = max(start, slot.hva), min(end, slot.hva + slot.size)
            if first < last:
                yield slot.base + first - slot.hva, last - first

    def invalidate_start(self, start: int, end: int) -> None:
        """Mirrors: kvm_mmu_notifier_invalidate_range_start(), kvm_unmap_gfn_range()"""
        kvm = self._kvm
        step("notifier.start")
        kvm.mn_active_invalidate_count += 1
        ranges = list(self._ranges(start, end))
        if ranges:
            kvm.mmu_lock.write_lock()
            kvm.mmu_invalidate_in_progress += 1
            unmap_gfn_ranges(kvm, ranges)
            kvm.mmu_lock.write_unlock()

    def invalidate_end(self, start: int, end: int) -> None:
        """Mirrors: kvm_mmu_notifier_invalidate_range_end()"""
        kvm = self._kvm
        if any(True for _ in self._ranges(start, end)):
            kvm.mmu_lock.write_lock()
            if not kvm.host.faults.no_sequence_bump:
                kvm.mmu_invalidate_seq.value += 1
            kvm.mmu_invalidate_in_progress -= 1
            kvm.mmu_lock.write_unlock()
        mark("notifier.end")
        kvm.mn_active_invalidate_count -= 1

    def clear_young(self, start: int, end: int) -> bool:
        """Mirrors: kvm_mmu_notifier_clear_flush_young(), kvm_age_gfn()"""
        kvm = self._kvm
        kvm.mmu_lock.write_lock()
        young = False
        for ipa, size in self._ranges(start, end):
            young |= kvm.mmu.pgt.test_clear_young(ipa, size, mkold=True)
            kvm.mmu.pgt.tlb.flush_range(ipa, size)
        kvm.mmu_lock.write_unlock()
        return young


def unmap_gfn_ranges(kvm: KvmState, ranges: list[tuple[int, int]]) -> None:
    """Mirrors: kvm_unmap_gfn_range()"""
    if kvm.protected:
        return
    for ipa, size in ranges:
        kvm_stage2_unmap_range(kvm, kvm.mmu, ipa, size)
        kvm_nested_s2_unmap(kvm)


def kvm_gmem_punch_hole(kvm: KvmState, first: int, count: int, file: object) -> None:
    """FALLOC_FL_PUNCH_HOLE on a guest_memfd, in pages. Mirrors: kvm_gmem_punch_hole()"""
    slots = [slot for slot in kvm.slots if slot.gmem is file]
    shift = kvm.granule.shift(LAST_LEVEL)
    kvm.mmu_lock.write_lock()
    kvm.mmu_invalidate_in_progress += 1
    unmap_gfn_ranges(kvm, [(slot.base + (first << shift), count << shift) for slot in slots])
    kvm.mmu_lock.write_unlock()
    for slot in slots[:1]:
        assert slot.gmem
        for index in range(first, first + count):
            pfn = slot.gmem.pages.pop(index, None)
            if pfn is not None:
                kvm.host.memory.free(pfn)
    kvm.mmu_lock.write_lock()
    kvm.mmu_invalidate_seq.value += 1
    kvm.mmu_invalidate_in_progress -= 1
    kvm.mmu_lock.write_unlock()
