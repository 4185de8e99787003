# SPDX-License-Identifier: Apache-2.0
"""A VM of the spec: memslots and what is behind them, vCPUs, and the tables as leaves."""

from __future__ import annotations

import dataclasses
import errno
import functools
from collections.abc import Callable, Iterable
from types import TracebackType

from prefault.abi import constants
from prefault.closing import Closing
from prefault.errors import CapabilityMissing, KvmError, UsageError
from prefault.guest.compile import compile_program
from prefault.guest.program import EnterL2, L2Mapping, Program
from prefault.machine import (
    Access,
    Advice,
    Backing,
    FaultCounts,
    Leaf,
    MemoryRegion,
    SlotFlags,
    UserfaultHandler,
    UserfaultMode,
    VcpuConfig,
    VmConfig,
)
from prefault.spec import backing, memslots, nested, ptdump, unmap
from prefault.spec.cpu import EC_IABT, EC_SHIFT, WNR
from prefault.spec.descriptors import AF, LAST_LEVEL, S2AP_R, S2AP_W, TABLE, XN, Prot, executable
from prefault.spec.held import SpecHeld, SpecPreemption
from prefault.spec.mm import Vma
from prefault.spec.nested import FSC_PERM
from prefault.spec.pgtable import PageTable
from prefault.spec.pkvm import pkvm_destroy_hyp_vm
from prefault.spec.process import Process
from prefault.spec.state import Host, KvmState, S2Mmu, Slot
from prefault.spec.steps import LOCK
from prefault.spec.unmap import KvmNotifier
from prefault.spec.userfault import SpecUserfault
from prefault.spec.vcpu import SpecVcpu

_DEFAULT_IPA_BITS = 40
_NOT_FOR_PROTECTED_VMS = (
    constants.KVM_CAP_READONLY_MEM,
    constants.KVM_CAP_ONE_REG,
    constants.KVM_CAP_IMMEDIATE_EXIT,
    constants.KVM_CAP_PRE_FAULT_MEMORY,
)
"""Mirrors: kvm_pkvm_ext_allowed()"""
_compile = functools.lru_cache(256)(compile_program)
"""The same program is installed in many VMs, when scenarios are repeated and orders explored."""
_HINT = "slots must not overlap, and must lie below the VM's IPA limit"


@dataclasses.dataclass(frozen=True)
class _Region:
    region: MemoryRegion
    vma: Vma
    hva: int

    def covers(self, gpa: int, size: int = 1) -> bool:
        return self.region.gpa <= gpa and gpa + size <= self.region.gpa + self.region.size


