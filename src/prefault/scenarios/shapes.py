# SPDX-License-Identifier: Apache-2.0
"""Tables of every shape: huge pages of every size, IPA spaces of every size, memory without pages."""

from __future__ import annotations

import errno
import random
from dataclasses import replace

from prefault.abi.constants import KVM_CAP_ARM_VM_IPA_SIZE
from prefault.errors import CapabilityMissing, KvmError, UsageError
from prefault.guest.program import Execute, Marker, Read, Report, Walk, Write
from prefault.machine import (
    Access,
    Advice,
    Backing,
    Failed,
    Leaf,
    MemoryRegion,
    Resident,
    SlotFlags,
    Vm,
    VmConfig,
)
from prefault.scenarios.scenario import DATA, Stage, scenario, scenarios

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
TOUCHES = 512
"""How often a walk over huge pages touches them: not each of the 262144 pages that 1 GiB has."""

_HUGE = {
    "contiguous-pages": {4 * KIB: 64 * KIB, 16 * KIB: 2 * MIB, 64 * KIB: 2 * MIB},
    "block": {4 * KIB: 2 * MIB, 16 * KIB: 32 * MIB, 64 * KIB: 512 * MIB},
    "contiguous-blocks": {4 * KIB: 32 * MIB, 16 * KIB: 1 * GIB},
    "large-block": {4 * KIB: 1 * GIB},
}
"""Sizes of hugetlb pages, by page size of the host, but for those that are too much for a test."""


def _huge(stage: Stage, kind: str) -> int:
    size = _HUGE[kind].get(stage.page)
    if size is None:
        raise CapabilityMissing(f"hosts with {stage.page:#x}-byte pages have no {kind} of a bearable size")
    return size


def _huge_vm(stage: Stage, region: MemoryRegion, config: VmConfig = VmConfig()) -> Vm:  # noqa: B008 - frozen
    try:
        return stage.vm(region, config=config)
    except UsageError as error:
        raise CapabilityMissing(str(error)) from error


def _same_leaves(stage: Stage, region: MemoryRegion) -> list[Leaf]:
    """Map a slot by demand faults, then by pre-faulting in another VM; the leaves, if equal."""
    stride = max(stage.page, region.size // TOUCHES)
    demand = _huge_vm(stage, region)
    stage.finish(stage.vcpu(demand, Walk(region.gpa, region.size, stride), Report()))
    wanted = stage.leaves(demand)
    demand.close()  # There may be one such huge page only.
    ahead = _huge_vm(stage, region)
    vcpu = stage.vcpu(ahead, Marker(0), Walk(region.gpa, region.size, stride), Report())
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, region.gpa, region.size)
    found = stage.leaves(ahead)
    whole = sum(leaf.size for leaf in wanted) == region.size
    stage.holds(found == wanted or not whole, f"demand faults give {wanted}, pre-faulting {found}")
    stage.holds(sum(leaf.size for leaf in found) == region.size, f"not all is mapped: {found}")
    stage.holds(stage.faults(ahead, vcpu).total == 0, "the guest faulted on memory that is mapped")
    return found


@scenarios("M9", "M1", cases=[(kind,) for kind in _HUGE if kind != "large-block"])
def huge_pages_of_every_size_are_mapped_as_by_demand_faults(stage: Stage, kind: str) -> None:
    size = _huge(stage, kind)
    _same_leaves(stage, MemoryRegion(1, DATA, size, Backing.HUGETLB, page_size=size))


