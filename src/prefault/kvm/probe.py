# SPDX-License-Identifier: Apache-2.0
"""What the KVM of this host offers. Works on any Linux, also where there is no KVM."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from prefault.abi import constants
from prefault.errors import KvmError, KvmMissing, PrefaultError
from prefault.guest import port
from prefault.guest.program import RET, DeviceRead, Execute, Marker, Program, Read, Report, Step
from prefault.kvm import X86Kvm, hugepages, open_host, stage2, tracefs, tracing
from prefault.kvm.descriptor import Descriptor
from prefault.kvm.system import DEVICE, Kvm
from prefault.kvm.vm import host_page_size
from prefault.machine import MemoryRegion, Resident, Vcpu, Vm, VmConfig

_DEFAULT_TYPE = 0
_CODE, _CODE_SIZE, _DEVICE = 0x4000_0000, 0x20_0000, 0x0A00_0000
"""Where the guest is that is run to find something out, and where it has no memory."""
_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "arm64": 282}
"""Number of the system call."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class VmKind:
    """What KVM_CHECK_EXTENSION says on a VM of one kind.

    :ivar name: ``default`` or ``protected``
    :ivar creatable: whether KVM_CREATE_VM gives one; all else is 0 otherwise
    :ivar why_not: what KVM_CREATE_VM said, if not
    """

    name: str
    creatable: bool
    pre_fault_memory: int = 0
    guest_memfd: int = 0
    guest_memfd_flags: int = 0
    max_vcpus: int = 0
    why_not: str = ""


@dataclass(frozen=True)
class Facts:
    """What was found. ``missing`` says what is not there and what to do about it."""

    machine: str
    kernel: str
    page_size: int
    kvm: bool
    kvm_error: str
    guests: bool
    """Whether prefault can run its guests here: KVM on arm64."""
    api_version: int
    pre_fault_memory: int
    """KVM_CAP_PRE_FAULT_MEMORY on /dev/kvm."""
    ipa_limit: int
    """Bits of IPA space that a VM can have; 0 if KVM does not say."""
    nested: bool
    nested_e2h0: bool
    mmio_sign_extends: bool
    """Whether a guest's signed read of a device comes out sign-extended; on Linux 6.12 it does not."""
    access_flag_by_hardware: bool
    """Whether the processor sets the access flag of an old leaf by itself, without a fault of the guest."""
    executable_at_once: bool
    """Whether memory that a guest has read can be executed without another fault: with DIC it can."""
    vm_kinds: tuple[VmKind, ...]
    thp: str
    """``always``, ``madvise``, ``never``, or empty."""
    thp_size: int
    hugetlb: dict[int, int]
    """Page size in bytes → free pages."""
    memfd: bool
    userfaultfd: bool
    stage2_tables: bool
    """Whether stage-2 tables can be read from debugfs."""
    fault_tracing: bool
    """Whether stage-2 faults can be counted through tracefs."""
    missing: tuple[str, ...] = ()


def facts(device: str = DEVICE) -> Facts:
    """Probe this host."""
    found = _host_facts()
    try:
        kvm = open_host(device)
    except KvmMissing as error:
        found = dataclasses.replace(found, kvm_error=str(error))
    else:
        with kvm:
            found = _kvm_facts(found, kvm)
    return dataclasses.replace(found, missing=tuple(_missing(found)))


def _host_facts() -> Facts:
    return Facts(
        machine=platform.machine(),
        kernel=platform.release(),
        page_size=host_page_size(),
        kvm=False,
        kvm_error="",
        guests=False,
        api_version=0,
        pre_fault_memory=0,
        ipa_limit=0,
        nested=False,
        nested_e2h0=False,
        mmio_sign_extends=False,
        access_flag_by_hardware=False,
        executable_at_once=False,
        vm_kinds=(),
        thp=hugepages.thp_mode(),
        thp_size=hugepages.pmd_size(),
        hugetlb=hugepages.sizes(),
        memfd=_memfd(),
        userfaultfd=_userfaultfd(),
        stage2_tables=False,
        fault_tracing=any(tracefs.has(event.path) for event in (tracing.ARM64, tracing.X86)),
    )


def _kvm_facts(found: Facts, kvm: Kvm | X86Kvm) -> Facts:
    arm64 = found.machine in ("aarch64", "arm64")
    kinds = [("default", _DEFAULT_TYPE)]
    if arm64:
        kinds.append(("protected", constants.KVM_VM_TYPE_ARM_PROTECTED))
    return dataclasses.replace(
        found,
        kvm=True,
        guests=arm64,
        api_version=kvm.ioctl("KVM_GET_API_VERSION"),
        pre_fault_memory=kvm.check_extension(constants.KVM_CAP_PRE_FAULT_MEMORY),
        ipa_limit=kvm.check_extension(constants.KVM_CAP_ARM_VM_IPA_SIZE) if arm64 else 0,
        nested=bool(arm64 and kvm.check_extension(constants.KVM_CAP_ARM_EL2)),
        nested_e2h0=bool(arm64 and kvm.check_extension(constants.KVM_CAP_ARM_EL2_E2H0)),
        mmio_sign_extends=_mmio_sign_extends(kvm),
        access_flag_by_hardware=_access_flag_by_hardware(kvm),
        executable_at_once=_executable_at_once(kvm),
        vm_kinds=tuple(_vm_kind(kvm, name, kind) for name, kind in kinds),
        stage2_tables=arm64 and _stage2_tables(kvm),
    )


