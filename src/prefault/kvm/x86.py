# SPDX-License-Identifier: Apache-2.0
"""What is particular to x86: guests in long mode, on a host whose KVM is the peer of arm64's.

There is no GIC, no vCPU with EL2, no guest with tags, no protected VM and no choice of an IPA space, and the
host does not show its stage-2 tables; whatever needs one of them fails with ``CapabilityMissing``.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

from prefault.abi import x86
from prefault.errors import CapabilityMissing, UsageError
from prefault.guest import compile_x64
from prefault.guest.compile_x64 import compile_program
from prefault.guest.program import Program
from prefault.kvm import tracing
from prefault.kvm.system import DEVICE, AnyKvm, open_device
from prefault.kvm.tracing import KvmFaultCounter
from prefault.kvm.vcpu import AnyVcpu
from prefault.kvm.vm import AnyVm
from prefault.machine import Leaf, VcpuConfig, VmConfig

_MAX_CPUID_ENTRIES = 256
_CR0_LONG_MODE = 1 << 31 | 1 << 5 | 1 << 4 | 1 << 1 | 1 << 0
"""PG, NE, ET, MP and PE."""
_CR4_PAE = 1 << 5
_EFER_LONG_MODE = 1 << 10 | 1 << 8
"""LMA and LME."""
_RFLAGS = 1 << 1
_CODE_SEGMENT, _DATA_SEGMENT = 0xB, 0x3
_NO_TABLES = "KVM on x86 does not show its stage-2 tables; compare what guests and calls see of them"


def _lacks(what: str) -> CapabilityMissing:
    return CapabilityMissing(f"x86 has no {what}: it is a matter of arm64")


class X86Vcpu(AnyVcpu):
    """An x86 vCPU."""

    def _start(self, program: Program, arguments: Sequence[int]) -> None:
        image = compile_program(program)
        special = x86.kvm_sregs()
        self.ioctl("KVM_GET_SREGS", special)
        special.cs = _flat(_CODE_SEGMENT)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(special, name, _flat(_DATA_SEGMENT))
        special.cr0, special.cr4, special.efer = _CR0_LONG_MODE, _CR4_PAE, _EFER_LONG_MODE
        special.cr3 = image.tables
        special.idt.limit = 0  # an exception shuts the vCPU down
        self.ioctl("KVM_SET_SREGS", special)
        general = x86.kvm_regs(rip=program.base, rflags=_RFLAGS)
        for index, value in enumerate(arguments):
            setattr(general, f"r{compile_x64.FIRST_ARGUMENT + index}", value)
        self.ioctl("KVM_SET_REGS", general)

    def reset(self) -> None:
        """On x86 a VMM sets the registers, and KVM does nothing else."""
        raise _lacks("KVM_ARM_VCPU_INIT")

    def get_register(self, name: str) -> int:
        """A general register, rip or rflags, by name."""
        general = x86.kvm_regs()
        self.ioctl("KVM_GET_REGS", general)
        return int(getattr(general, _known(name)))

    def set_register(self, name: str, value: int) -> None:
        """Set what ``get_register`` reads."""
        general = x86.kvm_regs()
        self.ioctl("KVM_GET_REGS", general)
        setattr(general, _known(name), value)
        self.ioctl("KVM_SET_REGS", general)

    def registers(self) -> dict[str, bytes]:
        """All registers that user space can read, but for counters, which never rest."""
        found = {}
        for name, kind in _STATE.items():
            state = kind()
            self.ioctl(name, state)
            for member, *_ in kind._fields_:
                field = getattr(kind, member)
                raw = bytes(state)[field.offset : field.offset + field.size]
                found[f"{name.removeprefix('KVM_GET_').lower()}.{member}"] = raw
        return {**found, **self._model_specific_registers()}

    def _model_specific_registers(self) -> dict[str, bytes]:
        found = {}
        for index in self._msrs:
            head = x86.kvm_msrs(nmsrs=1)
            entry = x86.kvm_msr_entry(index=index)
            buffer = (ctypes.c_ubyte * (ctypes.sizeof(head) + ctypes.sizeof(entry)))(
                *bytes(head), *bytes(entry)
            )
            read, _ = self.try_ioctl("KVM_GET_MSRS", ctypes.addressof(buffer))
            if read == 1:
                found[f"msr {index:#x}"] = bytes(buffer)[-8:]
        return found

    _msrs: tuple[int, ...] = ()

    def set_up(self, cpuid: ctypes.Array[ctypes.c_ubyte], msrs: tuple[int, ...]) -> None:
        """Give the vCPU all features that the host has for guests; pages of 1 GiB are one of them.

        :param cpuid: the argument of KVM_SET_CPUID2
        :param msrs: which model-specific registers it has
        """
        self._msrs = msrs
        self.ioctl("KVM_SET_CPUID2", ctypes.addressof(cpuid))


_STATE: dict[str, type[ctypes.Structure]] = {
    "KVM_GET_REGS": x86.kvm_regs,
    "KVM_GET_SREGS": x86.kvm_sregs,
    "KVM_GET_XSAVE": x86.kvm_xsave,
    "KVM_GET_DEBUGREGS": x86.kvm_debugregs,
}


def _known(name: str) -> str:
    if name not in [member for member, *_ in x86.kvm_regs._fields_]:
        raise UsageError(
            f"register {name!r} is unknown; prefault.abi.x86.kvm_regs lists those that are known"
        )
    return name


def _flat(kind: int) -> x86.kvm_segment:
    """A segment that is all of memory; ``kind`` is its type."""
    code = kind == _CODE_SEGMENT
    return x86.kvm_segment(
        limit=0xFFFF_FFFF, selector=8 if code else 16, type=kind, present=1, s=1, db=not code, l=code, g=1
    )


class X86Vm(AnyVm):
    """An x86 VM."""

    def __init__(self, fd: int, config: VmConfig, kvm: X86Kvm, vcpu_mmap_size: int) -> None:
        super().__init__(fd, kvm.page_size, vcpu_mmap_size)
        self._enable_dirty_rings(config.dirty_ring)
        self._cpuid = kvm.supported_cpuid()
        self._msrs = kvm.model_specific_registers()

    def create_vcpu(self, config: VcpuConfig = VcpuConfig()) -> X86Vcpu:  # noqa: B008 - frozen
        """KVM_CREATE_VCPU and KVM_SET_CPUID2."""
        if config.el2:
            raise _lacks("vCPU with EL2")
        if not config.initialised:
            raise CapabilityMissing("on x86 a vCPU is initialised when it is created")
        fd = self.ioctl("KVM_CREATE_VCPU", len(self._vcpus))
        vcpu = X86Vcpu(fd, self._vcpu_mmap_size, config, self._before_run, self._can_pre_fault)
        self._add_vcpu(vcpu)
        vcpu.set_up(self._cpuid, self._msrs)
        return vcpu

    def install(self, program: Program) -> None:
        """Write the code and page tables of a guest program into guest memory."""
        image = compile_program(program)
        self.write_memory(image.base, image.data)

    def program_size(self, program: Program) -> int:
        """How much guest memory a program takes, from its base on."""
        return len(compile_program(program).data)

    def stage2(self) -> list[Leaf]:
        """:raises CapabilityMissing: always: this kernel does not show them"""
        raise CapabilityMissing(_NO_TABLES)

    def nested_stage2(self) -> list[list[Leaf]]:
        """:raises CapabilityMissing: always"""
        raise CapabilityMissing(_NO_TABLES)

    def ptdump(self) -> list[str]:
        """:raises CapabilityMissing: always"""
        raise CapabilityMissing(_NO_TABLES)

    def count_faults(self) -> KvmFaultCounter:
        """Count this VM's stage-2 faults while the returned context is open, as on arm64."""
        return self._counter(tracing.X86)


