# SPDX-License-Identifier: Apache-2.0
"""Short ways to a VM with memory, for checks that run inside the lab."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from prefault.guest import port
from prefault.guest.program import Program, Step
from prefault.kvm import Kvm, open_kvm
from prefault.kvm.vcpu import Vcpu
from prefault.kvm.vm import Vm
from prefault.machine import Backing, Exit, MemoryRegion, Resident, SlotFlags, VcpuConfig, VmConfig

CODE = 0x4000_0000
DATA = 0x8000_0000
DEVICE = 0x0A00_0000
MIB = 1 << 20
CODE_SIZE = 2 * MIB
PAGE = 4096

_kvm: list[Kvm] = []


def kvm() -> Kvm:
    """The one system descriptor."""
    if not _kvm:
        _kvm.append(open_kvm())
    return _kvm[0]


@contextlib.contextmanager
def make_vm(size: int = MIB, backing: Backing = Backing.PRIVATE, **region: object) -> Iterator[Vm]:
    """A VM with a slot for code and a slot 1 of ``size`` at DATA."""
    with kvm().create_vm(VmConfig()) as vm:
        vm.set_user_memory_region(MemoryRegion(0, CODE, CODE_SIZE, resident=Resident.WRITE))
        if size:
            vm.set_user_memory_region(data_region(size, backing, **region))
        yield vm


def data_region(size: int = MIB, backing: Backing = Backing.PRIVATE, **region: object) -> MemoryRegion:
    """Slot 1 at DATA."""
    return MemoryRegion(1, DATA, size, backing, **region)  # type: ignore[arg-type]  # fields by name


def start(vm: Vm, *steps: Step, config: VcpuConfig | None = None) -> Vcpu:
    """A new vCPU at the beginning of a program."""
    program = Program(steps, CODE)
    vm.install(program)
    vcpu = vm.create_vcpu(config or VcpuConfig())
    vcpu.load(program)
    return vcpu


def restart(vm: Vm, vcpu: Vcpu, *steps: Step, arguments: Sequence[int] = ()) -> None:
    """Another program for a vCPU that is there already."""
    program = Program(steps, CODE)
    vm.install(program)
    vcpu.load(program, arguments)


def finish(vcpu: Vcpu) -> list[int]:
    """Run to the end; the values reported on the way."""
    values, last = [], None
    for last in port.events(vcpu):
        if isinstance(last, port.Reported):
            values.append(last.value)
    assert last == port.Done(), f"ended with {last}"
    return values


def until_exit(vcpu: Vcpu) -> Exit:
    """The next event or exit."""
    return port.proceed(vcpu)


READONLY = SlotFlags.READONLY
LOG = SlotFlags.LOG_DIRTY_PAGES