@scenario("M9", "M1")
def a_huge_page_of_the_size_of_a_level_1_block_is_one(stage: Stage) -> None:
    stage.not_under_pkvm("there are no blocks above level 2")
    size = _huge(stage, "large-block")
    vm = _huge_vm(stage, MemoryRegion(1, DATA, size, Backing.HUGETLB, page_size=size))
    vcpu = stage.vcpu(vm, Marker(0), Walk(DATA, size, size // TOUCHES), Report())
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, size)
    leaves = stage.leaves(vm)
    stage.holds([(leaf.level, leaf.size) for leaf in leaves] == [(1, size)], f"mapped {leaves}")
    stage.holds(stage.faults(vm, vcpu).total == 0, "the guest faulted on memory that is mapped")


@scenarios("M9", cases=[(kind,) for kind in _HUGE if kind != "contiguous-pages"])
def slots_that_cut_huge_pages_have_smaller_leaves_at_their_ends(stage: Stage, kind: str) -> None:
    huge = _huge(stage, kind)
    start, size = DATA + huge // 2 - 2 * stage.page, huge // 4 + 5 * stage.page
    region = MemoryRegion(1, start, size, Backing.HUGETLB, page_size=huge)
    found = _same_leaves(stage, region)
    stage.holds(all(region.gpa <= leaf.ipa for leaf in found), "a leaf begins before its slot")


@scenarios("M9", "M1", cases=[("contiguous-blocks",), ("large-block",)])
def blocks_within_a_huge_page_hold_what_the_host_wrote(stage: Stage, kind: str) -> None:
    huge = _huge(stage, kind)
    start, blocks = DATA + huge // 2, range(4)
    region = MemoryRegion(1, start, len(blocks) * stage.block, Backing.HUGETLB, page_size=huge)
    vm = _huge_vm(stage, region)
    for block in blocks:
        vm.write_memory(start + block * stage.block, (0x51 + block).to_bytes(8, "little"))
    reads = [Read(start + block * stage.block) for block in blocks]
    vcpu = stage.vcpu(vm, Marker(0), *(step for read in reads for step in (read, Report())))
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, start, region.size)
    stage.shown_leaves(vm)
    values = stage.finish(vcpu)
    stage.holds(values == [0x51 + block for block in blocks], f"the guest read {values}")


@scenarios("M9", cases=[("block",), ("contiguous-blocks",)])
def huge_pages_at_an_odd_offset_have_no_blocks(stage: Stage, kind: str) -> None:
    huge = _huge(stage, kind)
    region = MemoryRegion(
        1, DATA, 64 * stage.page, Backing.HUGETLB, page_size=huge, hva_offset=3 * stage.page
    )
    stage.holds(all(leaf.level == 3 for leaf in _same_leaves(stage, region)), "a misaligned slot has a block")


@scenarios("M2", "M9", cases=[("contiguous-blocks",), ("large-block",)])
def progress_inside_a_huge_page_is_cut_to_the_range(stage: Stage, kind: str) -> None:
    huge = _huge(stage, kind)
    vm = _huge_vm(stage, MemoryRegion(1, DATA, huge, Backing.HUGETLB, page_size=huge))
    vcpu = stage.vcpu(vm, Marker(0))
    start, size = DATA + huge // 2 + 3 * stage.page, 2 * stage.page
    progress = stage.pre_fault_once(vcpu, start, size)
    stage.holds((progress.gpa, progress.size) == (start + size, 0), f"a part of a block gave {progress}")
    stage.shown_leaves(vm)


@scenarios("M2", "M9", cases=[("contiguous-pages",), ("block",), ("contiguous-blocks",)])
def a_range_ends_with_its_slot_where_the_host_has_more(stage: Stage, kind: str) -> None:
    """The slot is a part of a huge page, which goes on behind it."""
    huge = _huge(stage, kind)
    size = huge // 2 + stage.page
    vm = _huge_vm(stage, MemoryRegion(1, DATA, size, Backing.HUGETLB, page_size=huge))
    vcpu = stage.vcpu(vm, Marker(0))
    progress = stage.pre_fault_once(vcpu, DATA, huge)
    stage.holds((progress.errno, progress.gpa) == (0, DATA + size), f"to the end of the slot: {progress}")
    behind = stage.pre_fault_once(vcpu, progress.gpa, progress.size)
    stage.holds(behind.errno == errno.ENOENT, f"behind the slot: {behind}")
    found = stage.leaves(vm)
    stage.holds(sum(leaf.size for leaf in found) == size, f"{size:#x} bytes are more than {found}")