class X86Kvm(AnyKvm):
    """KVM's system descriptor, for x86 guests."""

    @property
    def shows_stage2(self) -> bool:
        """It does not."""
        return False

    def create_vm(self, config: VmConfig = VmConfig()) -> X86Vm:  # noqa: B008 - frozen
        """KVM_CREATE_VM.

        :raises CapabilityMissing: the configuration asks for what only arm64 has
        """
        for what, wanted in (
            ("choice of an IPA space", config.ipa_bits),
            ("protected VM of this kind", config.protected),
            ("guest with memory tags", config.mte),
        ):
            if wanted:
                raise _lacks(what)
        mmap_size = self.ioctl("KVM_GET_VCPU_MMAP_SIZE")
        fd = self.create_vm_descriptor(0)
        try:
            return X86Vm(fd, config, self, mmap_size)
        except BaseException:
            os.close(fd)
            raise

    def supported_cpuid(self) -> ctypes.Array[ctypes.c_ubyte]:
        """What KVM_GET_SUPPORTED_CPUID has, as KVM_SET_CPUID2 takes it."""
        head = x86.kvm_cpuid2(nent=_MAX_CPUID_ENTRIES)
        room = bytes(_MAX_CPUID_ENTRIES * ctypes.sizeof(x86.kvm_cpuid_entry2))
        found = bytes(head) + room
        buffer = (ctypes.c_ubyte * len(found))(*found)
        self.ioctl("KVM_GET_SUPPORTED_CPUID", ctypes.addressof(buffer))
        return buffer

    def model_specific_registers(self) -> tuple[int, ...]:
        """Numbers of those that guests have, but for counters, which never rest."""
        head = x86.kvm_msr_list(0)
        self.try_ioctl("KVM_GET_MSR_INDEX_LIST", head)  # E2BIG; the head says how many there are
        numbers = (ctypes.c_uint32 * (head.nmsrs + 1))(head.nmsrs)
        self.ioctl("KVM_GET_MSR_INDEX_LIST", ctypes.addressof(numbers))
        return tuple(index for index in numbers[1:] if index not in x86.COUNTERS)


def open_x86(path: str = DEVICE) -> X86Kvm:
    """Open /dev/kvm on an x86 host.

    :raises KvmMissing: it is not there, may not be opened, or is no KVM
    """
    kvm = X86Kvm(open_device(path))
    kvm.check_version(path)
    return kvm
