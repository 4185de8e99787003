# SPDX-License-Identifier: Apache-2.0
"""Nested guests: L1's own stage-2 tables, and the pool of shadow MMUs that KVM keeps for L2.

Mirrors: arch/arm64/kvm/nested.c, the TLBI handlers of arch/arm64/kvm/sys_regs.c
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from prefault.spec import descriptors
from prefault.spec.descriptors import AF, NV_LEVEL, S2AP_R, S2AP_W, VALID, Granule
from prefault.spec.state import KvmState, S2Mmu
from prefault.spec.steps import Violation
from prefault.spec.unmap import kvm_stage2_unmap_range

PA_BITS = 48
"""What L1 is shown as PARange: nested stage 2 does not do 52 bits."""
MMUS_PER_VCPU = 2
"""S2_MMU_PER_VCPU."""

HCR_VM = 1 << 0
VTTBR_CNP = 1 << 0
FSC_ADDRSZ, FSC_FAULT, FSC_ACCESS, FSC_PERM, FSC_SEA_TTW = 0x00, 0x04, 0x08, 0x0C, 0x14

_SHIFT_OF_TLBI_TG = {1: 12, 2: 14, 3: 16}
_TTL_TG = {shift: tg for tg, shift in _SHIFT_OF_TLBI_TG.items()}
_TTL_DEFAULT = 1 << 30
_GRANULE_OF_TG0 = {0: 12, 1: 16, 2: 14, 3: 16}
_PS_BITS = (32, 36, 40, 42, 44, 48, 52, 56)


@dataclass(slots=True)
class S2Translation:
    """Mirrors: struct kvm_s2_trans"""

    output: int
    size: int
    level: int
    readable: bool
    writable: bool
    exec: int
    """Prot.PX and Prot.UX."""


@dataclass(slots=True)
class S2WalkFault:
    """A fault that L1 has to be told of: the status code for its ESR_EL2."""

    fsc: int


class GuestWalk:
    """A walk of L1's tables. Mirrors: struct s2_walk_info

    :param vtcr: L1's VTCR_EL2
    :param vttbr: L1's VTTBR_EL2
    """

    def __init__(self, kvm: KvmState, vtcr: int, vttbr: int) -> None:
        self._kvm = kvm
        self._granule = Granule(_GRANULE_OF_TG0[vtcr >> 14 & 3])
        self._base = vttbr
        self._input_bits = 64 - (vtcr & 0x3F)
        self._start_level = (2 if self._granule.page_shift == 12 else 3) - (vtcr >> 6 & 3)
        limit = kvm.host.config.ipa_limit
        self._output_bits = min(limit, _PS_BITS[vtcr >> 16 & 7])

    def walk(self, ipa: int) -> S2Translation | S2WalkFault | int:
        """What an L2 IPA is to L1. Mirrors: walk_nested_s2_pgd()"""
        granule, level = self._granule, self._start_level
        top, shift = self._input_bits, granule.shift(level)
        if not 25 <= top <= 48 or top > PA_BITS or not 1 <= top - shift <= granule.stride + 4:
            return -errno.EFAULT
        base = self._base & (1 << 48) - (1 << 3 + top - shift)
        if self._too_large(base):
            return S2WalkFault(FSC_ADDRSZ)
        while True:
            index = (ipa & (1 << top) - 1) >> shift
            desc = self._kvm_read_guest(base | index << 3)
            if desc is None:
                return -errno.EFAULT
            if not desc & VALID or (level == 3 and not desc & descriptors.TABLE):
                return S2WalkFault(FSC_FAULT | level & 3)
            if level == 3 or not desc & descriptors.TABLE:
                return self._leaf(ipa, desc, level)
            if self._too_large(desc):
                return S2WalkFault(FSC_ADDRSZ | level & 3)
            base = desc & (1 << 48) - granule.page_size
            level, top = level + 1, shift
            shift = granule.shift(level)

    def _leaf(self, ipa: int, desc: int, level: int) -> S2Translation | S2WalkFault:
        if level < self._granule.min_block_level:
            return S2WalkFault(FSC_FAULT | level & 3)
        if self._too_large(desc):
            return S2WalkFault(FSC_ADDRSZ | level & 3)
        if not desc & AF:
            return S2WalkFault(FSC_ACCESS | level & 3)
        size = self._granule.size(level)
        output = desc & (1 << 48) - size | ipa & size - 1
        exec_ = descriptors.executable(desc)
        return S2Translation(output, size, level, bool(desc & S2AP_R), bool(desc & S2AP_W), exec_)

    def _too_large(self, pa: int) -> bool:
        """Mirrors: check_output_size()"""
        return self._output_bits < 48 and bool(pa & (1 << 48) - (1 << self._output_bits))

    def _kvm_read_guest(self, ipa: int) -> int | None:
        """Mirrors: kvm_read_guest(), which goes through the VMM's memory and not through stage 2"""
        slot = self._kvm.slot_at(ipa)
        if slot is None:
            return None
        try:
            return int.from_bytes(self._kvm.host.mm.read(slot.hva_of(ipa), 8), "little")
        except OSError:
            return None


