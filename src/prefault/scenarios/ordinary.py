# SPDX-License-Identifier: Apache-2.0
"""Pre-faulting by a vCPU of an ordinary guest: what it maps, how it progresses, what it leaves alone."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from prefault.abi.constants import EHWPOISON, KVM_EXIT_SYSTEM_EVENT
from prefault.guest import port
from prefault.guest.program import DeviceRead, DeviceWrite, Execute, Marker, Read, Report, Walk, Write
from prefault.machine import (
    Access,
    Advice,
    Backing,
    Failed,
    MemoryFault,
    MemoryRegion,
    MmioExit,
    OtherExit,
    Resident,
    SlotFlags,
    Vcpu,
    VcpuConfig,
)
from prefault.scenarios.scenario import DATA, DEVICE, Stage, scenario, scenarios

PAGES = 64
SMALL = (Backing.PRIVATE, Backing.SHARED, Backing.FILE_PRIVATE, Backing.FILE_SHARED, Backing.GUEST_MEMFD)


@scenarios("M1", cases=[(backing,) for backing in SMALL])
def prefaulted_memory_costs_the_guest_no_fault(stage: Stage, backing: Backing) -> None:
    vm = stage.vm(stage.data(PAGES, backing))
    vcpu = stage.vcpu(vm, Marker(0), Walk(DATA, PAGES * stage.page, stage.page), Report())
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.shown_leaves(vm)
    counts = stage.faults(vm, vcpu)
    stage.holds(counts.total == 0, f"{counts.total} stage-2 faults on {PAGES} pre-faulted pages")


@scenarios("M1", cases=[(backing,) for backing in SMALL])
def what_is_not_prefaulted_still_faults(stage: Stage, backing: Backing) -> None:
    vm = stage.vm(stage.data(PAGES, backing))
    vcpu = stage.vcpu(vm, Marker(0), Walk(DATA, PAGES * stage.page, stage.page), Report())
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, PAGES // 2 * stage.page)
    counts = stage.faults(vm, vcpu)
    stage.holds(counts.total == PAGES // 2, f"{counts.total} stage-2 faults, not one for each page left out")


@scenario("M1", "M6")
def guest_reads_what_the_host_wrote_before_and_after(stage: Stage) -> None:
    vm = stage.vm(stage.data(2))
    vm.write_memory(DATA, (0x1122).to_bytes(8, "little"))
    vcpu = stage.vcpu(vm, Read(DATA), Report(), Read(DATA + stage.page), Report())
    stage.pre_fault(vcpu, DATA, 2 * stage.page)
    vm.write_memory(DATA + stage.page, (0x3344).to_bytes(8, "little"))
    stage.holds(stage.finish(vcpu) == [0x1122, 0x3344], "guest and host do not share one memory")


@scenario("M15")
def new_leaves_have_the_access_flag(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    stage.pre_fault(stage.vcpu(vm, Marker(0)), DATA, PAGES * stage.page)
    stage.holds(all(leaf.accessed for leaf in stage.leaves(vm)), "a pre-faulted leaf is not young")


@scenario("M2", "M9")
def progress_inside_a_block_is_cut_to_the_range(stage: Stage) -> None:
    vm = stage.vm(stage.data(2 * stage.block // stage.page, Backing.THP))
    vcpu = stage.vcpu(vm, Marker(0))
    start, size = DATA + 3 * stage.page, 2 * stage.page
    progress = stage.pre_fault_once(vcpu, start, size)
    stage.holds((progress.gpa, progress.size) == (start + size, 0), f"a part of a block gave {progress}")
    if stage.sees_leaves:
        leaves = stage.leaves(vm)
        stage.holds(leaves[0].block and leaves[0].size == stage.block, "not one whole block was mapped")
    start = DATA + stage.block - stage.page
    progress = stage.pre_fault_once(vcpu, start, 3 * stage.page)
    stage.holds((progress.gpa, progress.size) == (start + 3 * stage.page, 0), f"two blocks gave {progress}")


@scenario("M2", "M9")
def a_range_that_cuts_blocks_is_mapped_to_its_ends(stage: Stage) -> None:
    vm = stage.vm(stage.data(3 * stage.block // stage.page, Backing.THP))
    vcpu = stage.vcpu(vm, Marker(0))
    stage.pre_fault(vcpu, DATA + stage.block - stage.page, stage.block + 2 * stage.page)
    leaves = stage.leaves(vm)
    stage.holds(sum(leaf.size for leaf in leaves) == 3 * stage.block, f"a block is missing: {leaves}")


@scenario("M2", "M10")
def range_beyond_the_slot_stops_at_its_end(stage: Stage) -> None:
    vm = stage.vm(stage.data(5))
    vcpu = stage.vcpu(vm, Marker(0))
    end = DATA + 5 * stage.page
    first = stage.pre_fault_once(vcpu, DATA + 2 * stage.page, 7 * stage.page)
    stage.holds((first.errno, first.gpa, first.size) == (0, end, 4 * stage.page), f"not cut: {first}")
    second = stage.pre_fault_once(vcpu, first.gpa, first.size)
    stage.holds((second.gpa, second.size) == (end, 4 * stage.page), f"an error changed the range: {second}")
    stage.shown_leaves(vm)


@scenario("M2")
def range_goes_on_in_the_next_slot(stage: Stage) -> None:
    second = MemoryRegion(2, DATA + 3 * stage.page, 3 * stage.page, Backing.SHARED, Resident.WRITE)
    vm = stage.vm(stage.data(3), second)
    progress = stage.pre_fault_once(stage.vcpu(vm, Marker(0)), DATA, 6 * stage.page)
    stage.holds(progress.size == 0, f"adjacent slots are one range to user space: {progress}")
    stage.shown_leaves(vm)


@scenario("M5")
def mapped_memory_is_left_as_it_is(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    vcpu = stage.vcpu(vm, Walk(DATA, PAGES // 2 * stage.page, stage.page, 1000), Marker(0))
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    before = stage.leaves(vm)
    progress = stage.pre_fault_once(vcpu, DATA, PAGES * stage.page)
    stage.holds((progress.errno, progress.size) == (0, 0), f"mapped memory gave {progress}")
    stage.holds(before == stage.leaves(vm), "pre-faulting mapped memory changed its leaves")


@scenario("M3")
def vcpu_that_never_ran_can_prefault(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    vcpu = vm.create_vcpu()
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.shown_leaves(vm)
    stage.load(vm, vcpu, Read(DATA), Report())
    stage.finish(vcpu)


@scenarios("M3", cases=[(False,), (True,)])
def vcpu_that_never_ran_can_prefault_beside_one_that_did(stage: Stage, el2: bool) -> None:
    vm = stage.vm(stage.data(PAGES))
    config = VcpuConfig(el2=el2)
    runs, waits = stage.vcpu(vm, Read(DATA), Report(), Marker(0), config=config), vm.create_vcpu(config)
    stage.proceed(runs)
    stage.pre_fault(waits, DATA, PAGES * stage.page)
    stage.shown_leaves(vm)
    stage.finish(runs)
    stage.load(vm, waits, Marker(0), Walk(DATA, PAGES * stage.page, stage.page), Report())
    stage.proceed(waits)
    counts = stage.faults(vm, waits)
    stage.holds(counts.total == 0, f"{counts.total} stage-2 faults on {PAGES} pre-faulted pages")


def _device_reads() -> list[tuple[object, ...]]:
    wide = [(width, False, 64) for width in (1, 2, 4, 8)]
    narrow = [(width, False, 32) for width in (1, 2, 4)]
    signed = [(width, True, bits) for width in (1, 2, 4) for bits in (32, 64) if width * 8 < bits]
    return [*wide, *narrow, *signed]


def delivered(value: int, width: int, signed: bool, bits: int) -> int:
    """What the X register holds after a device read of ``width`` bytes gave ``value``."""
    number = int.from_bytes(value.to_bytes(8, "little")[:width], "little", signed=signed)
    return number & (1 << bits) - 1


@scenarios("M3", cases=_device_reads())
def pending_device_read_survives(stage: Stage, width: int, signed: bool, bits: int) -> None:
    read = DeviceRead(DEVICE, width, signed, bits)
    vm = stage.vm(stage.data(PAGES))
    vcpu = stage.vcpu(vm, read, Report(), read, Report())
    value = 0xF1E2_D3C4_B5A6_9788
    undisturbed = _undisturbed(stage, vcpu, value)
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    vcpu.complete_mmio(value)
    stage.holds(stage.finish(vcpu) == [undisturbed], f"the read did not deliver {undisturbed:#x}")


def _undisturbed(stage: Stage, vcpu: Vcpu, value: int) -> int:
    """What the register holds after a device read that nobody comes between; Linux 6.12 loses the sign."""
    stage.proceed(vcpu)
    vcpu.complete_mmio(value)
    reported = stage.proceed(vcpu)
    assert isinstance(reported, port.Reported)
    return reported.value


@scenarios("M3", "M10", cases=[(width,) for width in (1, 2, 4, 8)])
def pending_device_read_survives_a_failed_prefault(stage: Stage, width: int) -> None:
    vm = stage.vm(stage.data(PAGES, Backing.GUEST_MEMFD))
    vm.advise(DATA, stage.page, Advice.HWPOISON)
    vcpu = stage.vcpu(vm, DeviceRead(DEVICE, width), Report())
    stage.proceed(vcpu)
    value = 0x8877_6655_4433_2211
    # The value waits in kvm_run, where a memory fault exit would have its fields.
    vcpu.complete_mmio(value)
    progress = stage.pre_fault_once(vcpu, DATA, stage.page)
    stage.holds(progress.errno == EHWPOISON, f"a poisoned page gave {progress}")
    expected = delivered(value, width, False, 64)
    stage.holds(stage.finish(vcpu) == [expected], f"the read did not deliver {expected:#x}")


@scenario("M3")
def pending_device_write_is_not_repeated(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    vcpu = stage.vcpu(vm, DeviceWrite(DEVICE, 7), DeviceWrite(DEVICE, 8), Marker(0))
    for _ in range(3):
        stage.proceed(vcpu)
        stage.pre_fault(vcpu, DATA, PAGES * stage.page)


@scenario("M3")
def a_read_completed_by_an_immediate_exit_stays_completed(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    read = DeviceRead(DEVICE, 2, True)
    vcpu = stage.vcpu(vm, read, Report(), read, Report())
    undisturbed = _undisturbed(stage, vcpu, 0x8001)
    stage.proceed(vcpu)
    vcpu.complete_mmio(0x8001)
    stage.see("immediate exit", vcpu.run(immediate_exit=True))
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.see("immediate exit", vcpu.run(immediate_exit=True))
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.holds(stage.finish(vcpu) == [undisturbed], "the read was completed twice, or not at all")


@scenario("M3", "M10")
def a_memory_fault_exit_can_be_followed_by_prefaults(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES, Backing.GUEST_MEMFD))
    bad = DATA + 3 * stage.page
    vm.advise(bad, stage.page, Advice.HWPOISON)
    vcpu = stage.vcpu(vm, Marker(0), Read(bad), Report())
    stage.proceed(vcpu)
    fault = stage.proceed(vcpu)
    stage.holds(fault == MemoryFault(bad, stage.page, 0, EHWPOISON), f"a poisoned page gave {fault}")
    progress = stage.pre_fault_once(vcpu, DATA, PAGES * stage.page)
    stage.holds((progress.errno, progress.gpa) == (0, bad), f"progress up to the bad page, not {progress}")
    progress = stage.pre_fault_once(vcpu, bad, stage.page)
    stage.holds(progress.errno == EHWPOISON, f"a poisoned page gave {progress}")
    stage.holds(stage.proceed(vcpu) == fault, "the guest's access is not tried again")


@scenario("M3", "M10")
def a_failed_run_can_be_followed_by_prefaults(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    hole = DATA + 3 * stage.page
    vm.protect(hole, stage.page, Access.NONE)
    vcpu = stage.vcpu(vm, Marker(0), Read(hole), Marker(1))
    stage.proceed(vcpu)
    stage.holds(stage.proceed(vcpu) == Failed(errno.EFAULT), "memory without access should fail the run")
    progress = stage.pre_fault_once(vcpu, DATA, PAGES * stage.page)
    stage.holds((progress.errno, progress.gpa) == (0, hole), f"progress up to the hole, not {progress}")
    vm.protect(hole, stage.page, Access.WRITE)
    stage.pre_fault(vcpu, hole, stage.page)
    with vm.count_faults() as counts:
        stage.proceed(vcpu)
    stage.holds(counts.total == 0, f"{counts.total} stage-2 faults on memory that is mapped")


_SYSTEM_OFF = b"".join(
    instruction.to_bytes(4, "little")
    for instruction in (
        0xD280_0100,  # mov x0, #8
        0xF2B0_8000,  # movk x0, #0x8400, lsl #16
        0xD400_0002,  # hvc #0
    )
)
"""PSCI's SYSTEM_OFF, after which there is nothing to return to."""


