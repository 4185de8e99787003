# SPDX-License-Identifier: Apache-2.0
"""Things that random programs rarely come to, each as a function of a ``Kvm`` to what is observed.

``python3 listed.py`` prints them as one JSON object on the real KVM; the spec must give the same.
Standard library only: this also runs inside the lab.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator

from prefault.abi import constants
from prefault.errors import KvmError, PrefaultError
from prefault.guest import port
from prefault.guest.program import (
    RET,
    DeviceRead,
    EnterL2,
    Execute,
    L2Mapping,
    Marker,
    Program,
    Read,
    Report,
    Step,
    Walk,
    Write,
)
from prefault.machine import (
    Backing,
    Kvm,
    MemoryRegion,
    MmioExit,
    Resident,
    SlotFlags,
    Vcpu,
    VcpuConfig,
    Vm,
    VmConfig,
)

CODE, DATA, DEVICE, PAGE, BLOCK = 0x4000_0000, 0x1_0000_0000, 0x0A00_0000, 0x1000, 2 << 20
_CAPABILITIES = [
    "USER_MEMORY",
    "USER_MEMORY2",
    "SYNC_MMU",
    "ONE_REG",
    "READONLY_MEM",
    "DEVICE_CTRL",
    "CHECK_EXTENSION_VM",
    "IMMEDIATE_EXIT",
    "ARM_VM_IPA_SIZE",
    "ARM_EL2",
    "ARM_EL2_E2H0",
    "PRE_FAULT_MEMORY",
    "GUEST_MEMFD",
    "GUEST_MEMFD_FLAGS",
    "MEMORY_ATTRIBUTES",
    "ARM_MTE",
    "VM_TYPES",
    "MEMORY_FAULT_INFO",
    "MANUAL_DIRTY_LOG_PROTECT2",
    "DIRTY_LOG_RING_ACQ_REL",
    "ARM_PSCI_0_2",
]


def without_space(message: str) -> str:
    """QEMU reports the IPA space in HPFAR_EL2.NS, which is RES0 in a guest without Secure state."""
    return re.sub(r"HPFAR_EL2 0x80+(?=[1-9a-f])", "HPFAR_EL2 0x", message)


def _slot(vm: Vm, region: MemoryRegion) -> int:
    try:
        vm.set_user_memory_region(region)
    except KvmError as error:
        return error.errno
    return 0


def _vm(kvm: Kvm, *regions: MemoryRegion, config: VmConfig | None = None) -> Vm:
    vm = kvm.create_vm(config or VmConfig())
    for region in (MemoryRegion(0, CODE, BLOCK, resident=Resident.WRITE), *regions):
        vm.set_user_memory_region(region)
    return vm


def _seen(vm: Vm, vcpu: Vcpu, program: Program) -> list[object]:
    """Run a program and tell all of it."""
    vm.install(program)
    vcpu.load(program)
    events: list[object] = []
    with vm.count_faults() as faults:
        while len(events) < 20:
            try:
                event = port.proceed(vcpu)
            except PrefaultError as error:
                events.append(without_space(str(error)))
                break
            events.append(repr(event))
            if isinstance(event, MmioExit) and not event.is_write:
                vcpu.complete_mmio(0xFEDC_BA98_8765_43F1)
            elif not isinstance(event, port.AtMarker | port.Reported):
                break
    return [events, dataclasses.asdict(faults), [dataclasses.astuple(leaf) for leaf in vm.stage2()]]


def capabilities(kvm: Kvm) -> Iterator[object]:
    """What KVM_CHECK_EXTENSION says."""
    numbers = [getattr(constants, f"KVM_CAP_{name}") for name in _CAPABILITIES]
    with kvm.create_vm() as vm:
        for name, number in zip(_CAPABILITIES, numbers, strict=True):
            yield [name, kvm.check_extension(number), vm.check_extension(number)]


def slot_errors(kvm: Kvm) -> Iterator[object]:
    """What KVM_SET_USER_MEMORY_REGION refuses."""
    region = MemoryRegion(1, DATA, BLOCK)
    with _vm(kvm) as vm:
        yield _slot(vm, dataclasses.replace(region, size=0))
        yield _slot(vm, region)
        yield _slot(vm, dataclasses.replace(region, slot=2, gpa=DATA + PAGE))
        yield _slot(vm, dataclasses.replace(region, flags=SlotFlags.READONLY))
        yield _slot(vm, dataclasses.replace(region, gpa=DATA + BLOCK))
        yield _slot(vm, MemoryRegion(3, (1 << 40) - BLOCK, BLOCK))
        yield _slot(vm, MemoryRegion(4, (1 << 40) - PAGE, 2 * PAGE))
        yield _slot(vm, MemoryRegion(5, 1 << 45, PAGE))
        yield _slot(vm, MemoryRegion(6, 2 * DATA, BLOCK, Backing.GUEST_MEMFD))
        yield _slot(
            vm, MemoryRegion(6, 2 * DATA, BLOCK, Backing.GUEST_MEMFD, flags=SlotFlags.LOG_DIRTY_PAGES)
        )
        yield _slot(vm, MemoryRegion(7, 3 * DATA, BLOCK, Backing.GUEST_MEMFD, flags=SlotFlags.READONLY))


def pre_fault_errors(kvm: Kvm) -> Iterator[object]:
    """What KVM_PRE_FAULT_MEMORY refuses, and what it leaves."""
    ranges = [(DATA, 0), (DATA + 8, PAGE), (DATA, 8), ((1 << 64) - PAGE, PAGE), ((1 << 64) - PAGE, 2 * PAGE)]
    ranges += [(0, PAGE), (1 << 40, PAGE), (1 << 50, PAGE), ((1 << 63), PAGE), (DATA + BLOCK, PAGE)]
    ranges += [(DATA + BLOCK - PAGE, 2 * PAGE), (DATA, 2 * BLOCK), (DATA, BLOCK)]
    with _vm(kvm, MemoryRegion(1, DATA, BLOCK)) as vm:
        idle = vm.create_vcpu(VcpuConfig(initialised=False))
        vcpu = vm.create_vcpu()
        for gpa, size in ranges:
            yield [gpa, size, dataclasses.astuple(idle.pre_fault_memory_once(gpa, size))]
            yield [gpa, size, dataclasses.astuple(vcpu.pre_fault_memory_once(gpa, size))]
        yield dataclasses.astuple(vcpu.pre_fault_memory_once(DATA, PAGE, 1))
        yield repr(idle.run())


def ipa_sizes(kvm: Kvm) -> Iterator[object]:
    """The tables of smaller and larger IPA spaces."""
    for bits in (32, 36, 39, 40, 42, 43, 44, 47, 48):
        top = MemoryRegion(1, (1 << bits) - 3 * BLOCK, 2 * BLOCK, Backing.THP, Resident.WRITE)
        with _vm(kvm, top, config=VmConfig(ipa_bits=bits)) as vm:
            vcpu = vm.create_vcpu()
            yield [bits, *_seen(vm, vcpu, Program((Write(top.gpa + 8, 7), Read(top.gpa + 8), Report())))]
            yield dataclasses.astuple(vcpu.pre_fault_memory_once(top.gpa + BLOCK, BLOCK))
            yield _seen(vm, vcpu, Program((Read((1 << bits) + 8),)))


def mmio(kvm: Kvm) -> Iterator[object]:
    """Pending MMIO reads of every kind, pre-faulted meanwhile."""
    kinds = [(width, False, 64) for width in (1, 2, 4, 8)]
    kinds += [(1, True, 32), (2, True, 32), (1, True, 64), (2, True, 64), (4, True, 64), (4, False, 32)]
    for width, sign, bits in kinds:
        with _vm(kvm, MemoryRegion(1, DATA, BLOCK)) as vm:
            vcpu = vm.create_vcpu()
            program = Program((DeviceRead(DEVICE + 8, width, sign, bits), Report()))
            vm.install(program)
            vcpu.load(program)
            yield repr(vcpu.run())
            vcpu.complete_mmio(0xFEDC_BA98_8765_43F1)
            yield dataclasses.astuple(vcpu.pre_fault_memory_once(DATA, 8 * PAGE))
            yield repr(port.proceed(vcpu))
            yield repr(port.proceed(vcpu))


def read_only_slot(kvm: Kvm) -> Iterator[object]:
    """A read-only slot is read from memory and written by MMIO."""
    steps = (
        Read(DATA),
        Report(),
        Write(DATA + 4, 0x55AA, 2),
        Read(DATA),
        Report(),
        Write(DATA, 1),
        Marker(1),
    )
    with _vm(kvm, MemoryRegion(1, DATA, BLOCK, Backing.THP, Resident.WRITE, SlotFlags.READONLY)) as vm:
        yield _seen(vm, vm.create_vcpu(), Program(steps))


def instruction_abort(kvm: Kvm) -> Iterator[object]:
    """A guest that runs into nothing, and a vCPU that comes too late."""
    with _vm(kvm) as vm:
        yield _seen(vm, vm.create_vcpu(), Program((Execute(DATA),)))
    with _vm(kvm) as vm:
        yield _seen(vm, vm.create_vcpu(VcpuConfig(el2=True)), Program((Execute(DATA),)))
        vm.create_vcpu()


def two_vcpus(kvm: Kvm) -> Iterator[object]:
    """One vCPU pre-faults for the other."""
    with _vm(kvm, MemoryRegion(1, DATA, BLOCK, Backing.SHARED)) as vm:
        first, second = vm.create_vcpu(), vm.create_vcpu()
        yield dataclasses.astuple(first.pre_fault_memory_once(DATA, BLOCK // 2))
        yield _seen(vm, second, Program((Walk(DATA, BLOCK, PAGE, 500), Report())))


def dirty_log(kvm: Kvm) -> Iterator[object]:
    """Blocks become pages when a logged slot is written, and blocks again."""
    region = MemoryRegion(1, DATA, 2 * BLOCK, Backing.THP, Resident.WRITE)
    logged = dataclasses.replace(region, flags=SlotFlags.LOG_DIRTY_PAGES)
    with _vm(kvm, region) as vm:
        vcpu = vm.create_vcpu()
        write = Program((Write(DATA, 1), Write(DATA + BLOCK + PAGE, 1), Read(DATA + 5 * PAGE), Report()))
        for state in (region, logged, region, logged, region):
            yield _slot(vm, state)
            yield dataclasses.astuple(vcpu.pre_fault_memory_once(DATA + 8 * PAGE, 2 * PAGE))
            yield _seen(vm, vcpu, write)
            if state is logged:
                yield vm.get_dirty_log(1)
                yield _seen(vm, vcpu, write)
                yield vm.get_dirty_log(1)


def dirty_ring(kvm: Kvm) -> Iterator[object]:
    """With a ring and no bitmap, demand faults map a logged slot like any other, blocks included."""
    steps = (Read(DATA + 3 * PAGE), Write(DATA + 3 * PAGE, 1), Write(DATA + 5 * PAGE, 1), Marker(1))
    for backing in (Backing.PRIVATE, Backing.SHARED, Backing.THP):
        region = MemoryRegion(1, DATA, BLOCK, backing, Resident.WRITE, SlotFlags.LOG_DIRTY_PAGES)
        with _vm(kvm, region, config=VmConfig(dirty_ring=4096)) as vm:
            vcpu = vm.create_vcpu()
            for first in (DATA, DATA + 4 * PAGE):
                yield _seen(vm, vcpu, Program(steps))
                yield vm.harvest_dirty_rings()
                yield dataclasses.astuple(vcpu.pre_fault_memory_once(first, 4 * PAGE))
                yield [dataclasses.astuple(leaf) for leaf in vm.stage2()]
            try:
                vm.get_dirty_log(1)
            except KvmError as error:
                yield error.errno


def nested(kvm: Kvm) -> Iterator[object]:
    """What an L2 may and may not, with E2H 0 and 1, and what is in the shadows."""
    cases: list[tuple[L2Mapping, tuple[Step, ...]]] = [
        (L2Mapping(DATA, DATA, BLOCK, 2), (Write(DATA, 3), Read(DATA), Report())),
        (L2Mapping(DATA, DATA + BLOCK, BLOCK, 2), (Write(DATA, 3), Execute(DATA + PAGE), Marker(2))),
        (L2Mapping(2 * DATA, DATA, BLOCK, 3), (Walk(2 * DATA, BLOCK, 64 * PAGE, 500), Report())),
        (L2Mapping(DATA, DATA, BLOCK, 2, writable=False), (Read(DATA), Write(DATA, 3))),
        (L2Mapping(DATA, DATA, BLOCK, 2, readable=False), (Write(DATA, 3), Read(DATA))),
        (L2Mapping(DATA, DATA, BLOCK, 3, executable=False), (Read(DATA), Execute(DATA))),
        (L2Mapping(DATA, DATA, 1 << 30, 1), (Write(DATA, 3), Write(DATA + BLOCK, 3), Marker(2))),
        (L2Mapping(DATA, DATA + 8 * BLOCK, BLOCK, 2), (DeviceRead(DATA + 16, 2, sign_extend=True), Report())),
        (L2Mapping(DATA, DATA, BLOCK, 2), (Read(3 * DATA),)),
    ]
    for e2h0 in (False, True):
        for mapping, steps in cases:
            data = MemoryRegion(1, DATA, 2 * BLOCK, Backing.THP, Resident.WRITE)
            with _vm(kvm, data) as vm:
                vm.write_memory(DATA + BLOCK + PAGE, RET)
                vcpu = vm.create_vcpu(VcpuConfig(el2=True, e2h0=e2h0))
                yield _seen(vm, vcpu, Program((EnterL2(steps, (mapping,)), Marker(9))))
                yield [[dataclasses.astuple(leaf) for leaf in table] for table in vm.nested_stage2()]


LISTED: dict[str, Callable[[Kvm], Iterator[object]]] = {
    function.__name__: function
    for function in (
        capabilities,
        slot_errors,
        pre_fault_errors,
        ipa_sizes,
        mmio,
        read_only_slot,
        instruction_abort,
        two_vcpus,
        dirty_log,
        dirty_ring,
        nested,
    )
}


def observe(kvm: Kvm) -> dict[str, object]:
    """All of it, as JSON would have it."""
    found: dict[str, object] = {}
    for name, function in LISTED.items():
        seen: list[object] = []
        try:
            seen.extend(function(kvm))
        except PrefaultError as error:
            seen.append(f"{type(error).__name__}: {error}")
        found[name] = seen
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]  # a dict went in


def main() -> None:
    """Print what the real KVM shows."""
    from prefault.kvm import open_kvm

    with open_kvm() as kvm:
        print(json.dumps(observe(kvm)))


if __name__ == "__main__":
    main()
