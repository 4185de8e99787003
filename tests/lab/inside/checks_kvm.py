# SPDX-License-Identifier: Apache-2.0
"""What must hold of the KVM back end with ordinary guests."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import signal
from pathlib import Path

from prefault.errors import GuestFailed, KvmError, UsageError
from prefault.guest import port
from prefault.guest.program import (
    RET,
    Argument,
    DeviceRead,
    DeviceWrite,
    Execute,
    Expect,
    Marker,
    Read,
    Report,
    Walk,
    Write,
)
from prefault.kvm.vm import Vm
from prefault.machine import (
    FILE_CONTENTS,
    GUEST_MEMORY,
    Advice,
    Backing,
    Failed,
    Interrupted,
    MemoryFault,
    MemoryRegion,
    MmioExit,
    Resident,
    SlotFlags,
    VcpuConfig,
    VmConfig,
)
from tests.lab.inside.checks import Checks, main
from tests.lab.inside.guests import (
    CODE,
    DATA,
    DEVICE,
    LOG,
    MIB,
    PAGE,
    READONLY,
    data_region,
    finish,
    kvm,
    make_vm,
    restart,
    start,
    until_exit,
)

checks = Checks()
VALUE = 0x1122_3344_5566_7788
NEGATIVE = 0xF1E2_D3C4_B5A6_9788
EC_SHIFT = 26
EC_INSTRUCTION_ABORT_SAME_EL = 0x21
SMALL = (Backing.PRIVATE, Backing.SHARED, Backing.FILE_PRIVATE, Backing.FILE_SHARED, Backing.GUEST_MEMFD)


@checks.each(itertools.product(GUEST_MEMORY, Resident))
def guest_and_host_see_one_memory(backing: Backing, resident: Resident) -> None:
    with make_vm(4 * MIB, backing, resident=resident) as vm:
        vm.write_memory(DATA + 2 * MIB, VALUE.to_bytes(8, "little"))
        vcpu = start(vm, Read(DATA + 2 * MIB), Report(), Write(DATA + 3 * MIB, NEGATIVE))
        assert finish(vcpu) == [VALUE]
        assert vm.read_memory(DATA + 3 * MIB, 8) == NEGATIVE.to_bytes(8, "little")


@checks
def a_private_file_holds_its_contents() -> None:
    with make_vm(MIB, Backing.FILE_PRIVATE) as vm:
        vcpu = start(vm, Read(DATA + 512), Report())
        assert finish(vcpu) == [int.from_bytes(FILE_CONTENTS[:8], "little")]


def _device_reads() -> list[tuple[int, bool, int]]:
    cases = itertools.product((1, 2, 4, 8), (False, True), (32, 64))
    return [case for case in cases if 8 * (case[0] + case[1]) <= case[2]]


@checks.each(_device_reads())
def a_device_read_delivers_its_value(width: int, signed: bool, bits: int) -> None:
    with make_vm(0) as vm:
        vcpu = start(vm, DeviceRead(DEVICE + 8, width, signed, bits), Report())
        assert until_exit(vcpu) == MmioExit(DEVICE + 8, width, False)
        vcpu.complete_mmio(NEGATIVE)
        value = NEGATIVE & (1 << 8 * width) - 1
        if signed:
            value = (value - (1 << 8 * width)) & (1 << bits) - 1
        assert finish(vcpu) == [value]


@checks
def a_prefault_loses_its_cpu_in_its_middle() -> None:
    size, mapped = 8 * MIB, list[int]()
    with make_vm(size, resident=Resident.WRITE) as vm, vm.preempt() as preempted:
        vcpu = start(vm, Report())

        def look() -> None:
            mapped.append(sum(leaf.size for leaf in vm.stage2() if leaf.ipa >= DATA))

        for _ in range(30):
            vm.advise(DATA, size, Advice.DONTNEED)
            preempted.run(lambda: vcpu.pre_fault_memory(DATA, size), look)
            assert sum(leaf.size for leaf in vm.stage2() if leaf.ipa >= DATA) == size
    assert sum(0 < one < size for one in mapped) >= 3, mapped


@checks.each((1, 2, 4, 8))
def a_device_write_delivers_its_width(width: int) -> None:
    with make_vm(0) as vm:
        vcpu = start(vm, DeviceWrite(DEVICE, NEGATIVE, width))
        assert until_exit(vcpu) == MmioExit(DEVICE, width, True, NEGATIVE & (1 << 8 * width) - 1)
        assert finish(vcpu) == []


@checks.each((1, 2, 4, 8))
def an_access_has_its_width(width: int) -> None:
    with make_vm() as vm:
        vm.write_memory(DATA, b"\xff" * 16)
        vcpu = start(vm, Write(DATA, 0, width), Read(DATA + 8 - width, width), Report())
        assert finish(vcpu) == [0 if width == 8 else (1 << 8 * width) - 1]
        assert vm.read_memory(DATA, 16) == bytes(width) + b"\xff" * (16 - width)


@checks
def a_complete_mmio_without_a_read_is_refused() -> None:
    with make_vm(0) as vm:
        vcpu = start(vm, DeviceWrite(DEVICE, 1))
        until_exit(vcpu)
        try:
            vcpu.complete_mmio(1)
        except UsageError:
            return
        raise AssertionError("accepted")


@checks
def a_guest_that_faults_says_why() -> None:
    with make_vm(0) as vm:
        vcpu = start(vm, Execute(DATA))
        try:
            until_exit(vcpu)
        except GuestFailed as error:
            assert error.esr is not None and error.esr >> EC_SHIFT == EC_INSTRUCTION_ABORT_SAME_EL, error
            assert error.elr == DATA and error.far == DATA, error
            return
        raise AssertionError("the guest did not fail")


@checks
def a_guest_that_expects_in_vain_says_so() -> None:
    with make_vm() as vm:
        vcpu = start(vm, Read(DATA), Expect(7))
        try:
            until_exit(vcpu)
        except GuestFailed as error:
            assert error.esr is None and "0x7" in str(error), error
            return
        raise AssertionError("the guest did not fail")


@checks
def a_function_in_memory_is_executed() -> None:
    with make_vm() as vm:
        vm.write_memory(DATA + PAGE, RET)
        assert finish(start(vm, Execute(DATA + PAGE))) == []


@checks.each((0, 1, 250, 500, 999, 1000))
def a_walk_writes_what_it_says(permille: int) -> None:
    with make_vm() as vm:
        walk = Walk(DATA, MIB, PAGE, permille)
        vm.write_memory(DATA, b"".join(bytes([index]).ljust(PAGE, b"\0") for index in range(MIB // PAGE)))
        total = sum(index for index in range(MIB // PAGE) if not walk.is_write(index))
        assert finish(start(vm, walk, Report())) == [total]
        for index in range(MIB // PAGE):
            address = DATA + index * PAGE
            expected = address if walk.is_write(index) else index
            assert int.from_bytes(vm.read_memory(address, 8), "little") == expected, index


@checks
def arguments_reach_the_program() -> None:
    with make_vm() as vm:
        vcpu = start(vm, Marker(0))
        restart(vm, vcpu, Write(Argument(0), Argument(1)), arguments=(DATA + 64, VALUE))
        assert finish(vcpu) == []
        assert vm.read_memory(DATA + 64, 8) == VALUE.to_bytes(8, "little")


@checks
def a_program_loads_over_a_pending_exit() -> None:
    with make_vm() as vm:
        vcpu = start(vm, DeviceRead(DEVICE))
        assert isinstance(until_exit(vcpu), MmioExit)
        restart(vm, vcpu, Marker(5))
        assert until_exit(vcpu) == port.AtMarker(5)


@checks
def the_dirty_log_has_the_written_pages() -> None:
    with make_vm(flags=LOG) as vm:
        vcpu = start(vm, Write(DATA + 3 * PAGE, 1), Read(DATA + 9 * PAGE), Write(DATA + 255 * PAGE, 1))
        finish(vcpu)
        assert vm.get_dirty_log(1) == [3, 255]
        assert vm.get_dirty_log(1) == []


@checks
def a_dirty_log_can_be_switched_on_later() -> None:
    with make_vm(resident=Resident.WRITE) as vm:
        vcpu = start(vm, Walk(DATA, MIB, PAGE, 1000))
        finish(vcpu)
        vm.set_user_memory_region(data_region(flags=LOG))
        restart(vm, vcpu, Write(DATA + 7 * PAGE, 1))
        finish(vcpu)
        assert vm.get_dirty_log(1) == [7]


@checks
def a_write_to_a_read_only_slot_is_mmio() -> None:
    with make_vm(flags=READONLY) as vm:
        vm.write_memory(DATA, VALUE.to_bytes(8, "little"))
        vcpu = start(vm, Read(DATA), Report(), Write(DATA, 1, 4))
        assert until_exit(vcpu) == port.Reported(VALUE)
        assert until_exit(vcpu) == MmioExit(DATA, 4, True, 1)
        assert vm.read_memory(DATA, 8) == VALUE.to_bytes(8, "little")


@checks
def a_deleted_slot_is_a_device_and_keeps_its_mapping() -> None:
    with make_vm() as vm:
        vm.write_memory(DATA, VALUE.to_bytes(8, "little"))
        behind = vm._slots[1].memory
        vcpu = start(vm, Read(DATA), Report(), Read(DATA))
        assert until_exit(vcpu) == port.Reported(VALUE)
        vm.set_user_memory_region(data_region(0))
        assert isinstance(until_exit(vcpu), MmioExit)
        assert behind.read(0, 8) == VALUE.to_bytes(8, "little")


@checks
def a_moved_slot_takes_its_memory_along() -> None:
    with make_vm() as vm:
        vm.write_memory(DATA, VALUE.to_bytes(8, "little"))
        vm.set_user_memory_region(dataclasses.replace(data_region(), gpa=DATA + 16 * MIB))
        assert finish(start(vm, Read(DATA + 16 * MIB), Report())) == [VALUE]


@checks
def overlapping_slots_are_refused_with_the_errno() -> None:
    with make_vm() as vm:
        try:
            vm.set_user_memory_region(MemoryRegion(2, DATA, MIB))
        except KvmError as error:
            assert error.errno == errno.EEXIST and error.gpa == DATA, error
            return
        raise AssertionError("accepted")


def _leaves(vm: Vm, size: int) -> dict[int, int]:
    """Bytes of the data slot that are mapped, by level."""
    found: dict[int, int] = {}
    for leaf in vm.stage2():
        if DATA <= leaf.ipa < DATA + size:
            found[leaf.level] = found.get(leaf.level, 0) + leaf.size
            assert leaf.block == (leaf.level < 3), leaf
            assert leaf.readable and leaf.accessed, leaf
    return found


@checks.each(SMALL)
def small_pages_are_mapped_as_pages(backing: Backing) -> None:
    with make_vm(4 * MIB, backing, resident=Resident.WRITE) as vm:
        finish(start(vm, Walk(DATA, 4 * MIB, PAGE, 1000)))
        assert _leaves(vm, 4 * MIB) == {3: 4 * MIB}


@checks.each(((MIB >> 4, 3), (2 * MIB, 2), (32 * MIB, 2), (1024 * MIB, 1)))
def hugetlb_is_mapped_at_its_level(page_size: int, level: int) -> None:
    size = max(64 * MIB, page_size)
    with make_vm(size, Backing.HUGETLB, page_size=page_size) as vm:
        finish(start(vm, Walk(DATA, size, 16 * MIB, 1000)))
        assert set(_leaves(vm, size)) == {level}


@checks
def thp_is_mapped_as_blocks() -> None:
    with make_vm(8 * MIB, Backing.THP, resident=Resident.WRITE) as vm:
        finish(start(vm, Walk(DATA, 8 * MIB, 2 * MIB, 500)))
        assert _leaves(vm, 8 * MIB) == {2: 8 * MIB}


@checks
def a_misaligned_slot_has_no_blocks() -> None:
    with make_vm(8 * MIB, Backing.THP, resident=Resident.WRITE, hva_offset=PAGE) as vm:
        finish(start(vm, Walk(DATA, 8 * MIB, PAGE)))
        assert _leaves(vm, 8 * MIB) == {3: 8 * MIB}


@checks
def every_touched_page_is_one_fault() -> None:
    with make_vm(resident=Resident.WRITE) as vm:
        vm.write_memory(DATA + MIB - PAGE, RET)
        vcpu = start(vm, Marker(0), Walk(DATA, MIB - PAGE, PAGE, 400), Execute(DATA + MIB - PAGE), Marker(1))
        assert until_exit(vcpu) == port.AtMarker(0)
        with vm.count_faults() as faults:
            assert until_exit(vcpu) == port.AtMarker(1)
        writes = sum(Walk(DATA, MIB, PAGE, 400).is_write(index) for index in range(255))
        assert (faults.read, faults.write, faults.execute) == (255 - writes, writes, 1), faults
        assert (faults.permission, faults.mmio) == (0, 1), faults
        assert faults.ipas == [DATA + index * PAGE for index in range(256)]


@checks
def a_write_to_the_zero_page_is_a_permission_fault() -> None:
    with make_vm(resident=Resident.READ) as vm:
        vcpu = start(vm, Read(DATA), Marker(0), Write(DATA, 1), Marker(1))
        assert until_exit(vcpu) == port.AtMarker(0)
        with vm.count_faults() as faults:
            assert until_exit(vcpu) == port.AtMarker(1)
        # Breaking CoW invalidates the leaf, so that the write may fault once more.
        assert faults.total == faults.write >= faults.permission == 1, faults


@checks
def one_trace_instance_is_kept_and_traces_nothing_between_intervals() -> None:
    instances = Path("/sys/kernel/tracing/instances")
    with make_vm() as vm:
        vcpu = start(vm, Read(DATA))
        with vm.count_faults():
            finish(vcpu)
        (kept,) = instances.iterdir()
        assert (kept / "tracing_on").read_text() == "0\n"
        with vm.count_faults():
            assert list(instances.iterdir()) == [kept]
        assert list(instances.iterdir()) == [kept]


@checks
def a_signal_interrupts_a_guest() -> None:
    with make_vm(16 * MIB, resident=Resident.WRITE) as vm:
        vcpu = start(vm, *[Walk(DATA, 16 * MIB, 8)] * 8)
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert until_exit(vcpu) == Interrupted()
        assert finish(vcpu) == []


@checks
def an_uninitialised_vcpu_does_not_run() -> None:
    with make_vm(0) as vm:
        vcpu = vm.create_vcpu(VcpuConfig(initialised=False))
        assert vcpu.run() == Failed(errno.ENOEXEC)


@checks
def a_guest_without_host_memory_ends_with_efault() -> None:
    with make_vm() as vm:
        vcpu = start(vm, Read(DATA + PAGE))
        vm.unmap(DATA, MIB)
        exit_ = until_exit(vcpu)
        assert isinstance(exit_, Failed | MemoryFault) and exit_.errno == errno.EFAULT, exit_
        assert not isinstance(exit_, MemoryFault) or exit_.gpa == DATA + PAGE, exit_


@checks
def registers_keep_what_they_are_given() -> None:
    with make_vm(0) as vm:
        vcpu = vm.create_vcpu()
        for name in ("x0", "x30", "sp", "pc", "sp_el1", "elr_el1", "vbar_el1", "tpidr_el0"):
            vcpu.set_register(name, VALUE & ~0x7FF)
            assert vcpu.get_register(name) == VALUE & ~0x7FF, name


@checks
def two_vcpus_run_one_program_each() -> None:
    with make_vm() as vm:
        first, second = vm.create_vcpu(), vm.create_vcpu()
        restart(vm, first, Write(Argument(0), 1), arguments=(DATA,))
        restart(vm, second, Write(Argument(0), 1), arguments=(DATA + 8,))
        assert finish(first) == finish(second) == []
        assert vm.read_memory(DATA, 16) == 2 * (1).to_bytes(8, "little")


@checks
def a_vm_without_a_gic_runs() -> None:
    with kvm().create_vm(VmConfig(gic=False)) as vm:
        vm.set_user_memory_region(MemoryRegion(0, CODE, 2 * MIB))
        assert finish(start(vm, Marker(1))) == []


@checks
def closing_leaves_nothing_open() -> None:
    def open_things() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        mappings = maps.count("memfd:") + maps.count("kvm-vcpu")
        return len(list(Path("/proc/self/fd").iterdir())), mappings

    kvm()
    before = open_things()
    with make_vm(backing=Backing.FILE_SHARED) as vm:
        finish(start(vm, Read(DATA)))
        folder = vm.debugfs
        assert folder.is_dir()
        assert open_things() != before
    assert open_things() == before
    assert not folder.exists()
    vm.close()


@checks
def huge_pages_are_given_back() -> None:
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    before = int(pool.read_text())
    with make_vm(8 * MIB, Backing.HUGETLB, page_size=2 * MIB):
        assert int(pool.read_text()) == before + 4
    assert int(pool.read_text()) == before


@checks
def an_ipa_space_that_is_too_large_is_refused() -> None:
    try:
        kvm().create_vm(VmConfig(ipa_bits=53))
    except UsageError as error:
        assert "53" in str(error)
        return
    raise AssertionError("accepted")


@checks
def dirty_flags_are_what_the_kernel_means() -> None:
    assert (SlotFlags.LOG_DIRTY_PAGES, SlotFlags.READONLY) == (1, 2)


if __name__ == "__main__":
    main(checks)
