# SPDX-License-Identifier: Apache-2.0
"""The stage-2 fault handlers: one for ordinary memslots, one for guest_memfd.

A handler returns the size of the mapping that it has left behind, 0 if the access has to be tried
again because of a race, or a negative errno.

Mirrors: arch/arm64/kvm/mmu.c with the series
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from prefault.abi.constants import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from prefault.errors import EHWPOISON
from prefault.spec import faultin
from prefault.spec.descriptors import NV_LEVEL, Prot
from prefault.spec.memslots import mark_page_dirty_in_slot
from prefault.spec.mm import Vma
from prefault.spec.nested import S2Translation
from prefault.spec.state import KvmState, S2Mmu, Slot
from prefault.spec.steps import Sample, step

MemoryFaultInfo = tuple[int, int]
"""(gpa, size) for KVM_EXIT_MEMORY_FAULT."""


@dataclass(slots=True)
class FaultDesc:
    """Mirrors: struct kvm_s2_fault_desc

    :ivar level: where the walk of the stage-2 table stopped
    :ivar perm: there is a leaf, but it does not allow the access
    :ivar prefault: nobody made the access; there is no guest to report to
    :ivar memory_fault: set by a handler that fails with a memory fault exit
    """

    kvm: KvmState
    mmu: S2Mmu
    fault_ipa: int
    slot: Slot
    hva: int
    level: int
    nested: S2Translation | None = None
    write: bool = False
    exec: bool = False
    perm: bool = False
    prefault: bool = False
    memory_fault: MemoryFaultInfo | None = None


@dataclass(slots=True)
class VmaInfo:
    """Mirrors: struct kvm_s2_fault_vma_info"""

    mmu_seq: Sample
    size: int
    max_map_size: int
    ipa: int
    device: bool = False
    non_cacheable: bool = False
    pfn: int = 0
    map_writable: bool = False
    pinned: bool = False


def memslot_is_logging(slot: Slot) -> bool:
    """Mirrors: memslot_is_logging()"""
    return slot.dirty is not None and not slot.flags & KVM_MEM_READONLY


def adjust_nested_fault_perms(nested: S2Translation, prot: int) -> int:
    """Mirrors: adjust_nested_fault_perms()"""
    if not nested.writable:
        prot &= ~Prot.W
    if not nested.readable:
        prot &= ~Prot.R
    return prot | nested.level << 56 & NV_LEVEL


def adjust_nested_exec_perms(nested: S2Translation, prot: int) -> int:
    """Mirrors: adjust_nested_exec_perms()"""
    return prot & ~(Prot.X & ~nested.exec)


def kvm_fault_lock(kvm: KvmState) -> None:
    """The mappings of a protected host are a tree that has one writer. Mirrors: kvm_fault_lock()"""
    if kvm.host.config.protected:
        kvm.mmu_lock.write_lock()
    else:
        kvm.mmu_lock.read_lock()


def kvm_fault_unlock(kvm: KvmState) -> None:
    """Mirrors: kvm_fault_unlock()"""
    if kvm.host.config.protected:
        kvm.mmu_lock.write_unlock()
    else:
        kvm.mmu_lock.read_unlock()


# guest_memfd.


def gmem_abort(s2fd: FaultDesc) -> int:
    """Mirrors: gmem_abort()"""
    kvm, nested = s2fd.kvm, s2fd.nested
    ipa = nested.output & -kvm.page_size if nested else s2fd.fault_ipa
    step("seq.sample")
    seq = kvm.mmu_invalidate_seq.sample()
    pfn = faultin.kvm_gmem_get_pfn(kvm, s2fd.slot, ipa)
    if pfn < 0:
        return _gmem_error(s2fd, pfn)
    prot = _gmem_prot(s2fd)
    kvm_fault_lock(kvm)
    ret = -errno.EAGAIN
    if not kvm.invalidate_retry(seq):
        if s2fd.perm:
            ret = s2fd.mmu.pgt.relax_perms(s2fd.fault_ipa, prot & ~NV_LEVEL)
        else:
            phys = pfn << kvm.host.memory.page_shift
            ret = s2fd.mmu.pgt.map(s2fd.fault_ipa & -kvm.page_size, kvm.page_size, phys, prot, kvm.allocate)
    faultin.kvm_release_faultin_page(kvm.host.mm, pfn, pinned=True)
    kvm_fault_unlock(kvm)
    if ret:
        return ret if ret != -errno.EAGAIN else 0
    if prot & Prot.W:
        mark_page_dirty_in_slot(kvm, s2fd.slot, (ipa - s2fd.slot.base) // kvm.page_size)
    return kvm.page_size


def _gmem_error(s2fd: FaultDesc, error: int) -> int:
    """Mirrors: kvm_prefault_gmem_error(), kvm_prepare_memory_fault_exit()"""
    if not s2fd.prefault:
        s2fd.memory_fault = (s2fd.fault_ipa, s2fd.kvm.page_size)
        return error
    return error if error in (-EHWPOISON, -errno.EINTR, -errno.ENOMEM) else -errno.EFAULT


def _gmem_prot(s2fd: FaultDesc) -> int:
    prot = Prot.R if s2fd.slot.flags & KVM_MEM_READONLY else Prot.R | Prot.W
    if s2fd.nested:
        prot = adjust_nested_fault_perms(s2fd.nested, prot)
    if s2fd.exec or s2fd.kvm.dic:
        prot |= Prot.X
    return adjust_nested_exec_perms(s2fd.nested, prot) if s2fd.nested else prot


# Ordinary memslots.


def user_mem_abort(s2fd: FaultDesc) -> int:
    """Mirrors: user_mem_abort()"""
    s2vi = kvm_s2_fault_pin_pfn(s2fd)
    if isinstance(s2vi, int):
        return s2vi
    prot = kvm_s2_fault_compute_prot(s2fd, s2vi)
    return kvm_s2_fault_map(s2fd, s2vi, prot) if prot > 0 else prot


def kvm_s2_fault_pin_pfn(s2fd: FaultDesc) -> VmaInfo | int:
    """Mirrors: kvm_s2_fault_pin_pfn()"""
    s2vi = kvm_s2_fault_get_vma_info(s2fd)
    if isinstance(s2vi, int):
        return s2vi
    found = faultin.kvm_faultin_pfn(
        s2fd.kvm,
        s2fd.slot,
        get_canonical_ipa(s2fd, s2vi),
        write=s2fd.write,
        interruptible=s2fd.prefault,
    )
    if isinstance(found, int):
        if s2fd.prefault:
            return found
        if found == -EHWPOISON:
            s2fd.kvm.host.send_sigbus()
            return 0
        return -errno.EFAULT
    s2vi.pfn, s2vi.map_writable, s2vi.pinned = found
    s2vi.device = not s2vi.pinned
    if s2fd.kvm.host.faults.sequence_after_pin:
        step("seq.sample")
        s2vi.mmu_seq = s2fd.kvm.mmu_invalidate_seq.sample()
    return s2vi


def kvm_s2_fault_get_vma_info(s2fd: FaultDesc) -> VmaInfo | int:
    """Mirrors: kvm_s2_fault_get_vma_info()"""
    kvm = s2fd.kvm
    step("mmap_lock.read_lock")
    vma = kvm.host.mm.vma_lookup(s2fd.hva)
    if vma is None or (s2fd.prefault and not vma.accessible):
        return -errno.EFAULT
    size, max_map_size = kvm_s2_resolve_vma_size(s2fd, vma)
    # The mmap_lock is held: no VMA changes between the lookup and the sample.
    seq = kvm.mmu_invalidate_seq.sample()
    return VmaInfo(seq, size, max_map_size, s2fd.fault_ipa & -size, non_cacheable=vma.uncached)


def kvm_s2_resolve_vma_size(s2fd: FaultDesc, vma: Vma) -> tuple[int, int]:
    """The size that the VMA calls for, and the largest that is allowed. Mirrors: kvm_s2_resolve_vma_size()"""
    granule = s2fd.kvm.granule
    page, pmd, pud = granule.page_size, granule.size(2), granule.size(1)
    size, max_size = page, page
    if not memslot_is_logging(s2fd.slot):
        size, max_size = (1 << vma.file.shift if vma.hugetlb and vma.file else page), pud
    if size == pud and (s2fd.mmu.pgt.start_level > 1 or not fault_supports_stage2_huge_mapping(s2fd, pud)):
        size = pmd
    # Contiguous PMDs are mapped as PMDs, contiguous PTEs as pages.
    size = pmd if pmd < size < pud else size
    if size == pmd and not fault_supports_stage2_huge_mapping(s2fd, pmd):
        size, max_size = page, page
    if page < size < pmd:
        size, max_size = page, page
    if s2fd.nested:
        max_size = _host_size(min(s2fd.nested.size, max_size, pud), page, pmd, pud)
        size = min(size, max_size)
    return size, max_size


def _host_size(size: int, page: int, pmd: int, pud: int) -> int:
    """The next size that the host has, not above the one of L1."""
    return pud if size >= pud else pmd if size >= pmd else page


def fault_supports_stage2_huge_mapping(s2fd: FaultDesc, size: int) -> bool:
    """Mirrors: fault_supports_stage2_huge_mapping()"""
    slot, mask = s2fd.slot, size - 1
    if s2fd.kvm.host.config.protected and size != s2fd.kvm.granule.size(2):
        return False
    if (slot.base ^ slot.hva) & mask:
        return False
    start = s2fd.hva & ~mask
    return start >= slot.hva and start + size <= slot.hva + slot.size


def get_canonical_ipa(s2fd: FaultDesc, s2vi: VmaInfo) -> int:
    """Mirrors: get_canonical_gfn()"""
    return s2fd.nested.output & -s2vi.size if s2fd.nested else s2vi.ipa


def kvm_s2_fault_maps_writable(s2fd: FaultDesc, s2vi: VmaInfo) -> bool:
    """Mirrors: kvm_s2_fault_maps_writable()"""
    if not s2vi.map_writable:
        return False
    if s2fd.prefault:
        return not s2fd.slot.flags & KVM_MEM_LOG_DIRTY_PAGES or s2fd.kvm.host.faults.log_ignored
    return s2vi.device or not memslot_is_logging(s2fd.slot) or s2fd.write


def kvm_s2_fault_compute_prot(s2fd: FaultDesc, s2vi: VmaInfo) -> int:
    """Mirrors: kvm_s2_fault_compute_prot()"""
    if s2fd.exec and s2vi.non_cacheable:
        return -errno.ENOEXEC
    prot = Prot.R | Prot.W if kvm_s2_fault_maps_writable(s2fd, s2vi) else Prot.R
    if s2fd.nested:
        prot = adjust_nested_fault_perms(s2fd.nested, prot)
    if s2fd.exec or (s2fd.kvm.dic and not s2vi.non_cacheable):
        prot |= Prot.X
    return adjust_nested_exec_perms(s2fd.nested, prot) if s2fd.nested else prot


def kvm_s2_fault_map(s2fd: FaultDesc, s2vi: VmaInfo, prot: int) -> int:
    """Mirrors: kvm_s2_fault_map()"""
    kvm, faults = s2fd.kvm, s2fd.kvm.host.faults
    size = s2vi.size
    kvm_fault_lock(kvm)
    ret = -errno.EAGAIN
    if not kvm.invalidate_retry(s2vi.mmu_seq):
        if faults.lock_dropped:
            kvm_fault_unlock(kvm)
            kvm_fault_lock(kvm)
        size = _mapping_size(s2fd, s2vi)
        ret = _install(s2fd, s2vi, size, prot) if size > 0 else size
    if not (ret and faults.page_leaked):
        faultin.kvm_release_faultin_page(kvm.host.mm, s2vi.pfn, pinned=s2vi.pinned)
    kvm_fault_unlock(kvm)
    if ret:
        return ret if ret != -errno.EAGAIN else 0
    if prot & Prot.W or (s2fd.prefault and faults.dirty_marked):
        ipa = get_canonical_ipa(s2fd, s2vi) & -size
        mark_page_dirty_in_slot(kvm, s2fd.slot, (ipa - s2fd.slot.base) // kvm.page_size)
    return size


def _mapping_size(s2fd: FaultDesc, s2vi: VmaInfo) -> int:
    """The size to map, that of a THP if one is there; a negative errno."""
    page = s2fd.kvm.page_size
    if s2vi.size != page or s2vi.max_map_size == page:
        return s2vi.size
    if s2fd.perm and s2fd.kvm.granule.size(s2fd.level) > page:
        return s2fd.kvm.granule.size(s2fd.level)
    return transparent_hugepage_adjust(s2fd)


def transparent_hugepage_adjust(s2fd: FaultDesc) -> int:
    """Mirrors: transparent_hugepage_adjust()"""
    kvm = s2fd.kvm
    pmd = kvm.granule.size(2)
    if not fault_supports_stage2_huge_mapping(s2fd, pmd):
        return kvm.page_size
    step("host.walk")
    size = kvm.host.mm.mapping_size(s2fd.hva)
    if not size:
        return -errno.EAGAIN
    return pmd if size >= pmd else kvm.page_size


def _install(s2fd: FaultDesc, s2vi: VmaInfo, size: int, prot: int) -> int:
    kvm = s2fd.kvm
    granule = kvm.granule
    ipa = s2vi.ipa & -size
    if s2fd.perm and size == granule.size(s2fd.level):
        return s2fd.mmu.pgt.relax_perms(ipa, prot & ~NV_LEVEL)
    if s2vi.device and kvm.host.config.protected:
        return -errno.EINVAL  # the hypervisor has no guest use what is not memory
    phys = (s2vi.pfn << granule.page_shift) & -size
    return s2fd.mmu.pgt.map(ipa, size, phys, prot, kvm.allocate)