@scenarios("M7", "M9", cases=[("contiguous-pages",), ("contiguous-blocks",)])
def logged_huge_pages_are_mapped_by_pages(stage: Stage, kind: str) -> None:
    huge = _huge(stage, kind)
    size = min(huge, 2 * stage.block)
    region = MemoryRegion(1, DATA, size, Backing.HUGETLB, flags=SlotFlags.LOG_DIRTY_PAGES, page_size=huge)
    vm = _huge_vm(stage, region)
    vcpu = stage.vcpu(vm, Marker(0), Write(DATA + 7 * stage.page, 1))
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, size)
    leaves = stage.shown_leaves(vm)
    stage.holds(all(leaf.level == 3 for leaf in leaves), "a logged slot has a block")
    stage.holds(not any(leaf.writable for leaf in leaves), "a logged slot has a writable leaf")
    stage.holds(vm.get_dirty_log(1) == [], "pre-faulting made pages dirty")
    stage.finish(vcpu)
    stage.holds(vm.get_dirty_log(1) == [7], "the guest's write is not in the log")


@scenario("M1", "M7", "M9")
def pages_of_a_block_hold_what_the_host_wrote(stage: Stage) -> None:
    """From the middle of a block that may only be mapped in pages, and further than one hold of the lock."""
    logged = SlotFlags.LOG_DIRTY_PAGES
    region = MemoryRegion(1, DATA, stage.block, Backing.THP, Resident.WRITE, flags=logged)
    vm = stage.vm(region)
    pages = (5, 68, 69, 140)
    for page in pages:
        vm.write_memory(DATA + page * stage.page, (0x51 + page).to_bytes(8, "little"))
    steps = [step for page in pages for step in (Read(DATA + page * stage.page), Report())]
    vcpu = stage.vcpu(vm, Marker(0), *steps)
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA + 5 * stage.page, 200 * stage.page)
    stage.shown_leaves(vm)
    values = stage.finish(vcpu)
    stage.holds(values == [0x51 + page for page in pages], f"the guest read {values}")


@scenario("M1", "M9")
def pages_behind_a_block_hold_what_the_host_wrote(stage: Stage) -> None:
    """The host has a block, and behind it pages, of which one is gone, where a second block would be."""
    vm = stage.vm(MemoryRegion(1, DATA, 2 * stage.block, Backing.THP, Resident.WRITE))
    second, gone, pages = DATA + stage.block, 5, (0, 1, 5, 70)
    for page in pages:
        vm.write_memory(second + page * stage.page, (0x51 + page).to_bytes(8, "little"))
    vm.advise(second + gone * stage.page, stage.page, Advice.DONTNEED)
    steps = [step for page in pages for step in (Read(second + page * stage.page), Report())]
    vcpu = stage.vcpu(vm, Marker(0), *steps)
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, 2 * stage.block)
    first = stage.shown_leaves(vm)[:1]
    stage.holds(all(leaf.size == stage.block for leaf in first), f"the first leaf is no block: {first}")
    values = stage.finish(vcpu)
    expected = [0 if page == gone else 0x51 + page for page in pages]
    stage.holds(values == expected, f"the guest read {values}")


@scenarios("M1", "M9", cases=[(between,) for between in ("hole", "zero-page", "pages")])
def blocks_that_are_not_neighbours_hold_what_the_host_wrote(stage: Stage, between: str) -> None:
    """The host has a block on either side of one that it has in another way, or not at all."""
    middle, last = DATA + stage.block, DATA + 2 * stage.block
    vm = stage.vm(MemoryRegion(1, DATA, 3 * stage.block, Backing.THP, Resident.WRITE))
    offsets = (0, 7 * stage.page, stage.block - stage.page)
    for ipa in (DATA, middle, last):
        for offset in offsets:
            vm.write_memory(ipa + offset, (ipa + offset).to_bytes(8, "little"))
    vm.advise(middle, stage.page if between == "pages" else stage.block, Advice.DONTNEED)
    if between == "zero-page":
        vm.advise(middle, stage.block, Advice.POPULATE_READ)
    where = [ipa + offset for ipa in (DATA, middle, last) for offset in offsets]
    steps = [step for ipa in where for step in (Read(ipa), Report())]
    vcpu = stage.vcpu(vm, Marker(0), *steps)
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, 3 * stage.block)
    leaves = stage.shown_leaves(vm)
    ends = (*leaves[:1], *leaves[-1:])
    stage.holds(all(leaf.block for leaf in ends), f"no blocks at either end: {leaves}")
    values = stage.finish(vcpu)
    expected = [int.from_bytes(vm.read_memory(ipa, 8), "little") for ipa in where]
    stage.holds(values == expected, f"the guest read {values}, the host has {expected}")
    stage.holds(values[0] == DATA and values[-1] == where[-1], f"the guest read {values}")


