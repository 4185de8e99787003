# SPDX-License-Identifier: Apache-2.0
"""What kinds of memory come out as: copy on write, dirty logging, read-only slots, blocks."""

from __future__ import annotations

from prefault.guest.program import Marker, Read, Report, Walk, Write
from prefault.machine import Access, Advice, Backing, Leaf, MemoryRegion, MmioExit, Resident, SlotFlags, Vm
from prefault.scenarios.scenario import DATA, Stage, scenario, scenarios

PAGES = 16
EVERY = tuple(Backing)


def _pages(stage: Stage, backing: Backing) -> int:
    """A slot of some pages, or of two blocks if the backing has no smaller ones."""
    huge = backing in (Backing.THP, Backing.HUGETLB)
    return 2 * stage.block // stage.page if huge else PAGES


@scenarios(
    "M6",
    cases=[
        (Backing.PRIVATE, Resident.NOTHING),
        (Backing.PRIVATE, Resident.READ),
        (Backing.FILE_PRIVATE, Resident.NOTHING),
        (Backing.FILE_PRIVATE, Resident.READ),
    ],
)
def copy_on_write_is_not_broken(stage: Stage, backing: Backing, resident: Resident) -> None:
    vm = stage.vm(stage.data(PAGES, backing, resident=resident))
    vcpu = stage.vcpu(
        vm, Marker(0), Write(DATA, 0x55), Read(DATA), Report(), Read(DATA + stage.page), Report()
    )
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.holds(not any(leaf.writable for leaf in stage.leaves(vm)), "memory never written came out writable")
    untouched = int.from_bytes(vm.read_memory(DATA + stage.page, 8), "little")
    with vm.count_faults() as counts:
        values = stage.finish(vcpu)
    stage.holds(values == [0x55, untouched], f"the guest read {values}")
    # Breaking CoW invalidates the leaf, so that a second fault may follow.
    stage.holds((counts.permission, counts.read) == (1, 0), f"a write after pre-faulting gave {counts}")
    stage.leaves(vm)


@scenarios("M6", cases=[(Backing.SHARED,), (Backing.FILE_SHARED,), (Backing.GUEST_MEMFD,)])
def shared_memory_comes_out_writable(stage: Stage, backing: Backing) -> None:
    vm = stage.vm(stage.data(PAGES, backing, resident=Resident.NOTHING))
    stage.pre_fault(stage.vcpu(vm, Marker(0)), DATA, PAGES * stage.page)
    stage.holds(all(leaf.writable for leaf in stage.leaves(vm)), "shared memory came out read-only")


@scenario("M6")
def memory_that_the_host_may_only_read_comes_out_read_only(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    vm.protect(DATA, PAGES * stage.page, Access.READ)
    stage.pre_fault(stage.vcpu(vm, Marker(0)), DATA, PAGES * stage.page)
    stage.holds(not any(leaf.writable for leaf in stage.leaves(vm)), "PROT_READ came out writable")


LOGGED = tuple(backing for backing in EVERY if backing is not Backing.GUEST_MEMFD)


@scenarios("M7", "M9", cases=[(backing,) for backing in LOGGED])
def prefaulting_makes_nothing_dirty(stage: Stage, backing: Backing) -> None:
    pages = _pages(stage, backing)
    vm = stage.vm(stage.data(pages, backing, flags=SlotFlags.LOG_DIRTY_PAGES))
    vcpu = stage.vcpu(vm, Marker(0), Write(DATA + 3 * stage.page, 1), Write(DATA + 5 * stage.page, 1))
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, pages * stage.page)
    leaves = stage.leaves(vm)
    stage.holds(not any(leaf.writable for leaf in leaves), "a logged slot has a writable leaf")
    stage.holds(all(leaf.level == 3 for leaf in leaves), "a logged slot has a block")
    stage.holds(vm.get_dirty_log(1) == [], "pre-faulting made pages dirty")
    stage.finish(vcpu)
    stage.holds(vm.get_dirty_log(1) == [3, 5], "the guest's writes are not in the log")
    stage.leaves(vm)


@scenarios("M7", cases=[(Backing.PRIVATE,), (Backing.THP,), (Backing.SHARED,)])
def logging_switched_on_later_sees_every_write(stage: Stage, backing: Backing) -> None:
    pages = _pages(stage, backing)
    region = stage.data(pages, backing)
    vm = stage.vm(region)
    vcpu = stage.vcpu(vm, Marker(0), Walk(DATA, PAGES * stage.page, stage.page, 1000), Report())
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, pages * stage.page)
    vm.set_user_memory_region(stage.data(pages, backing, flags=SlotFlags.LOG_DIRTY_PAGES))
    stage.pre_fault(vcpu, DATA, pages * stage.page)
    stage.holds(vm.get_dirty_log(1) == [], "pre-faulting made pages dirty")
    stage.finish(vcpu)
    stage.holds(vm.get_dirty_log(1) == list(range(PAGES)), "a write is missing in the log")


