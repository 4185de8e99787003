# SPDX-License-Identifier: Apache-2.0
"""What a VM is to KVM, and what KVM knows of the host that it runs on.

Source: struct kvm and struct kvm_arch (include/linux/kvm_host.h, arch/arm64/include/asm/kvm_host.h)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from prefault.spec.descriptors import Granule
from prefault.spec.memory import PhysicalMemory, Table
from prefault.spec.mm import File
from prefault.spec.pgtable import PageTable
from prefault.spec.process import Process
from prefault.spec.steps import RwLock, Sample, Sequence, Srcu, step

INVALID = 1 << 16
"""KVM_MEMSLOT_INVALID: the slot is being deleted or moved."""


@dataclass(frozen=True)
class HostConfig:
    """The machine and its kernel.

    :ivar page_size: 4, 16 or 64 KiB
    :ivar ipa_limit: KVM_CAP_ARM_VM_IPA_SIZE; above 48 needs lpa2, or 64 KiB pages
    :ivar dic: instruction caches need no maintenance, so that every page is mapped executable
    :ivar nested: kvm-arm.mode=nested on a machine with FEAT_NV2
    :ivar protected: kvm-arm.mode=protected
    :ivar pkvm_pre_faults: the series pre-faults non-protected VMs on a protected host
    :ivar mte: memory tags, which guests can have, too
    :ivar mmio_sign_extends: a signed read of a device is; Linux 6.12 cuts what it has extended off again
    :ivar hafdbs: the processor sets access flags at stage 2 by itself; CONFIG_ARM64_HW_AFDBM
    :ivar hugetlb: page sizes of hugetlb; the first is the default
    """

    page_size: int = 0x1000
    ipa_limit: int = 48
    lpa2: bool = False
    fwb: bool = True
    dic: bool = True
    nested: bool = True
    protected: bool = False
    pkvm_pre_faults: bool = True
    mte: bool = False
    mmio_sign_extends: bool = True
    hafdbs: bool = True
    hugetlb: tuple[int, ...] = (2 << 20, 64 << 10, 32 << 20, 1 << 30)

    @property
    def pre_faults(self) -> bool:
        """Whether KVM_PRE_FAULT_MEMORY works here, for VMs that are not protected."""
        return self.pkvm_pre_faults or not self.protected

    @functools.cached_property
    def granule(self) -> Granule:
        """The shape of stage-2 tables."""
        return Granule(self.page_size.bit_length() - 1, self.lpa2, self.fwb)


def _bug(about: str) -> bool:
    """A field of ``Faults``."""
    return field(default=False, metadata={"about": about})


@dataclass(frozen=True)
class Faults:
    """Bugs that can be switched on, to see that they are found. Each is asked for where it bites."""

    no_sequence_check: bool = _bug("A fault maps what it found, whatever was invalidated since.")
    sequence_after_pin: bool = _bug("The sequence count is sampled when the page was looked up already.")
    no_sequence_bump: bool = _bug("The end of an invalidation does not move the sequence count on.")
    lock_dropped: bool = _bug(
        "The mmu_lock is dropped and taken again between the check of the sequence count and the map."
    )
    no_mmu_lock: bool = _bug("The mmu_lock keeps nobody out.")
    no_srcu_wait: bool = _bug("A memslot is replaced without waiting for those who use the old one.")
    wait_under_srcu: bool = _bug(
        "Pre-faulting waits for a memslot that is going away to be gone, in place of EAGAIN."
    )
    invalid_slot_used: bool = _bug("Pre-faulting maps through a memslot that is going away.")
    slots_during_invalidation: bool = _bug(
        "Memslots are replaced between the start and the end of an invalidation."
    )
    log_without_protecting: bool = _bug("Dirty logging is switched on, and what is mapped stays writable.")
    log_ignored: bool = _bug("Pre-faulting maps pages of a logged memslot writable.")
    dirty_marked: bool = _bug("Pre-faulting marks what it maps as dirty.")
    write_fault: bool = _bug("Pre-faulting faults as a write would.")
    readonly_ignored: bool = _bug("A read-only memslot is mapped as one that may be written.")
    page_leaked: bool = _bug("A page that came out stale is not put.")
    wrong_mmu: bool = _bug("Pre-faulting fills the shadow MMU that was used last.")
    past_range: bool = _bug("Progress is not cut to the range.")
    mapped_again: bool = _bug("What is mapped already is faulted again.")
    shadow_kept: bool = _bug("An invalidation leaves the shadow MMUs as they are.")
    tlb_kept: bool = _bug("The TLB of the canonical MMU is not invalidated.")


class Host:
    """A host: its memory and the one process whose VMs these are."""

    def __init__(self, config: HostConfig, faults: Faults) -> None:
        self.config = config
        self.faults = faults
        self.memory = PhysicalMemory(config.granule.page_shift)
        self.mm = Process(self.memory)
        self.signal_pending = False
        self.in_call = False
        """Whether a system call of KVM is there to be interrupted."""
        self._sigbus = False

    def send_sigbus(self) -> None:
        """Mirrors: kvm_send_hwpoison_signal()"""
        self._sigbus = True

    def take_sigbus(self) -> bool:
        """Whether a SIGBUS was sent since the last look."""
        sent, self._sigbus = self._sigbus, False
        return sent


@dataclass(slots=True)
class Slot:
    """A memslot. Mirrors: struct kvm_memory_slot

    :ivar base: first IPA
    :ivar flags: KVM_MEM_* and INVALID
    :ivar dirty: the dirty bitmap as one number, or None if nothing is logged
    :ivar gmem: the guest_memfd, from its start
    """

    id: int
    base: int
    size: int
    hva: int
    flags: int
    dirty: DirtyBitmap | None = None
    gmem: File | None = None

    def hva_of(self, ipa: int) -> int:
        """Mirrors: __gfn_to_hva_memslot()"""
        return self.hva + ipa - self.base


class DirtyBitmap:
    """One bit per page; copies of a memslot share it."""

    def __init__(self) -> None:
        self.pages: set[int] = set()


class S2Mmu:
    """A stage-2 MMU: the canonical one, or a shadow. Mirrors: struct kvm_s2_mmu

    :ivar shadow: whether it is one for an L2
    :ivar tlb_vttbr: of a shadow in use, L1's VTTBR_EL2; None if it is not in use
    """

    def __init__(self, memory: PhysicalMemory, granule: Granule, ia_bits: int, *, shadow: bool) -> None:
        self.pgt = PageTable(memory, granule, ia_bits)
        self.shadow = shadow
        self.tlb_vttbr: int | None = None
        self.tlb_vtcr = 0
        self.nested_stage2_enabled = False
        self.refcnt = 0
        self.pending_unmap = False


@dataclass
class KvmState:
    """A VM. Mirrors: struct kvm

    :ivar slots: the active memslots, replaced as a whole
    :ivar dirty_rings: (slot, page) of what is in the vCPUs' rings, never full; None if memslots have bitmaps
    :ivar cache: tables taken from the memory caches; the spec never runs out of them
    """

    host: Host
    mmu: S2Mmu
    protected: bool = False
    mte: bool = False
    dirty_rings: list[tuple[int, int]] | None = None
    slots: tuple[Slot, ...] = ()
    mmu_lock: RwLock = field(default_factory=lambda: RwLock("mmu_lock"))
    slots_lock: RwLock = field(default_factory=lambda: RwLock("slots_lock"))
    srcu: Srcu = field(default_factory=lambda: Srcu("srcu"))
    mmu_invalidate_seq: Sequence = field(default_factory=Sequence)
    mmu_invalidate_in_progress: int = 0
    mn_active_invalidate_count: int = 0
    nested_mmus: list[S2Mmu] = field(default_factory=list)
    nested_mmus_next: int = 0
    has_run: bool = False

    def __post_init__(self) -> None:
        self.page_size = self.host.config.page_size
        self.granule = self.host.config.granule
        self.dic = self.host.config.dic
        self.mmu_lock.broken = self.host.faults.no_mmu_lock
        self.mmu.pgt.tlb.broken = self.host.faults.tlb_kept

    def slot_at(self, ipa: int) -> Slot | None:
        """Mirrors: gfn_to_memslot()"""
        step("slots.lookup")
        for slot in self.slots:
            if slot.base <= ipa < slot.base + slot.size:
                return slot
        return None

    def allocate(self) -> Table:
        """Mirrors: stage2_memcache_zalloc_page()"""
        return self.host.memory.allocate_table()

    def invalidate_retry(self, seq: Sample) -> bool:
        """Whether what was found after ``seq`` may be stale. Mirrors: mmu_invalidate_retry()"""
        if self.host.faults.no_sequence_check:
            return False
        return self.mmu_invalidate_in_progress > 0 or seq.stale
