# SPDX-License-Identifier: Apache-2.0
"""Hosts with kvm-arm.mode=protected: protected VMs, whose memory the host gives away.

Of a non-protected VM on such a host the spec has the table that the hypervisor has. Whether it can be
pre-faulted, and debugfs shows it, is HostConfig.pkvm_pre_faults: the series does both. Of protected VMs
neither is true.

Mirrors: pkvm_mem_abort() in arch/arm64/kvm/mmu.c
"""

from __future__ import annotations

import errno

from prefault.errors import EHWPOISON
from prefault.spec.descriptors import Prot
from prefault.spec.faults import FaultDesc
from prefault.spec.state import KvmState


def pkvm_mem_abort(s2fd: FaultDesc) -> int:
    """Donate a page to a protected guest: it is pinned for good and no longer the host's to touch.

    Mirrors: pkvm_mem_abort()
    """
    kvm = s2fd.kvm
    mm, page_size = kvm.host.mm, kvm.page_size
    pfn = mm.get_user_page(s2fd.hva, write=True)
    if pfn == -EHWPOISON:
        kvm.host.send_sigbus()
        return 0
    if pfn < 0:
        return -errno.EFAULT
    kvm.mmu_lock.write_lock()
    phys = pfn << kvm.granule.page_shift
    ipa = s2fd.fault_ipa & -page_size
    ret = s2fd.mmu.pgt.map(ipa, page_size, phys, Prot.R | Prot.W | Prot.X, kvm.allocate)
    if not ret:
        mm.donated.add(pfn)
    kvm.mmu_lock.write_unlock()
    if ret:
        mm.unpin(pfn)
        return 0 if ret == -errno.EAGAIN else ret
    return page_size


def pkvm_destroy_hyp_vm(kvm: KvmState) -> None:
    """The pages of a protected VM are the host's again, wiped. Mirrors: pkvm_destroy_hyp_vm()"""
    mm, memory = kvm.host.mm, kvm.host.memory
    for _, _, pte in kvm.mmu.pgt.leaves():
        pfn = kvm.granule.to_phys(pte) >> kvm.granule.page_shift
        if pfn in mm.donated:
            mm.donated.remove(pfn)
            memory.frames.pop(pfn, None)
            mm.unpin(pfn)