def kvm_vcpu_init_nested(kvm: KvmState, vcpus: int) -> None:
    """Grow the pool of shadow MMUs. Mirrors: kvm_vcpu_init_nested()"""
    config = kvm.host.config
    while len(kvm.nested_mmus) < vcpus * MMUS_PER_VCPU:
        bits = min(PA_BITS, config.ipa_limit)
        kvm.nested_mmus.append(S2Mmu(kvm.host.memory, config.granule, bits, shadow=True))


def lookup_s2_mmu(kvm: KvmState, vttbr: int, vtcr: int, hcr: int) -> S2Mmu | None:
    """Mirrors: lookup_s2_mmu()"""
    for mmu in kvm.nested_mmus:
        if mmu.tlb_vttbr is None or mmu.nested_stage2_enabled != bool(hcr & HCR_VM):
            continue
        if mmu.nested_stage2_enabled and (vttbr, vtcr) == (mmu.tlb_vttbr, mmu.tlb_vtcr):
            return mmu
        if not mmu.nested_stage2_enabled and vttbr >> 48 == mmu.tlb_vttbr >> 48:
            return mmu
    return None


def get_s2_mmu_nested(kvm: KvmState, vttbr: int, vtcr: int, hcr: int) -> S2Mmu:
    """The shadow MMU for what L1 has set up, taken from the pool if there is none yet.

    Mirrors: get_s2_mmu_nested()
    """
    vttbr &= ~VTTBR_CNP
    kvm.mmu_lock.write_lock()
    mmu = lookup_s2_mmu(kvm, vttbr, vtcr, hcr)
    if mmu is None:
        mmu = _recycle(kvm)
        mmu.tlb_vttbr, mmu.tlb_vtcr = vttbr, vtcr
        mmu.nested_stage2_enabled = bool(hcr & HCR_VM)
    mmu.refcnt += 1
    kvm.mmu_lock.write_unlock()
    return mmu


def check_nested_vcpu_requests(kvm: KvmState, mmu: S2Mmu) -> None:
    """Before a vCPU runs on a recycled shadow, drop what it had. Mirrors: check_nested_vcpu_requests()"""
    if mmu.pending_unmap:
        kvm.mmu_lock.write_lock()
        if mmu.pending_unmap:
            kvm_stage2_unmap_range(kvm, mmu, 0, 1 << mmu.pgt.ia_bits)
            mmu.pending_unmap = False
        kvm.mmu_lock.write_unlock()


def _recycle(kvm: KvmState) -> S2Mmu:
    """The next shadow MMU that nobody runs on."""
    size = len(kvm.nested_mmus)
    for offset in range(size):
        index = kvm.nested_mmus_next + offset
        mmu = kvm.nested_mmus[index % size]
        if not mmu.refcnt:
            kvm.nested_mmus_next = (index + 1) % size
            mmu.pending_unmap = mmu.tlb_vttbr is not None
            return mmu
    raise Violation("no shadow MMU is free: BUG_ON() in get_s2_mmu_nested()")


def put_s2_mmu(mmu: S2Mmu) -> None:
    """Mirrors: kvm_vcpu_put_hw_mmu()"""
    if mmu.shadow:
        mmu.refcnt -= 1


# TLB invalidation by L1.


def kvm_s2_mmu_iterate_by_vmid(kvm: KvmState, vttbr: int, tlbi_callback: Callable[[S2Mmu], None]) -> None:
    """Mirrors: kvm_s2_mmu_iterate_by_vmid()"""
    kvm.mmu_lock.write_lock()
    for mmu in kvm.nested_mmus:
        if mmu.tlb_vttbr is not None and mmu.tlb_vttbr >> 48 == vttbr >> 48:
            tlbi_callback(mmu)
    kvm.mmu_lock.write_unlock()


