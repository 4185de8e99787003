# SPDX-License-Identifier: Apache-2.0
"""Memslots: create, delete, move, change flags, and the dirty log.

Mirrors: virt/kvm/kvm_main.c; arch/arm64/kvm/mmu.c for the functions with kvm_arch in their name
"""

from __future__ import annotations

import dataclasses
import enum
import errno

from prefault.abi.constants import KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from prefault.spec import unmap
from prefault.spec.mm import File
from prefault.spec.state import INVALID, DirtyBitmap, KvmState, Slot
from prefault.spec.steps import step, wait

_USER_SLOTS = 32767
_MAX_PAGES = (1 << 31) - 1


class Change(enum.Enum):
    """enum kvm_mr_change."""

    CREATE = enum.auto()
    DELETE = enum.auto()
    MOVE = enum.auto()
    FLAGS_ONLY = enum.auto()


def kvm_set_memory_region(kvm: KvmState, new: Slot) -> int:
    """Mirrors: kvm_vm_ioctl_set_memory_region()"""
    kvm.slots_lock.write_lock()
    ret = _set_memory_region(kvm, new)
    kvm.slots_lock.write_unlock()
    return ret


def _set_memory_region(kvm: KvmState, new: Slot) -> int:
    """Mirrors: kvm_set_memory_region()"""
    if check_memory_region_flags(new.flags):
        return -errno.EINVAL
    mask = kvm.page_size - 1
    if (new.size | new.base | new.hva) & mask or new.base + new.size > 1 << 64:
        return -errno.EINVAL
    if new.id >= _USER_SLOTS or new.size // kvm.page_size > _MAX_PAGES:
        return -errno.EINVAL
    old = next((slot for slot in kvm.slots if slot.id == new.id), None)
    if not new.size:
        return kvm_set_memslot(kvm, old, None, Change.DELETE) if old else -errno.EINVAL
    change = kvm_memory_region_change(old, new)
    if not isinstance(change, Change):
        return change
    if change in (Change.CREATE, Change.MOVE) and _overlaps(kvm, new):
        return -errno.EEXIST
    return kvm_set_memslot(kvm, old, new, change)


def check_memory_region_flags(flags: int) -> int:
    """Mirrors: check_memory_region_flags()"""
    valid = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY
    if flags & KVM_MEM_GUEST_MEMFD:
        valid = KVM_MEM_GUEST_MEMFD
    return -errno.EINVAL if flags & ~valid else 0


def kvm_memory_region_change(old: Slot | None, new: Slot) -> Change | int:
    """What is asked for, 0 if nothing. Mirrors: the middle of kvm_set_memory_region()"""
    if old is None:
        return Change.CREATE
    if new.flags & KVM_MEM_GUEST_MEMFD:
        return -errno.EINVAL
    fixed = KVM_MEM_READONLY | KVM_MEM_GUEST_MEMFD
    if new.hva != old.hva or new.size != old.size or (new.flags ^ old.flags) & fixed:
        return -errno.EINVAL
    if new.base != old.base:
        return Change.MOVE
    return Change.FLAGS_ONLY if new.flags != old.flags else 0


def _overlaps(kvm: KvmState, new: Slot) -> bool:
    """Mirrors: kvm_check_memslot_overlap()"""
    return any(
        slot.id != new.id and slot.base < new.base + new.size and new.base < slot.base + slot.size
        for slot in kvm.slots
    )


def kvm_set_memslot(kvm: KvmState, old: Slot | None, new: Slot | None, change: Change) -> int:
    """Mirrors: kvm_set_memslot()"""
    invalid = None
    if change in (Change.DELETE, Change.MOVE):
        assert old
        invalid = dataclasses.replace(old, flags=old.flags | INVALID)
        kvm_invalidate_memslot(kvm, old, invalid)
    ret = kvm_prepare_memory_region(kvm, old, new)
    if ret:
        if invalid:
            kvm_replace_memslot(kvm, invalid, old)
        return ret
    kvm_replace_memslot(kvm, invalid or old, new)
    kvm_arch_commit_memory_region(kvm, new)
    return 0


def kvm_invalidate_memslot(kvm: KvmState, old: Slot, invalid: Slot) -> None:
    """Mark a slot as going away, then drop what is mapped through it. Mirrors: kvm_invalidate_memslot()"""
    kvm_replace_memslot(kvm, old, invalid)
    kvm_arch_flush_shadow_memslot(kvm, old)


def kvm_replace_memslot(kvm: KvmState, old: Slot | None, new: Slot | None) -> None:
    """Publish other memslots and wait for those who saw the old ones.

    Mirrors: kvm_replace_memslot(), kvm_swap_active_memslots()
    """
    step("slots.publish")
    if not kvm.host.faults.slots_during_invalidation:
        wait("slots.no_invalidation", lambda: not kvm.mn_active_invalidate_count)
    slots = [slot for slot in kvm.slots if slot is not old]
    kvm.slots = tuple([*slots, new] if new else slots)
    if not kvm.host.faults.no_srcu_wait:
        kvm.srcu.synchronize()