class SpecVm(Closing):
    """A VM descriptor."""

    def __init__(self, host: Host, config: VmConfig) -> None:
        self._host = host
        self._config = config
        # The hypervisor has one size for all.
        bits = host.config.ipa_limit if host.config.protected else config.ipa_bits or _DEFAULT_IPA_BITS
        mmu = S2Mmu(host.memory, host.config.granule, bits, shadow=False)
        self.kvm = KvmState(host, mmu, protected=config.protected, mte=config.mte)
        self.kvm.dirty_rings = [] if config.dirty_ring else None
        self._notifier = KvmNotifier(self.kvm)
        host.mm.notifiers.append(self._notifier)
        self._regions: dict[int, _Region] = {}
        self._mapped: list[Vma] = []
        self._vcpus: list[SpecVcpu] = []
        self._l2_mappings: list[L2Mapping] = []
        self._userfaults: list[SpecUserfault] = []
        self._counts: FaultCounts | None = None
        self._open = True

    # Memslots.

    def set_user_memory_region(self, region: MemoryRegion) -> None:
        """Create, change or (size 0) delete a memslot. Its mapping outlives it."""
        with LOCK:
            old = self._regions.get(region.slot)
            if not region.size:
                self._set_region(region, 0, None)
                self._regions.pop(region.slot, None)
                return
            if old and (old.region.size, old.region.backing) == (region.size, region.backing):
                self._set_region(region, old.hva, old.vma)
                self._regions[region.slot] = dataclasses.replace(old, region=region)
                return
            vma = backing.create(self._host, region)
            hva = backing.hva_of(self._host, region, vma)
            try:
                self._set_region(region, hva, vma)
            except KvmError:
                self._host.mm.munmap(vma.start, vma.end)
                raise
            self._mapped.append(vma)
            self._regions[region.slot] = _Region(region, vma, hva)

    def _set_region(self, region: MemoryRegion, hva: int, vma: Vma | None) -> None:
        flags, name = int(region.flags), "KVM_SET_USER_MEMORY_REGION"
        new = Slot(region.slot, region.gpa, region.size, hva, flags)
        if vma and region.backing is Backing.GUEST_MEMFD:
            new.flags |= constants.KVM_MEM_GUEST_MEMFD
            new.gmem = vma.file
            name += "2"
        error = memslots.kvm_set_memory_region(self.kvm, new)
        if error:
            raise KvmError(name, -error, gpa=region.gpa, size=region.size, hint=_HINT)

    def get_dirty_log(self, slot: int) -> list[int]:
        """Page numbers, relative to the slot, written since the last call."""
        with LOCK:
            if slot not in self._regions or not self._regions[slot].region.flags & SlotFlags.LOG_DIRTY_PAGES:
                raise UsageError(f"slot {slot} has no dirty log; set it with SlotFlags.LOG_DIRTY_PAGES")
            if self.kvm.dirty_rings is not None:
                raise KvmError("KVM_GET_DIRTY_LOG", errno.ENXIO)
            return memslots.kvm_vm_ioctl_get_dirty_log(self.kvm, slot)

    def harvest_dirty_rings(self) -> list[tuple[int, int]]:
        """(slot, page) of each write that vCPUs had noted since the last call. Call it while none runs."""
        with LOCK:
            if self.kvm.dirty_rings is None:
                raise UsageError("this VM has no dirty rings; create it with VmConfig(dirty_ring=4096)")
            return memslots.kvm_vm_ioctl_reset_dirty_pages(self.kvm)

    # vCPUs and programs.

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on this VM."""
        if self.kvm.protected and capability in _NOT_FOR_PROTECTED_VMS:
            return 0
        return check_extension(self._host, capability)

    def create_vcpu(self, config: VcpuConfig = VcpuConfig()) -> SpecVcpu:  # noqa: B008 - frozen
        """KVM_CREATE_VCPU and, unless asked otherwise, KVM_ARM_VCPU_INIT."""
        if config.el2 and not self.check_extension(constants.KVM_CAP_ARM_EL2):
            raise CapabilityMissing(
                "KVM_CAP_ARM_EL2 is 0: vCPUs cannot have EL2 here; use HostConfig(nested=True)"
            )
        if self._config.gic and self.kvm.has_run:
            hint = "vCPUs must be created before the first one runs"
            raise KvmError("KVM_CREATE_VCPU", errno.EBUSY, hint=hint)
        if config.el2 and not self._config.gic:
            raise UsageError("vCPUs with EL2 need an in-kernel GIC; create the VM with VmConfig(gic=True)")
        vcpu = SpecVcpu(self.kvm, config, self._trace, self._can_pre_fault)
        self._vcpus.append(vcpu)
        if config.el2 and config.initialised:
            nested.kvm_vcpu_init_nested(self.kvm, len(self._vcpus))
        return vcpu

    def _can_pre_fault(self) -> bool:
        return bool(self.check_extension(constants.KVM_CAP_PRE_FAULT_MEMORY))

    def install(self, program: Program) -> None:
        """Write the code and data of a guest program into guest memory."""
        image = _compile(program, self._host.config.page_size)
        self.write_memory(image.base, image.data)
        for step in program.steps:
            if isinstance(step, EnterL2):
                self._l2_mappings += step.mappings

    def program_size(self, program: Program) -> int:
        """How much guest memory a program takes, from its base on."""
        return len(_compile(program, self._host.config.page_size).data)

    # Memory.

    def read_memory(self, gpa: int, size: int) -> bytes:
        """Guest memory as the host sees it."""
        with LOCK:
            return self._host.mm.read(self.hva_of(gpa, size), size)

    def write_memory(self, gpa: int, data: bytes) -> None:
        """Write guest memory from the host."""
        with LOCK:
            self._host.mm.write(self.hva_of(gpa, len(data)), data)

    def advise(self, gpa: int, size: int, advice: Advice) -> None:
        """madvise(2) on the host's mapping of ``[gpa, gpa+size)``, which lies in one memslot."""
        with LOCK:
            hva, slot = self.hva_of(gpa, size), self.kvm.slot_at(gpa)
            if advice is Advice.REMOVE and slot and slot.gmem:
                page_size = self.kvm.page_size
                first = (gpa - slot.base) // page_size
                unmap.kvm_gmem_punch_hole(self.kvm, first, size // page_size, slot.gmem)
            backing.advise(self._host, hva, size, advice)

    def protect(self, gpa: int, size: int, access: Access) -> None:
        """mprotect(2) on the host's mapping of ``[gpa, gpa+size)``, which lies in one memslot."""
        with LOCK:
            backing.protect(self._host, self.hva_of(gpa, size), size, access)

    def unmap(self, gpa: int, size: int) -> None:
        """munmap(2) the host's mapping of ``[gpa, gpa+size)``; the memslot stays."""
        with LOCK:
            backing.unmap(self._host, self.hva_of(gpa, size), size)

    def map_anew(self, gpa: int, size: int, *, secret: bool = False) -> None:
        """mmap(2) over the host's mapping of ``[gpa, gpa+size)``; the memslot stays.

        :param secret: not private memory, but a memfd_secret(2) (Backing.SECRET)
        """
        with LOCK:
            hva = self.hva_of(gpa, size)
            backing.map_anew(self._host, hva, size, secret=secret)

    def fork(self) -> SpecChild:
        """fork(2) of the VMM: it shares its private memory with the child, copied on write."""
        with LOCK:
            return SpecChild(self._host.mm.fork(), self.hva_of)

    def merge(self, gpa: int, size: int) -> None:
        """Have KSM make one page of the pages of ``[gpa, gpa+size)``, which are equal."""
        with LOCK:
            hva = self.hva_of(gpa, size)
            self._host.mm.advise_mergeable(hva, hva + size)
            self._host.mm.ksm_merge(list(range(hva, hva + size, self._host.mm.page_size)))

    def age(self, gpa: int, size: int) -> None:
        """Have the host take note that nobody has used ``[gpa, gpa+size)`` lately."""
        with LOCK:
            self._host.mm.age(self.hva_of(gpa, size), size)

    def drop_caches(self) -> None:
        """Drop nothing: here all is known that was written, and what was not reads the same again."""

    def handle_userfaults(
        self, gpa: int, size: int, mode: UserfaultMode, handler: UserfaultHandler
    ) -> SpecUserfault:
        """Have the faults of the VMM on ``[gpa, gpa+size)``, which lies in one memslot, served."""
        made = SpecUserfault(self._host.mm, self.hva_of(gpa, size), gpa, size, mode, handler)
        self._userfaults.append(made)
        return made

    def hold_invalidation(self, gpa: int, size: int) -> SpecHeld:
        """Drop the pages of ``[gpa, gpa+size)`` as Advice.DONTNEED does, and stay in the middle of it."""
        return SpecHeld(self._host, self.hva_of(gpa, size), size)

    def preempt(self) -> SpecPreemption:
        """Make calls that are interrupted by somebody with a higher priority."""
        return SpecPreemption()

    def hva_of(self, gpa: int, size: int = 1) -> int:
        """Where guest memory is in the VMM's."""
        for one in self._regions.values():
            if one.covers(gpa, size):
                return one.hva + gpa - one.region.gpa
        raise UsageError(
            f"no memslot has gpa {gpa:#x}, size {size:#x}; set one with set_user_memory_region first"
        )

    # What can be observed.

    def stage2(self) -> list[Leaf]:
        """Leaves of the canonical stage-2 table, by IPA."""
        if self.kvm.protected or not self._host.config.pre_faults:
            raise CapabilityMissing("these stage-2 tables are the hypervisor's, and cannot be read")
        with LOCK:
            return leaves(self.kvm.mmu.pgt)

    def nested_stage2(self) -> list[list[Leaf]]:
        """Leaves of every shadow stage-2 table in use, by index."""
        with LOCK:
            return [leaves(mmu.pgt) for mmu in self.kvm.nested_mmus if mmu.tlb_vttbr is not None]

    def ptdump(self) -> list[str]:
        """The canonical table, then every shadow table in use, as text in the form of debugfs."""
        self.stage2()  # refuses where the tables are the hypervisor's
        with LOCK:
            return [ptdump.show(mmu) for mmu in self._mmus() if not mmu.shadow or mmu.tlb_vttbr is not None]

    def count_faults(self) -> SpecFaultCounter:
        """Count this VM's stage-2 faults while the returned context is open."""
        return SpecFaultCounter(self)

    def set_counts(self, counts: FaultCounts | None) -> None:
        """Where faults are counted from now on."""
        self._counts = counts

    def _trace(self, ipa: int, esr: int) -> None:
        """Where the tracepoint kvm_guest_fault stands."""
        counts = self._counts
        if counts is None:
            return
        if not self._is_memory(ipa):
            counts.mmio += 1
            return
        counts.ipas.append(ipa)
        if esr >> EC_SHIFT == EC_IABT:
            counts.execute += 1
        elif esr & WNR:
            counts.write += 1
        else:
            counts.read += 1
        if esr & 0x3C == FSC_PERM:
            counts.permission += 1

    def _is_memory(self, ipa: int) -> bool:
        if any(one.covers(ipa) for one in self._regions.values()):
            return True
        return any(one.ipa <= ipa < one.ipa + one.size for one in self._l2_mappings)

    def check(self) -> None:
        """The invariants of all tables.

        :raises Violation: one does not hold
        """
        for mmu in self._mmus():
            mmu.pgt.check()

    def _mmus(self) -> Iterable[S2Mmu]:
        return [self.kvm.mmu, *self.kvm.nested_mmus]

    def close(self) -> None:
        """Close the VM and its vCPUs. Safe to call again."""
        if not self._open:
            return
        self._open = False
        while self._userfaults:
            self._userfaults.pop().close()
        for vcpu in self._vcpus:
            vcpu.close()
        self._host.mm.notifiers.remove(self._notifier)
        if self.kvm.protected:
            pkvm_destroy_hyp_vm(self.kvm)
        for mmu in self._mmus():
            mmu.pgt.destroy()
        for vma in self._mapped:
            self._host.mm.munmap(vma.start, vma.end)


class SpecChild(Closing):
    """A child process of the VMM, which has its memory as it was at the fork."""

    def __init__(self, mm: Process, hva_of: Callable[[int], int]) -> None:
        self._mm = mm
        self._hva_of = hva_of

    def read_memory(self, gpa: int, size: int) -> bytes:
        """Guest memory as the child sees it."""
        with LOCK:
            return self._mm.read(self._hva_of(gpa), size)

    def close(self) -> None:
        """Let the child end. Safe to call again."""
        with LOCK:
            self._mm.exit()


class SpecFaultCounter:
    """Counts stage-2 faults while it is open."""

    def __init__(self, vm: SpecVm) -> None:
        self._vm = vm

    def __enter__(self) -> FaultCounts:
        counts = FaultCounts()
        self._vm.set_counts(counts)
        return counts

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._vm.set_counts(None)


def check_extension(host: Host, capability: int) -> int:
    """KVM_CHECK_EXTENSION. Mirrors: kvm_vm_ioctl_check_extension()"""
    config = host.config
    values = {
        constants.KVM_CAP_USER_MEMORY: 1,
        constants.KVM_CAP_USER_MEMORY2: 1,
        constants.KVM_CAP_SYNC_MMU: 1,
        constants.KVM_CAP_ONE_REG: 1,
        constants.KVM_CAP_READONLY_MEM: 1,
        constants.KVM_CAP_DEVICE_CTRL: 1,
        constants.KVM_CAP_CHECK_EXTENSION_VM: 1,
        constants.KVM_CAP_IMMEDIATE_EXIT: 1,
        constants.KVM_CAP_ARM_VM_IPA_SIZE: config.ipa_limit,
        constants.KVM_CAP_ARM_EL2: int(config.nested and not config.protected),
        constants.KVM_CAP_ARM_EL2_E2H0: int(config.nested and not config.protected),
        constants.KVM_CAP_ARM_MTE: int(config.mte),
        constants.KVM_CAP_ARM_PSCI_0_2: 1,
        constants.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 3,
        constants.KVM_CAP_DIRTY_LOG_RING_ACQ_REL: 1 << 20,
        constants.KVM_CAP_PRE_FAULT_MEMORY: int(config.pre_faults),
        constants.KVM_CAP_GUEST_MEMFD: 1,
        constants.KVM_CAP_GUEST_MEMFD_FLAGS: 3,
    }
    return values.get(capability, 0)


def leaves(pgt: PageTable) -> list[Leaf]:
    """Leaves of a table, adjacent equal ones as one."""
    attributes = S2AP_R | S2AP_W | XN | AF | TABLE
    merged: list[tuple[int, int, int, int]] = []
    start = end = level = kind = -1
    for ipa, at, pte in pgt.leaves():
        if ipa == end and at == level and pte & attributes == kind:
            end += pgt.granule.size(at)
            continue
        if end > start:
            merged.append((start, end, level, kind))
        start, end, level, kind = ipa, ipa + pgt.granule.size(at), at, pte & attributes
    if end > start:
        merged.append((start, end, level, kind))
    return [_leaf(*one) for one in merged]


def _leaf(start: int, end: int, level: int, pte: int) -> Leaf:
    exec_ = executable(pte)
    return Leaf(
        ipa=start,
        size=end - start,
        level=level,
        readable=bool(pte & S2AP_R),
        writable=bool(pte & S2AP_W),
        px=bool(exec_ & Prot.PX),
        ux=bool(exec_ & Prot.UX),
        accessed=bool(pte & AF),
        block=level < LAST_LEVEL,
    )