@scenario("M2", "M9")
def a_range_that_begins_in_a_mapped_block_is_mapped_to_its_end(stage: Stage) -> None:
    """Progress over what is mapped already ends with the block, and not a whole block later."""
    vm = stage.vm(MemoryRegion(1, DATA, 3 * stage.block, Backing.THP, Resident.WRITE))
    vcpu = stage.vcpu(vm, Marker(0))
    stage.pre_fault(vcpu, DATA, stage.block)
    stage.pre_fault(vcpu, DATA + stage.block // 2, stage.block)
    mapped = sum(leaf.size for leaf in stage.shown_leaves(vm))
    stage.holds(mapped in (2 * stage.block, 0), f"{mapped:#x} bytes of two blocks are mapped")


@scenario("M5", "M9")
def a_block_that_is_mapped_in_pages_stays_so_beside_one_that_is_not_mapped(stage: Stage) -> None:
    """It was mapped while dirty pages were logged. A page of it that is mapped is not faulted again."""
    size = 2 * stage.block
    vm = stage.vm(MemoryRegion(1, DATA, size, Backing.THP, Resident.WRITE, SlotFlags.LOG_DIRTY_PAGES))
    vcpu = stage.vcpu(vm, Marker(0))
    stage.pre_fault(vcpu, DATA + stage.block, stage.block)
    vm.set_user_memory_region(MemoryRegion(1, DATA, size, Backing.THP, Resident.WRITE))
    stage.pre_fault(vcpu, DATA, size)
    found = [(leaf.ipa, leaf.size, leaf.block) for leaf in stage.shown_leaves(vm)]
    expected = [(DATA, stage.block, True), (DATA + stage.block, stage.block, False)]
    stage.holds(found in (expected, []), f"not a block and pages: {found}")


_IPA_BITS = (32, 33, 36, 39, 40, 41, 42, 44, 47, 48, 49, 52)


@scenarios("M14", "M10", cases=[(bits,) for bits in _IPA_BITS])
def the_top_of_the_ipa_space_can_be_prefaulted(stage: Stage, bits: int) -> None:
    limit = stage.kvm.check_extension(KVM_CAP_ARM_VM_IPA_SIZE)
    if not limit:
        raise CapabilityMissing("VMs have no choice of an IPA space here")
    if bits > limit:
        raise CapabilityMissing(f"IPA spaces have up to {limit} bits here, not {bits}; boot with LPA2 for 52")
    pages = 16
    start, size = (1 << bits) - pages * stage.page, pages * stage.page
    vm = stage.vm(MemoryRegion(1, start, size, resident=Resident.WRITE), config=VmConfig(ipa_bits=bits))
    vcpu = stage.vcpu(vm, Marker(0), Walk(start, size, stage.page), Report())
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, start, size)
    leaves = stage.leaves(vm, start, size)
    stage.holds([(leaf.ipa, leaf.size) for leaf in leaves] == [(start, size)], f"mapped {leaves}")
    stage.holds(stage.faults(vm, vcpu).total == 0, "the guest faulted on memory that is mapped")
    beyond = stage.pre_fault_once(vcpu, 1 << bits, stage.page)
    stage.holds(beyond.errno == errno.ENOENT, f"beyond the IPA space: {beyond}")
    across = stage.pre_fault_once(vcpu, start + size - stage.page, 2 * stage.page)
    stage.holds((across.errno, across.gpa) == (0, 1 << bits), f"up to the end of the IPA space: {across}")