def handle_vmalls12e1(kvm: KvmState, vttbr: int, _: int = 0) -> None:
    """TLBI VMALLS12E1: drop all of every shadow of the VMID. Mirrors: handle_vmalls12e1is()"""
    kvm_s2_mmu_iterate_by_vmid(kvm, vttbr, lambda mmu: _s2_mmu_unmap(kvm, mmu, 0, 1 << PA_BITS))


def handle_ipas2e1(kvm: KvmState, vttbr: int, value: int) -> None:
    """TLBI IPAS2E1. Mirrors: handle_ipas2e1is(), s2_mmu_unmap_ipa()"""

    def unmap_ipa(mmu: S2Mmu) -> None:
        size = compute_tlb_inval_range(mmu, value)
        _s2_mmu_unmap(kvm, mmu, _ipa_of(value) & -size, size)

    kvm_s2_mmu_iterate_by_vmid(kvm, vttbr, unmap_ipa)


def handle_ripas2e1(kvm: KvmState, vttbr: int, value: int) -> None:
    """TLBI RIPAS2E1. Mirrors: handle_ripas2e1is(), decode_range_tlbi()"""
    shift = _SHIFT_OF_TLBI_TG.get(value >> 46 & 3, 16)
    base = (value & (1 << 37) - 1) << shift
    size = (value >> 39 & 31) + 1 << 5 * (value >> 44 & 3) + 1 + shift
    if base >> PA_BITS == 0:
        kvm_s2_mmu_iterate_by_vmid(kvm, vttbr, lambda mmu: _s2_mmu_unmap(kvm, mmu, base, size))


def _s2_mmu_unmap(kvm: KvmState, mmu: S2Mmu, ipa: int, size: int) -> None:
    """Mirrors: s2_mmu_unmap_range()"""
    end = min(ipa + size, 1 << mmu.pgt.ia_bits)
    if ipa < end:
        kvm_stage2_unmap_range(kvm, mmu, ipa, end - ipa)


def _ipa_of(value: int) -> int:
    return (value & (1 << 36) - 1) << 12


def compute_tlb_inval_range(mmu: S2Mmu, value: int) -> int:
    """How much an invalidation by IPA has to drop. Mirrors: compute_tlb_inval_range()"""
    ttl = value >> 44 & 15 or get_guest_mapping_ttl(mmu, _ipa_of(value))
    granule = Granule(_GRANULE_OF_TG0[mmu.tlb_vtcr >> 14 & 3])
    return ttl_to_size(ttl) or granule.size(granule.min_block_level)


def get_guest_mapping_ttl(mmu: S2Mmu, ipa: int) -> int:
    """What the shadow knows of L1's leaf at an IPA, 0 if nothing. Mirrors: get_guest_mapping_ttl()"""
    granule = Granule(_GRANULE_OF_TG0[mmu.tlb_vtcr >> 14 & 3])
    for level in range(descriptors.LAST_LEVEL, granule.min_block_level - 1, -1):
        start = ipa & -granule.size(level)
        if start >> mmu.pgt.ia_bits:
            continue
        pte, _ = mmu.pgt.get_leaf(start)
        guest_level = (pte & NV_LEVEL) >> 56
        if pte & VALID and guest_level:
            ttl = _TTL_TG[granule.page_shift] << 2 | guest_level
            return ttl if ipa < start + (ttl_to_size(ttl) or _TTL_DEFAULT) else 0
    return 0


def ttl_to_size(ttl: int) -> int:
    """Bytes that a leaf has by its level, 0 if the hint says nothing. Mirrors: __ttl_to_size()"""
    shift, level = _SHIFT_OF_TLBI_TG.get(ttl >> 2), ttl & 3
    if shift is None or level < Granule(shift).min_block_level:
        return 0
    return Granule(shift).size(level)


HANDLE_TLBI: dict[str, Callable[[KvmState, int, int], None]] = {
    "VMALLS12E1": handle_vmalls12e1,
    "IPAS2E1": handle_ipas2e1,
    "RIPAS2E1": handle_ripas2e1,
}
"""By operation: called with L1's VTTBR_EL2 and the register that the instruction names."""