def kvm_prepare_memory_region(kvm: KvmState, old: Slot | None, new: Slot | None) -> int:
    """Mirrors: kvm_prepare_memory_region()"""
    if new is not None:
        if new.flags & KVM_MEM_LOG_DIRTY_PAGES and kvm.dirty_rings is None:
            new.dirty = old.dirty if old and old.dirty is not None else DirtyBitmap()
        else:
            new.dirty = None
        if old is not None:
            new.gmem = old.gmem
    return kvm_arch_prepare_memory_region(kvm, new)


def kvm_arch_prepare_memory_region(kvm: KvmState, new: Slot | None) -> int:
    """Mirrors: kvm_arch_prepare_memory_region()"""
    if kvm.protected and new is not None and new.flags & (KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY):
        return -errno.EPERM
    if new is None:
        return 0
    if kvm.mte and new.gmem:
        return -errno.EINVAL
    if new.base + new.size > 1 << kvm.mmu.pgt.ia_bits:
        return -errno.EFAULT
    pfnmap = any(vma.pfn for vma in kvm.host.mm.vmas_in(new.hva, new.hva + new.size))
    return -errno.EINVAL if pfnmap and new.flags & KVM_MEM_LOG_DIRTY_PAGES else 0


def kvm_arch_commit_memory_region(kvm: KvmState, new: Slot | None) -> None:
    """Mirrors: kvm_arch_commit_memory_region(). Eager splitting is off, as it is by default."""
    if new is None or not new.flags & KVM_MEM_LOG_DIRTY_PAGES or kvm.host.faults.log_without_protecting:
        return
    kvm.mmu_lock.write_lock()
    unmap.kvm_stage2_wp_range(kvm, kvm.mmu, new.base, new.size)
    unmap.kvm_nested_s2_wp(kvm)
    kvm.mmu_lock.write_unlock()
    step("tlb.flush")
    kvm.mmu.pgt.tlb.flush_range(new.base, new.size)


def kvm_arch_flush_shadow_memslot(kvm: KvmState, slot: Slot) -> None:
    """Mirrors: kvm_arch_flush_shadow_memslot()"""
    kvm.mmu_lock.write_lock()
    unmap.kvm_stage2_unmap_range(kvm, kvm.mmu, slot.base, slot.size)
    unmap.kvm_nested_s2_unmap(kvm)
    kvm.mmu_lock.write_unlock()


def mark_page_dirty_in_slot(kvm: KvmState, slot: Slot, page: int) -> None:
    """Mirrors: mark_page_dirty_in_slot(), on a running vCPU; ``page`` counts from the slot's start"""
    if not slot.flags & KVM_MEM_LOG_DIRTY_PAGES:
        return
    if kvm.dirty_rings is not None:
        step("dirty.push")
        kvm.dirty_rings.append((slot.id, page))
    elif slot.dirty is not None:
        step("dirty.mark")
        slot.dirty.pages.add(page)


def kvm_vm_ioctl_get_dirty_log(kvm: KvmState, number: int) -> list[int]:
    """Mirrors: kvm_vm_ioctl_get_dirty_log()"""
    kvm.slots_lock.write_lock()
    slot = next((one for one in kvm.slots if one.id == number), None)
    taken = kvm_get_dirty_log_protect(kvm, slot) if slot else []
    kvm.slots_lock.write_unlock()
    return taken


def kvm_get_dirty_log_protect(kvm: KvmState, slot: Slot) -> list[int]:
    """Take the log and write-protect what was in it. Mirrors: kvm_get_dirty_log_protect()"""
    if slot.dirty is None:
        return []
    kvm.mmu_lock.write_lock()
    taken = sorted(slot.dirty.pages)
    slot.dirty.pages.clear()
    for page in taken:
        unmap.kvm_stage2_wp_range(kvm, kvm.mmu, slot.base + page * kvm.page_size, kvm.page_size)
    if taken:
        unmap.kvm_nested_s2_wp(kvm)
    kvm.mmu_lock.write_unlock()
    if taken:
        step("tlb.flush")
        kvm.mmu.pgt.tlb.flush_range(slot.base, slot.size)
    return taken


def kvm_vm_ioctl_reset_dirty_pages(kvm: KvmState) -> list[tuple[int, int]]:
    """Take what the rings hold, and write-protect it.

    Mirrors: kvm_vm_ioctl_reset_dirty_pages(), kvm_reset_dirty_gfn(), which takes some pages together
    """
    kvm.slots_lock.write_lock()
    taken, kvm.dirty_rings = kvm.dirty_rings or [], []
    kvm.mmu_lock.write_lock()
    slots = {slot.id: slot for slot in kvm.slots}
    found = [(slots[number], page * kvm.page_size) for number, page in taken if number in slots]
    ipas = [slot.base + offset for slot, offset in found if offset < slot.size]
    for ipa in ipas:
        unmap.kvm_stage2_wp_range(kvm, kvm.mmu, ipa, kvm.page_size)
    if ipas:
        unmap.kvm_nested_s2_wp(kvm)
    kvm.mmu_lock.write_unlock()
    kvm.slots_lock.write_unlock()
    if taken:
        step("tlb.flush")
        kvm.mmu.pgt.tlb.flush_range(0, 1 << kvm.mmu.pgt.ia_bits)
    return taken


def bind_gmem(slot: Slot, file: File) -> None:
    """Put a guest_memfd behind a slot. Mirrors: kvm_gmem_prepare_memory_region()"""
    slot.gmem = file