@scenario("M14", "M1")
def memory_without_pages_is_mapped_as_by_demand_faults(stage: Stage) -> None:
    region = MemoryRegion(1, DATA, 16 * stage.page, Backing.DEVICE)
    walk = Walk(region.gpa, region.size, stage.page)
    demand = stage.vm(region)
    vcpu = stage.vcpu(demand, walk, Marker(0), Execute(DATA), Marker(1))
    if isinstance(stage.proceed(vcpu), Failed):
        # Under pKVM, guests have no memory of devices.
        progress = stage.pre_fault_once(vcpu, region.gpa, region.size)
        stage.holds(progress.errno == errno.EFAULT, f"memory that guests cannot have gave {progress}")
        return
    wanted = stage.leaves(demand)
    stage.holds(not any(leaf.px or leaf.ux for leaf in wanted), "a device can be executed")
    ahead = stage.vm(region)
    vcpu = stage.vcpu(ahead, Marker(0), walk, Marker(1))
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, region.gpa, region.size)
    found = stage.leaves(ahead)
    stage.holds(wanted == found, f"demand faults give {wanted}, pre-faulting {found}")
    with ahead.count_faults() as counts:
        stage.proceed(vcpu)
    stage.holds(counts.total == 0, f"{counts.total} stage-2 faults on memory that is mapped")


@scenario("M14", "M6")
def secret_memory_is_for_no_guest(stage: Stage) -> None:
    """Though the host has it mapped like any other."""
    region = MemoryRegion(1, DATA, 16 * stage.page, Backing.SECRET)
    vm = stage.vm(region)
    vm.write_memory(DATA, bytes(region.size))
    vcpu = stage.vcpu(vm, Marker(0), Read(DATA), Marker(1))
    stage.proceed(vcpu)
    progress = stage.pre_fault_once(vcpu, DATA, region.size)
    stage.holds((progress.errno, progress.gpa) == (errno.EFAULT, DATA), f"secret memory gave {progress}")
    stage.shown_leaves(vm)
    event = stage.proceed(vcpu)
    stage.holds(isinstance(event, Failed), f"the guest's own access came to {event}")


@scenario("M14", "M6")
def memory_before_secret_memory_in_one_slot_is_all_that_is_mapped(stage: Stage) -> None:
    """Side by side in one table of the host's, each page with a PTE of its own: only the VMAs differ."""
    half = 8 * stage.page
    vm = stage.vm(MemoryRegion(1, DATA, 2 * half, Backing.PRIVATE, Resident.WRITE))
    vm.map_anew(DATA + half, half, secret=True)
    vm.write_memory(DATA + half, bytes(half))
    vcpu = stage.vcpu(vm, Marker(0))
    progress = stage.pre_fault_once(vcpu, DATA, 2 * half)
    stage.holds((progress.errno, progress.gpa) == (0, DATA + half), f"up to secret memory: {progress}")
    progress = stage.pre_fault_once(vcpu, DATA + half, half)
    stage.holds(
        (progress.errno, progress.gpa) == (errno.EFAULT, DATA + half), f"secret memory gave {progress}"
    )
    stage.holds(
        not any(leaf.ipa + leaf.size > DATA + half for leaf in stage.shown_leaves(vm)), "it is mapped"
    )