@scenario("M3")
def a_vcpu_that_is_switched_off_can_prefault(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    vcpu = stage.vcpu(vm, Marker(0), Execute(DATA), Marker(1))
    vm.write_memory(DATA, _SYSTEM_OFF)
    stage.proceed(vcpu)
    off = stage.proceed(vcpu)
    stage.holds(
        isinstance(off, OtherExit) and off.reason == KVM_EXIT_SYSTEM_EVENT, f"SYSTEM_OFF came out as {off}"
    )
    before = vcpu.registers()
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.shown_leaves(vm)
    stage.unchanged(before, vcpu.registers())


@scenarios("M3", cases=[(width,) for width in (1, 2, 4, 8)])
def pending_device_write_of_each_width_survives(stage: Stage, width: int) -> None:
    vm = stage.vm(stage.data(PAGES))
    vcpu = stage.vcpu(vm, DeviceWrite(DEVICE, 0xF1E2_D3C4_B5A6_9788, width), Marker(0))
    exit_ = stage.proceed(vcpu)
    data = 0xF1E2_D3C4_B5A6_9788 & (1 << 8 * width) - 1
    stage.holds(exit_ == MmioExit(DEVICE, width, True, data), f"the write came out as {exit_}")
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.proceed(vcpu)


@scenario("M3", "M10")
def a_write_to_a_read_only_slot_stays_pending(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES, flags=SlotFlags.READONLY))
    vcpu = stage.vcpu(vm, Write(DATA, 0x55), Read(DATA), Report(), Marker(0))
    exit_ = stage.proceed(vcpu)
    stage.holds(exit_ == MmioExit(DATA, 8, True, 0x55), f"the write came out as {exit_}")
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    with vm.count_faults() as counts:
        values = stage.finish(vcpu)
    stage.holds(values == [0], f"the guest read {values}: its write was done after all")
    stage.holds(counts.total == 0, f"{counts.total} stage-2 faults on memory that is mapped")


