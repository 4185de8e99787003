# SPDX-License-Identifier: Apache-2.0
"""KVM_PRE_FAULT_MEMORY: the part of every architecture, then that of arm64.

Mirrors: virt/kvm/kvm_main.c, arch/arm64/kvm/mmu.c with the series
"""

from __future__ import annotations

import errno

from prefault.spec.descriptors import AF, VALID
from prefault.spec.faults import FaultDesc, gmem_abort, user_mem_abort
from prefault.spec.shortcut import prefault_resident
from prefault.spec.state import INVALID, KvmState
from prefault.spec.steps import Resched, exploring


def kvm_vcpu_pre_fault_memory(
    kvm: KvmState, gpa: int, size: int, flags: int, *, initialised: bool
) -> tuple[int, int, int]:
    """What is left of the range, and the errno. Mirrors: kvm_vcpu_pre_fault_memory()"""
    mask = kvm.page_size - 1
    end = gpa + size & (1 << 64) - 1
    if flags or (gpa | size) & mask or end <= gpa:
        return gpa, size, errno.EINVAL
    error = kvm_arch_vcpu_pre_fault_begin(kvm, initialised=initialised)
    if error:
        return gpa, size, -error
    token = kvm.srcu.read_lock()
    start, ret = gpa, 0
    while gpa < end:
        if kvm.host.signal_pending:
            ret = -errno.EINTR
            break
        ret = kvm_arch_vcpu_pre_fault_memory(kvm, gpa, end - gpa)
        if ret < 0:
            break
        gpa += ret
        if ret == kvm.page_size and not exploring():
            gpa = prefault_resident(kvm, gpa, end)
    kvm.srcu.read_unlock(token)
    return gpa, end - gpa, -ret if gpa == start else 0


def kvm_arch_vcpu_pre_fault_begin(kvm: KvmState, *, initialised: bool) -> int:
    """Mirrors: kvm_arch_vcpu_pre_fault_begin()"""
    if not initialised:
        return -errno.ENOEXEC
    return -errno.EOPNOTSUPP if kvm.protected or not kvm.host.config.pre_faults else 0


def kvm_arch_vcpu_pre_fault_memory(kvm: KvmState, gpa: int, size: int) -> int:
    """Bytes from the start of a range that are mapped now, or a negative errno.

    Mirrors: kvm_arch_vcpu_pre_fault_memory()
    """
    resched = Resched(f"pre-faulting ipa {gpa:#x}")
    while not (mapped := kvm_pre_fault_ipa(kvm, gpa)):
        if kvm.host.signal_pending:
            return -errno.EINTR
        resched.cond_resched()
    if mapped < 0 or kvm.host.faults.past_range:
        return mapped
    return min(mapped - (gpa & mapped - 1), size)


def kvm_pre_fault_ipa(kvm: KvmState, ipa: int) -> int:
    """Map an IPA as a read would, unless it is mapped. Mirrors: kvm_pre_fault_ipa()"""
    slot = kvm.slot_at(ipa)
    if slot is None:
        return -errno.ENOENT
    faults = kvm.host.faults
    if slot.flags & INVALID and not faults.invalid_slot_used:
        return 0 if faults.wait_under_srcu else -errno.EAGAIN
    size, level = kvm_pre_fault_find_leaf(kvm, ipa)
    if size and not faults.mapped_again:
        return size
    mmu = kvm.nested_mmus[0] if faults.wrong_mmu and kvm.nested_mmus else kvm.mmu
    s2fd = FaultDesc(kvm, mmu, ipa, slot, slot.hva_of(ipa), level, write=faults.write_fault, prefault=True)
    mapped = gmem_abort(s2fd) if slot.gmem else user_mem_abort(s2fd)
    # Memory that the hypervisor lets no guest have.
    return -errno.EFAULT if kvm.host.config.protected and mapped == -errno.EINVAL else mapped


def kvm_pre_fault_find_leaf(kvm: KvmState, ipa: int) -> tuple[int, int]:
    """Size of the leaf that maps an IPA, made young, or 0; and where the walk stopped.

    Mirrors: kvm_pre_fault_find_leaf()
    """
    pgt = kvm.mmu.pgt
    kvm.mmu_lock.read_lock()
    pte, level = pgt.get_leaf(ipa)
    if pte & VALID and not pte & AF:
        pgt.mkyoung(ipa)
    kvm.mmu_lock.read_unlock()
    return (pgt.granule.size(level) if pte & VALID else 0), level
