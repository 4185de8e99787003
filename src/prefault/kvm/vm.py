# SPDX-License-Identifier: Apache-2.0
"""A VM descriptor, its memslots and the memory behind them: what all architectures have, and arm64's."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from prefault.abi import arm64, constants, structures
from prefault.errors import CapabilityMissing, KvmError, UsageError
from prefault.guest.compile import compile_program
from prefault.guest.program import EnterL2, L2Mapping, Program
from prefault.kvm import device, host, memory, stage2, tracing
from prefault.kvm.descriptor import Descriptor
from prefault.kvm.device import Device
from prefault.kvm.dirty_ring import DirtyRing
from prefault.kvm.held import HeldInvalidation
from prefault.kvm.memory import Memory
from prefault.kvm.preempt import Preemption
from prefault.kvm.tracing import KvmFaultCounter
from prefault.kvm.userfault import Userfault
from prefault.kvm.vcpu import AnyVcpu, Vcpu
from prefault.machine import (
    Access,
    Advice,
    Backing,
    Leaf,
    MemoryRegion,
    SlotFlags,
    UserfaultHandler,
    UserfaultMode,
    VcpuConfig,
    VmConfig,
)

_GUEST_MEMFD_FLAGS = constants.GUEST_MEMFD_FLAG_MMAP | constants.GUEST_MEMFD_FLAG_INIT_SHARED
_BITS_PER_WORD = 64
_FIRST_SPI = 32
_TRACE_SLACK = 4096


@dataclass(frozen=True)
class _Slot:
    region: MemoryRegion
    memory: Memory

    def covers(self, gpa: int) -> bool:
        return self.region.gpa <= gpa < self.region.gpa + self.region.size


class AnyVm(Descriptor):
    """KVM's VM descriptor, of any architecture.

    Memory stays mapped until the VM is closed, also that of deleted slots: what a stale stage-2
    entry would show must still be there to be seen.
    """

    def __init__(self, fd: int, page_size: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd)
        self._page_size = page_size
        self._vcpu_mmap_size = vcpu_mmap_size
        self._slots: dict[int, _Slot] = {}
        self._memories: list[Memory] = []
        self._userfaults: list[Userfault] = []
        self._vcpus: list[AnyVcpu] = []
        self._ring_entries = 0
        self._rings: list[DirtyRing] = []
        self._run_threads: set[int] = set()
        self._refuses_hugetlb = False
        """Whether this kernel may refuse hugetlb pages because guests have memory tags."""

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on this VM."""
        return self.ioctl("KVM_CHECK_EXTENSION", capability)

    def set_user_memory_region(self, region: MemoryRegion, contents: int = -1) -> None:
        """Create, change or (size 0) delete a memslot. Its mapping outlives it.

        A slot that keeps its size and backing keeps its memory: its flags change, or it moves.

        :param contents: with Backing.FILE_PRIVATE, descriptor of the file to map
        """
        if not region.size:
            self._set_region(region, None)
            self._slots.pop(region.slot, None)
            return
        old = self._slots.get(region.slot)
        if old and (old.region.size, old.region.backing) == (region.size, region.backing):
            self._set_region(region, old.memory)
            self._slots[region.slot] = _Slot(region, old.memory)
            return
        created = memory.create(region, self._page_size, self._guest_memfd(region), contents)
        try:
            self._set_region(region, created)
        except BaseException:
            created.close()
            raise
        self._memories.append(created)
        self._slots[region.slot] = _Slot(region, created)

    def _enable_dirty_rings(self, entries: int) -> None:
        """Give each vCPU a ring of so many entries, before the first is created; 0 changes nothing."""
        if not entries:
            return
        if not self.check_extension(constants.KVM_CAP_DIRTY_LOG_RING_ACQ_REL):
            raise CapabilityMissing(
                "KVM_CAP_DIRTY_LOG_RING_ACQ_REL is 0: vCPUs have no dirty rings here; use bitmaps, or a "
                "kernel that has rings (on arm64, Linux 6.2)"
            )
        request = structures.kvm_enable_cap(cap=constants.KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
        request.args[0] = entries * ctypes.sizeof(structures.kvm_dirty_gfn)
        hint = "a ring has a power of 2 of entries, up to 65536, and takes a page at least"
        self.ioctl("KVM_ENABLE_CAP", request, hint=hint)
        self._ring_entries = entries

    def _add_vcpu(self, vcpu: AnyVcpu) -> None:
        self._vcpus.append(vcpu)
        if self._ring_entries:
            self._rings.append(DirtyRing(vcpu.fd, self._ring_entries, self._page_size))

    def _guest_memfd(self, region: MemoryRegion) -> int:
        if region.backing is not Backing.GUEST_MEMFD:
            return -1
        flags = self.check_extension(constants.KVM_CAP_GUEST_MEMFD_FLAGS)
        if flags & _GUEST_MEMFD_FLAGS != _GUEST_MEMFD_FLAGS:
            raise CapabilityMissing(
                f"KVM_CAP_GUEST_MEMFD_FLAGS is {flags:#x}: this kernel's guest_memfd cannot be mapped by "
                "the host; use another backing, or a kernel that has GUEST_MEMFD_FLAG_MMAP (Linux 6.18)"
            )
        request = structures.kvm_create_guest_memfd(region.size, _GUEST_MEMFD_FLAGS)
        return self.ioctl("KVM_CREATE_GUEST_MEMFD", request)

    def _set_region(self, region: MemoryRegion, behind: Memory | None) -> None:
        request = structures.kvm_userspace_memory_region2(
            slot=region.slot, flags=int(region.flags), guest_phys_addr=region.gpa, memory_size=region.size
        )
        name = "KVM_SET_USER_MEMORY_REGION"
        if behind:
            request.userspace_addr = behind.hva
            if behind.guest_memfd >= 0:
                request.flags |= constants.KVM_MEM_GUEST_MEMFD
                request.guest_memfd = behind.guest_memfd
                name = "KVM_SET_USER_MEMORY_REGION2"
        # The first structure is the beginning of the second.
        result, error = self.try_ioctl(name, request)
        if error == errno.EINVAL and self._refuses_hugetlb and region.backing is Backing.HUGETLB:
            raise CapabilityMissing(
                "on this kernel hugetlb pages have no memory tags, and guests with tags cannot have them; "
                "use another backing, or a kernel that has tags there (Linux 6.13)"
            )
        if result < 0:
            hint = "slots must not overlap, and must lie below the VM's IPA limit"
            raise KvmError(name, error, gpa=region.gpa, size=region.size, hint=hint)

    def _can_pre_fault(self) -> bool:
        return bool(self.check_extension(constants.KVM_CAP_PRE_FAULT_MEMORY))

    def _before_run(self, thread: int) -> None:
        self._run_threads.add(thread)

    def read_memory(self, gpa: int, size: int) -> bytes:
        """Guest memory as the host sees it."""
        slot = self._slot_of(gpa, size)
        return slot.memory.read(gpa - slot.region.gpa, size)

    def write_memory(self, gpa: int, data: bytes) -> None:
        """Write guest memory from the host."""
        slot = self._slot_of(gpa, len(data))
        slot.memory.write(gpa - slot.region.gpa, data)

    def advise(self, gpa: int, size: int, advice: Advice) -> None:
        """madvise(2) on the host's mapping of ``[gpa, gpa+size)``, which lies in one memslot."""
        slot = self._slot_of(gpa, size)
        slot.memory.advise(gpa - slot.region.gpa, size, advice)

    def protect(self, gpa: int, size: int, access: Access) -> None:
        """mprotect(2) on the host's mapping of ``[gpa, gpa+size)``, which lies in one memslot."""
        slot = self._slot_of(gpa, size)
        slot.memory.protect(gpa - slot.region.gpa, size, access)

    def unmap(self, gpa: int, size: int) -> None:
        """munmap(2) the host's mapping of ``[gpa, gpa+size)``; the memslot stays."""
        slot = self._slot_of(gpa, size)
        slot.memory.unmap(gpa - slot.region.gpa, size)

    def map_anew(self, gpa: int, size: int, *, secret: bool = False) -> None:
        """mmap(2) over the host's mapping of ``[gpa, gpa+size)``; the memslot stays.

        :param secret: not private memory, but a memfd_secret(2) (Backing.SECRET)
        """
        slot = self._slot_of(gpa, size)
        slot.memory.map_anew(gpa - slot.region.gpa, size, secret=secret)

    def hva_of(self, gpa: int) -> int:
        """Where the host has a byte of guest memory."""
        slot = self._slot_of(gpa, 1)
        return slot.memory.hva + gpa - slot.region.gpa

    def file_of(self, gpa: int) -> int:
        """The file behind a byte of guest memory, -1 for anonymous memory."""
        return self._slot_of(gpa, 1).memory.fd

    def fork(self) -> host.Child:
        """fork(2) of the VMM: it shares its private memory with the child, copied on write."""
        return host.Child(self.hva_of)

    def merge(self, gpa: int, size: int) -> None:
        """Have KSM make one page of the pages of ``[gpa, gpa+size)``, which are equal."""
        self._slot_of(gpa, size)
        host.merge(self.hva_of(gpa), size, self._page_size)

    def age(self, gpa: int, size: int) -> None:
        """Have the host take note that nobody has used ``[gpa, gpa+size)`` lately."""
        self._slot_of(gpa, size)
        host.age(self.hva_of(gpa), size, self._page_size)

    def drop_caches(self) -> None:
        """Have the host drop pages of files that are neither mapped nor, as far as it knows, written."""
        host.drop_caches()

    def handle_userfaults(
        self, gpa: int, size: int, mode: UserfaultMode, handler: UserfaultHandler
    ) -> Userfault:
        """Have the faults of the VMM on ``[gpa, gpa+size)``, which lies in one memslot, served."""
        self._slot_of(gpa, size)
        made = Userfault(self.hva_of(gpa), gpa, size, mode, handler, self._page_size)
        self._userfaults.append(made)
        return made

    def hold_invalidation(self, gpa: int, size: int) -> HeldInvalidation:
        """Drop the pages of ``[gpa, gpa+size)`` as Advice.DONTNEED does, and stay in the middle of it."""
        self._slot_of(gpa, size)
        return HeldInvalidation(self.hva_of(gpa), size, self._page_size)

    def preempt(self) -> Preemption:
        """Make calls that are interrupted by somebody with a higher priority."""
        return Preemption()

    def _slot_of(self, gpa: int, size: int) -> _Slot:
        for slot in list(self._slots.values()):  # Another thread may be changing them.
            if slot.covers(gpa) and gpa + size <= slot.region.gpa + slot.region.size:
                return slot
        raise UsageError(
            f"no memslot has gpa {gpa:#x}, size {size:#x}; set one with set_user_memory_region first"
        )

    def get_dirty_log(self, slot: int) -> list[int]:
        """Page numbers, relative to the slot, written since the last call."""
        if slot not in self._slots or not self._slots[slot].region.flags & SlotFlags.LOG_DIRTY_PAGES:
            raise UsageError(f"slot {slot} has no dirty log; set it with SlotFlags.LOG_DIRTY_PAGES")
        pages = self._slots[slot].region.size // self._page_size
        words = (ctypes.c_uint64 * -(-pages // _BITS_PER_WORD))()
        request = structures.kvm_dirty_log(slot, 0, ctypes.addressof(words))
        self.ioctl("KVM_GET_DIRTY_LOG", request)
        return [
            index * _BITS_PER_WORD + bit
            for index, word in enumerate(words)
            if word
            for bit in range(_BITS_PER_WORD)
            if word >> bit & 1
        ]

    def harvest_dirty_rings(self) -> list[tuple[int, int]]:
        """(slot, page) of each write that vCPUs had noted since the last call. Call it while none runs."""
        if not self._ring_entries:
            raise UsageError("this VM has no dirty rings; create it with VmConfig(dirty_ring=4096)")
        found = [one for ring in self._rings for one in ring.harvest()]
        self.ioctl("KVM_RESET_DIRTY_RINGS")
        return found

    def _counter(self, event: tracing.FaultEvent) -> KvmFaultCounter:
        pages = sum(slot.region.size for slot in self._slots.values()) // self._page_size
        return KvmFaultCounter(event, 2 * pages + _TRACE_SLACK, self._run_threads, self._is_memory)

    def _close_devices(self) -> None:
        """Close what the architecture's VMs have besides vCPUs."""

    def _is_memory(self, ipa: int) -> bool:
        """Whether an IPA has a memslot behind it."""
        return any(slot.covers(ipa) for slot in self._slots.values())

    def close(self) -> None:
        """Close the VM and its vCPUs. Safe to call again."""
        while self._userfaults:
            self._userfaults.pop().close()
        while self._rings:
            self._rings.pop().close()
        while self._vcpus:
            self._vcpus.pop().close()
        self._close_devices()
        super().close()
        memories, self._memories = self._memories, []
        self._slots.clear()
        memory.close_all(memories)


class Vm(AnyVm):
    """An arm64 VM."""

    def __init__(self, fd: int, config: VmConfig, page_size: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd, page_size, vcpu_mmap_size)
        # KVM names the VM's debugfs folder after the thread that creates it and its descriptor.
        self._debugfs = stage2.DEBUGFS_KVM / f"{threading.get_native_id()}-{fd}"
        self._l2_mappings: list[L2Mapping] = []
        if config.mte:
            self._enable_mte()
            self._refuses_hugetlb = True
        self._enable_dirty_rings(config.dirty_ring)
        self._gic: Device | None = None
        self._gic_ready = threading.Lock()
        self._gic_pending = False
        if config.gic:
            self._gic = device.create_gic(self)
            self._gic_pending = True

    def _enable_mte(self) -> None:
        if not self.check_extension(constants.KVM_CAP_ARM_MTE):
            raise CapabilityMissing(
                "KVM_CAP_ARM_MTE is 0: guests cannot have memory tags here; boot the lab with --mte"
            )
        self.ioctl("KVM_ENABLE_CAP", structures.kvm_enable_cap(cap=constants.KVM_CAP_ARM_MTE))

    @property
    def debugfs(self) -> Path:
        """The VM's folder in debugfs."""
        return self._debugfs

    def create_vcpu(self, config: VcpuConfig = VcpuConfig()) -> Vcpu:  # noqa: B008 - frozen
        """KVM_CREATE_VCPU and, unless asked otherwise, KVM_ARM_VCPU_INIT."""
        if config.el2 and not self.check_extension(constants.KVM_CAP_ARM_EL2):
            raise CapabilityMissing(
                "KVM_CAP_ARM_EL2 is 0: vCPUs cannot have EL2 here; nested guests need a kernel that has them "
                "(Linux 6.16), on a host with FEAT_NV2 that was booted with kvm-arm.mode=nested"
            )
        if config.el2 and not self._gic:
            raise UsageError("vCPUs with EL2 need an in-kernel GIC; create the VM with VmConfig(gic=True)")
        hint = "vCPUs must be created before the first one runs" if self._gic else ""
        fd = self.ioctl("KVM_CREATE_VCPU", len(self._vcpus), hint=hint)
        vcpu = Vcpu(fd, self._vcpu_mmap_size, config, self._before_run, self._can_pre_fault)
        self._add_vcpu(vcpu)
        if config.initialised:
            target = structures.kvm_vcpu_init()
            self.ioctl("KVM_ARM_PREFERRED_TARGET", target)
            vcpu.initialise(target)
        return vcpu

    def _before_run(self, thread: int) -> None:
        super()._before_run(thread)
        if self._gic_pending:
            self.initialise_gic()

    @property
    def gic(self) -> Device:
        """The in-kernel GIC.

        :raises UsageError: the VM has none
        """
        if self._gic is None:
            raise UsageError("this VM has no in-kernel GIC; create it with VmConfig(gic=True)")
        return self._gic

    def initialise_gic(self) -> None:
        """Finish the GIC: call it after the last vCPU was created. The first run does so otherwise."""
        with self._gic_ready:
            if self._gic and self._gic_pending:
                device.initialise_gic(self._gic)
                self._gic_pending = False

    def set_spi(self, number: int, level: bool) -> None:
        """Raise or lower the line of a shared peripheral interrupt, counted from 0 (KVM_IRQ_LINE)."""
        irq = arm64.KVM_ARM_IRQ_TYPE_SPI << arm64.KVM_ARM_IRQ_TYPE_SHIFT | number + _FIRST_SPI
        self.ioctl("KVM_IRQ_LINE", structures.kvm_irq_level(irq, int(level)))

    def install(self, program: Program) -> None:
        """Write the code and data of a guest program into guest memory."""
        image = compile_program(program, self._page_size)
        self.write_memory(image.base, image.data)
        for step in program.steps:
            if isinstance(step, EnterL2):
                self._l2_mappings += step.mappings

    def program_size(self, program: Program) -> int:
        """How much guest memory a program takes, from its base on."""
        return len(compile_program(program, self._page_size).data)

    def stage2(self) -> list[Leaf]:
        """Leaves of the canonical stage-2 table, by IPA."""
        return stage2.canonical(self._debugfs)

    def nested_stage2(self) -> list[list[Leaf]]:
        """Leaves of every shadow stage-2 table in use, by index."""
        return stage2.shadows(self._debugfs)

    def ptdump(self) -> list[str]:
        """The canonical table, then every shadow table in use, as text in the form of debugfs."""
        return stage2.texts(self._debugfs)

    def count_faults(self) -> KvmFaultCounter:
        """Count this VM's stage-2 faults while the returned context is open.

        They are told from those of other VMs by the threads that run its vCPUs: do not run another
        VM from the same thread meanwhile.
        """
        return self._counter(tracing.ARM64)

    def _is_memory(self, ipa: int) -> bool:
        """Whether an IPA, L1's or L2's, has a memslot behind it."""
        return super()._is_memory(ipa) or any(
            one.ipa <= ipa < one.ipa + one.size for one in self._l2_mappings
        )

    def _close_devices(self) -> None:
        if self._gic:
            self._gic.close()


def host_page_size() -> int:
    """The host's page size."""
    return os.sysconf("SC_PAGE_SIZE")