@scenario("M3")
def registers_do_not_change(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    vcpu = stage.vcpu(vm, Read(DATA), DeviceRead(DEVICE, 2, True), Report())
    stage.proceed(vcpu)
    before = vcpu.registers()
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.unchanged(before, vcpu.registers())


@scenario("M3")
def a_vcpu_that_never_ran_keeps_its_registers(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    vcpu = vm.create_vcpu()
    before = vcpu.registers()
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.unchanged(before, vcpu.registers())


@scenario("M3", "M12")
def two_vcpus_prefault_one_range(stage: Stage) -> None:
    vm = stage.vm(stage.data(16 * PAGES))
    vcpus = [vm.create_vcpu(VcpuConfig()) for _ in range(2)]
    size = 16 * PAGES * stage.page
    _together(*(partial(vcpu.pre_fault_memory, DATA, size) for vcpu in vcpus))
    if stage.sees_leaves:
        leaves = stage.leaves(vm)
        stage.holds(sum(leaf.size for leaf in leaves) == size, "a page was left out")


@scenario("M3", "M12")
def one_vcpu_prefaults_what_another_walks(stage: Stage) -> None:
    size = 16 * PAGES * stage.page
    vm = stage.vm(stage.data(16 * PAGES))
    walker = stage.vcpu(vm, Walk(DATA, size, stage.page, 500), Report())
    other = vm.create_vcpu()
    _together(partial(other.pre_fault_memory, DATA, size), partial(stage.finish, walker))
    stage.shown_leaves(vm)


def _together(*tasks: Callable[[], object]) -> None:
    """Do all tasks at once, each in a thread."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        for running in [pool.submit(task) for task in tasks]:
            running.result()