def _tables(stage: Stage) -> int:
    """How many tables to have: their memory is not touched, but the host has to believe in it."""
    return min(24, 4 * GIB // stage.block)


def _in_no_order(addresses: list[int]) -> list[int]:
    return random.Random(1).sample(addresses, len(addresses))


@scenarios("M1", "M9", cases=[("host",), ("guest",)])
def pages_behind_the_end_of_a_table_hold_what_the_host_wrote(stage: Stage, whose: str) -> None:
    """The host's tables end elsewhere than the guest's, and all lie in memory in no order."""
    few = 8 * stage.page
    end_of_table = {"host": stage.block - few, "guest": stage.block}[whose]
    offset = {"host": few, "guest": stage.block - few}[whose]
    vm = stage.vm(MemoryRegion(1, DATA, _tables(stage) * stage.block, hva_offset=offset))
    ends = [DATA + end_of_table + number * stage.block for number in range(_tables(stage) - 1)]
    values = {end + at: 1 + (end + at) // stage.page for end in ends for at in range(-few, few, stage.page)}
    for gpa in (*_in_no_order(ends), *values):
        vm.write_memory(gpa, values[gpa].to_bytes(8, "little"))
    walks = (step for end in ends for step in (Walk(end - few, 2 * few, stage.page), Report()))
    vcpu = stage.vcpu(vm, Marker(0), *walks)
    stage.proceed(vcpu)
    for end in _in_no_order(ends):
        stage.pre_fault(vcpu, end - few, 2 * few)
    with vm.count_faults() as counts:
        read = stage.finish(vcpu)
    stage.holds(counts.total == 0, f"{counts.total} stage-2 faults on memory that was pre-faulted")
    wanted = [sum(values[end + at] for at in range(-few, few, stage.page)) for end in ends]
    stage.holds(read == wanted, f"the guest read what sums up to {read}, not to {wanted}")


@scenario("M2", "M10")
def leaves_behind_the_end_of_a_table_are_those_of_the_next(stage: Stage) -> None:
    """Tables lie in memory in no order: some begin, some end with what the guest has, and no two in a row."""
    few = 8 * stage.page
    vm = stage.vm(MemoryRegion(1, DATA, _tables(stage) * stage.block))
    ends = [DATA + number * stage.block for number in range(1, _tables(stage), 3)]
    walks = (Walk(end - few, 2 * few, stage.page) for end in ends)
    vcpu = stage.vcpu(vm, Marker(0), *walks, Report())
    stage.proceed(vcpu)
    there = [*(end - few for end in ends), *(end + stage.block for end in ends[:-1])]
    for gpa in _in_no_order(there):
        stage.pre_fault(vcpu, gpa, few)
    for end in ends:
        stage.pre_fault(vcpu, end - few, 2 * few)
    faults = stage.faults(vm, vcpu).total
    stage.holds(faults == 0, f"{faults} stage-2 faults on memory that was pre-faulted")


@scenario("M14", "M7")
def memory_without_pages_cannot_be_logged(stage: Stage) -> None:
    vm = stage.vm()
    region = MemoryRegion(1, DATA, 16 * stage.page, Backing.DEVICE, flags=SlotFlags.LOG_DIRTY_PAGES)
    try:
        vm.set_user_memory_region(region)
    except KvmError as error:
        stage.holds(error.errno == errno.EINVAL, f"logging a device gave {error}")
        progress = stage.pre_fault_once(stage.vcpu(vm, Marker(0)), DATA, stage.page)
        stage.holds(progress.errno == errno.ENOENT, f"the slot that was refused gave {progress}")
    else:
        stage.holds(False, "writes to a device can be logged")


@scenarios("M10", "M12", "M14", cases=[("block",), ("pages",)])
def devices_that_the_host_may_not_access_are_efault(stage: Stage, kind: str) -> None:
    """Their PTEs stay, so that they can be found, but not as a block."""
    size = min(stage.block, 4 * MIB) if kind == "block" else 16 * stage.page
    region = MemoryRegion(1, DATA, size, Backing.DEVICE)
    vm = stage.vm(region)
    vm.protect(DATA, size, Access.NONE)
    vcpu = stage.vcpu(vm, Marker(0))
    progress = stage.pre_fault_once(vcpu, DATA, size)
    stage.holds(progress.errno == errno.EFAULT, f"a device without access gave {progress}")
    stage.holds(stage.leaves(vm) == [], "a device without access is mapped")


@scenario("M2", "M12", "M14")
def what_is_missing_in_a_huge_page_larger_than_blocks_can_be_is_mapped(stage: Stage) -> None:
    """A small IPA space has no blocks of level 1: such a huge page is many blocks, one of them split."""
    huge = _huge(stage, "large-block")
    region = MemoryRegion(1, DATA, huge, Backing.HUGETLB, page_size=huge)
    logged = replace(region, flags=SlotFlags.LOG_DIRTY_PAGES)
    vm = _huge_vm(stage, region, VmConfig(ipa_bits=33))
    vcpu = stage.vcpu(vm, Marker(0), Write(DATA + 3 * stage.block + 5 * stage.page, 7), Marker(1))
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, huge)
    vm.set_user_memory_region(logged)
    stage.proceed(vcpu)
    vm.set_user_memory_region(region)
    stage.pre_fault(vcpu, DATA, huge)
    leaves = stage.leaves(vm)
    stage.holds(sum(leaf.size for leaf in leaves) == huge, f"not all is mapped: {leaves}")