@scenario("M7", "M9")
def blocks_come_back_after_logging(stage: Stage) -> None:
    pages = _pages(stage, Backing.THP)
    logged = stage.data(pages, Backing.THP, flags=SlotFlags.LOG_DIRTY_PAGES)
    vm = stage.vm(logged)
    vcpu = stage.vcpu(vm, Marker(0))
    stage.pre_fault(vcpu, DATA, stage.page)
    vm.set_user_memory_region(stage.data(pages, Backing.THP))
    stage.pre_fault(vcpu, DATA + stage.page, stage.page)
    stage.holds(stage.leaves(vm)[0].block, "no block where a demand fault makes one")


@scenarios("M8", cases=[(backing,) for backing in LOGGED])
def read_only_slots_are_mapped_read_only(stage: Stage, backing: Backing) -> None:
    pages = _pages(stage, backing)
    vm = stage.vm(stage.data(pages, backing, flags=SlotFlags.READONLY))
    vcpu = stage.vcpu(vm, Marker(0), Read(DATA), Report(), Write(DATA, 0x77), Marker(1))
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, pages * stage.page)
    stage.holds(not any(leaf.writable for leaf in stage.leaves(vm)), "a read-only slot has a writable leaf")
    before = vm.read_memory(DATA, 8)
    stage.proceed(vcpu)
    exit_ = stage.proceed(vcpu)
    stage.holds(exit_ == MmioExit(DATA, 8, True, 0x77), f"a write to a read-only slot gave {exit_}")
    stage.holds(vm.read_memory(DATA, 8) == before, "the write went through")


def _same_leaves(stage: Stage, region: MemoryRegion) -> list[Leaf]:
    """Map a slot by demand faults in one VM and by pre-faulting in another; the leaves, if equal."""
    demand = stage.vm(region)
    stage.finish(stage.vcpu(demand, Walk(region.gpa, region.size, stage.page), Report()))
    ahead = stage.vm(region)
    stage.pre_fault(stage.vcpu(ahead, Marker(0)), region.gpa, region.size)
    wanted, found = stage.leaves(demand), stage.leaves(ahead)
    stage.holds(wanted == found, f"demand faults give {wanted}, pre-faulting {found}")
    return found


@scenarios("M1", "M9", cases=[(backing, resident) for backing in EVERY for resident in Resident])
def prefaulting_maps_what_demand_faults_map(stage: Stage, backing: Backing, resident: Resident) -> None:
    _same_leaves(stage, stage.data(_pages(stage, backing), backing, resident=resident))


@scenario("M9")
def misaligned_slots_have_no_blocks(stage: Stage) -> None:
    region = stage.data(2 * stage.block // stage.page, Backing.THP, hva_offset=stage.page)
    leaves = _same_leaves(stage, region)
    stage.holds(all(leaf.level == 3 for leaf in leaves), "a misaligned slot has a block")


@scenario("M9")
def slots_that_cut_blocks_have_pages_at_their_ends(stage: Stage) -> None:
    start, size = DATA + stage.block - 2 * stage.page, stage.block + 5 * stage.page
    _same_leaves(stage, MemoryRegion(1, start, size, Backing.THP, Resident.WRITE))


@scenario("M9")
def a_page_inside_a_table_of_pages_is_a_page(stage: Stage) -> None:
    vm = stage.vm(stage.data(stage.block // stage.page))
    stage.pre_fault(stage.vcpu(vm, Marker(0)), DATA + 7 * stage.page, stage.page)
    leaves = stage.leaves(vm)
    stage.holds(
        [(leaf.ipa, leaf.size) for leaf in leaves] == [(DATA + 7 * stage.page, stage.page)], str(leaves)
    )


@scenario("M9")
def pages_collapsed_by_the_host_become_a_block(stage: Stage) -> None:
    vm = stage.vm(stage.data(stage.block // stage.page, Backing.PRIVATE))
    vcpu = stage.vcpu(vm, Marker(0))
    stage.pre_fault(vcpu, DATA, stage.block)
    vm.advise(DATA, stage.block, Advice.HUGEPAGE)
    vm.advise(DATA, stage.block, Advice.COLLAPSE)
    stage.holds(stage.leaves(vm) == [], "collapsing left stale leaves")
    stage.pre_fault(vcpu, DATA, stage.page)
    stage.holds(stage.leaves(vm)[0].block, "no block over a collapsed range")


@scenario("M12")
def no_stale_leaf_after_the_host_took_the_page(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    vm.write_memory(DATA, (0x99).to_bytes(8, "little"))
    vcpu = stage.vcpu(vm, Marker(0), Read(DATA), Report())
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    vm.advise(DATA, stage.page, Advice.DONTNEED)
    stage.leaves(vm)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.holds(stage.finish(vcpu) == [0], "the guest saw a page that the host has dropped")


@scenario("M12")
def a_new_slot_shows_its_own_memory(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    vm.write_memory(DATA, (0x99).to_bytes(8, "little"))
    vcpu = stage.vcpu(vm, Marker(0), Read(DATA), Report())
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    _delete(vm)
    stage.holds(stage.leaves(vm) == [], "a deleted slot left leaves")
    vm.set_user_memory_region(stage.data(PAGES, Backing.SHARED))
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.proceed(vcpu)
    stage.holds(stage.finish(vcpu) == [0], "the guest saw the memory of a deleted slot")


def _delete(vm: Vm) -> None:
    vm.set_user_memory_region(MemoryRegion(1, DATA, 0))