def _vm_kind(kvm: Kvm | X86Kvm, name: str, kind: int) -> VmKind:
    try:
        vm = Descriptor(kvm.create_vm_descriptor(kind))
    except KvmError as error:
        return VmKind(name, False, why_not=os.strerror(error.errno))
    with vm:
        return VmKind(
            name,
            True,
            pre_fault_memory=_check(vm, constants.KVM_CAP_PRE_FAULT_MEMORY),
            guest_memfd=_check(vm, constants.KVM_CAP_GUEST_MEMFD),
            guest_memfd_flags=_check(vm, constants.KVM_CAP_GUEST_MEMFD_FLAGS),
            max_vcpus=_check(vm, constants.KVM_CAP_MAX_VCPUS),
        )


def _check(vm: Descriptor, capability: int) -> int:
    return max(0, vm.try_ioctl("KVM_CHECK_EXTENSION", capability)[0])


def _stage2_tables(kvm: Kvm | X86Kvm) -> bool:
    """Look into the debugfs folder of a VM made for the purpose."""
    try:
        vm = Descriptor(kvm.create_vm_descriptor(_DEFAULT_TYPE))
    except KvmError:
        return False
    with vm:
        folders = stage2.DEBUGFS_KVM.glob(f"*-{vm.fd}") if os.access(stage2.DEBUGFS_KVM, os.R_OK) else ()
        return any(_readable(folder / "stage2_page_tables") for folder in folders)


def _mmio_sign_extends(kvm: Kvm | X86Kvm) -> bool:
    """Have a guest read a device that gives it a negative byte."""
    with contextlib.suppress(PrefaultError), kvm.create_vm(VmConfig(gic=False)) as vm:
        vcpu = _guest(vm, DeviceRead(_DEVICE, 1, sign_extend=True), Report())
        vcpu.run()
        vcpu.complete_mmio(0x80)
        return port.proceed(vcpu) == port.Reported(0xFFFF_FFFF_FFFF_FF80)
    return False


def _access_flag_by_hardware(kvm: Kvm | X86Kvm) -> bool:
    """Have a guest read a page that the host has aged."""
    data = _CODE + _CODE_SIZE // 2
    with contextlib.suppress(PrefaultError), kvm.create_vm(VmConfig(gic=False)) as vm:
        vcpu = _guest(vm, Read(data), Marker(1), Read(data), Marker(2))
        port.proceed(vcpu)
        vm.age(data, kvm.page_size)
        with vm.count_faults() as counts:
            port.proceed(vcpu)
        return not counts.read
    return False


def _executable_at_once(kvm: Kvm | X86Kvm) -> bool:
    """Have a guest read a page, and then execute it."""
    data = _CODE + _CODE_SIZE // 2
    with contextlib.suppress(PrefaultError), kvm.create_vm(VmConfig(gic=False)) as vm:
        vcpu = _guest(vm, Read(data), Marker(1), Execute(data), Marker(2))
        vm.write_memory(data, RET)
        port.proceed(vcpu)
        with vm.count_faults() as counts:
            port.proceed(vcpu)
        return not counts.execute
    return False


def _guest(vm: Vm, *steps: Step) -> Vcpu:
    """A vCPU at the beginning of a program."""
    program = Program(steps, _CODE)
    vm.set_user_memory_region(MemoryRegion(0, _CODE, _CODE_SIZE, resident=Resident.WRITE))
    vcpu = vm.create_vcpu()
    vm.install(program)
    vcpu.load(program)
    return vcpu


def _readable(file: Path) -> bool:
    try:
        file.read_text()
    except OSError:
        return False
    return True


def _memfd() -> bool:
    try:
        os.close(os.memfd_create("prefault-probe"))
    except OSError:
        return False
    return True


def _userfaultfd() -> bool:
    """Whether this process may have one."""
    number = _USERFAULTFD.get(platform.machine())
    if number is None:
        return False
    fd = int(_libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK))
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def _missing(found: Facts) -> list[str]:
    if not found.kvm:
        return [found.kvm_error]
    missing = []
    if not found.guests:
        missing.append(
            f"this host is {found.machine}: arm64 guests run in the lab (prefault run --machine lab)"
        )
    if not any(kind.pre_fault_memory for kind in found.vm_kinds):
        missing.append(
            "no VM reports KVM_CAP_PRE_FAULT_MEMORY: boot a kernel with the series, as the lab does"
        )
    if found.guests and not found.nested:
        missing.append("no nested guests: boot with kvm-arm.mode=nested on a machine with FEAT_NV2")
    if found.guests and not found.stage2_tables:
        missing.append("stage-2 tables cannot be read: root, debugfs and CONFIG_PTDUMP_STAGE2_DEBUGFS")
    if found.guests and not found.fault_tracing:
        missing.append("stage-2 faults cannot be counted: root, tracefs and CONFIG_FTRACE")
    return missing
