# SPDX-License-Identifier: Apache-2.0
"""What kinds of memory come out as: copy on write, dirty logging, read-only slots, blocks."""

from __future__ import annotations

from prefault.errors import CapabilityMissing, Mismatch
from prefault.guest.port import Reported
from prefault.guest.program import Marker, Read, Report, Walk, Write
from prefault.machine import (
    GUEST_MEMORY,
    Access,
    Advice,
    Backing,
    Leaf,
    MemoryRegion,
    MmioExit,
    Resident,
    SlotFlags,
    Vm,
    VmConfig,
)
from prefault.scenarios.scenario import DATA, RING, Stage, scenario, scenarios

PAGES = 16


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
    stage.holds(
        not any(leaf.writable for leaf in stage.shown_leaves(vm)), "memory never written came out writable"
    )
    untouched = int.from_bytes(vm.read_memory(DATA + stage.page, 8), "little")
    with vm.count_faults() as counts:
        values = stage.finish(vcpu)
    stage.holds(values == [0x55, untouched], f"the guest read {values}")
    # Breaking CoW invalidates the leaf, so that a second fault may follow.
    stage.holds((counts.permission, counts.read) == (1, 0), f"a write after pre-faulting gave {counts}")
    stage.shown_leaves(vm)


@scenarios("M6", cases=[(Backing.SHARED,), (Backing.FILE_SHARED,), (Backing.GUEST_MEMFD,)])
def shared_memory_comes_out_writable(stage: Stage, backing: Backing) -> None:
    vm = stage.vm(stage.data(PAGES, backing, resident=Resident.NOTHING))
    stage.pre_fault(stage.vcpu(vm, Marker(0)), DATA, PAGES * stage.page)
    stage.holds(all(leaf.writable for leaf in stage.shown_leaves(vm)), "shared memory came out read-only")


@scenarios("M1", "M6", cases=[(Backing.SHARED,), (Backing.FILE_SHARED,)])
def shared_memory_that_is_there_but_not_mapped_comes_out_writable_with_what_it_holds(
    stage: Stage, backing: Backing
) -> None:
    """As a memfd that another process has filled and handed on, holes among its pages."""
    pages = 8 * PAGES
    vm = stage.vm(stage.data(pages, backing, resident=Resident.WRITE))
    for index in range(pages):
        vm.write_memory(DATA + index * stage.page, (0x100 + index).to_bytes(8, "little"))
    holes = [index for index in range(pages) if index % PAGES in (0, 3, 4) or index // PAGES in (2, 3)]
    for index in holes:
        vm.advise(DATA + index * stage.page, stage.page, Advice.REMOVE)
    vm.advise(DATA, pages * stage.page, Advice.DONTNEED)
    looks = (PAGES - 1, PAGES, PAGES + 1, 2 * PAGES + 5, pages - 1)
    reads = [step for index in looks for step in (Read(DATA + index * stage.page), Report())]
    writes = [Write(DATA + index * stage.page, 7) for index in looks]
    vcpu = stage.vcpu(vm, Marker(0), *reads, *writes, Marker(1))
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, pages * stage.page)
    stage.holds(all(leaf.writable for leaf in stage.shown_leaves(vm)), "shared memory came out read-only")
    with vm.count_faults() as counts:
        values = stage.finish(vcpu)
    wanted = [0 if index in holes else 0x100 + index for index in looks]
    stage.holds(values == wanted, f"the guest read {values}, not {wanted}")
    stage.holds(counts.total == 0, f"{counts.total} stage-2 faults on memory that was pre-faulted")


@scenario("M1")
def guest_memfd_does_not_need_a_mapping_of_the_host(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES, Backing.GUEST_MEMFD))
    vcpu = stage.vcpu(vm, Marker(0), Read(DATA + 3 * stage.page), Report())
    stage.proceed(vcpu)
    vm.write_memory(DATA + 3 * stage.page, (0x55).to_bytes(8, "little"))
    vm.unmap(DATA, PAGES * stage.page)
    progress = stage.pre_fault_once(vcpu, DATA, PAGES * stage.page)
    stage.holds(progress.errno == 0, f"guest_memfd that the host has not mapped gave {progress}")
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.shown_leaves(vm)
    stage.holds(stage.finish(vcpu) == [0x55], "the guest did not read what guest_memfd has")


@scenario("M1")
def guest_memfd_that_was_allocated_and_not_used_is_zero(stage: Stage) -> None:
    """fallocate(2) leaves in a page what was there: it is zeroed when it is first asked for."""
    size = 4 * PAGES * stage.page
    vm = stage.vm(stage.data(4 * PAGES, Backing.GUEST_MEMFD))
    vcpu = stage.vcpu(vm, Marker(0), Walk(DATA, size, stage.page), Report())
    stage.proceed(vcpu)
    # Pages that are given back are handed out again first.
    vm.write_memory(DATA, size // 8 * (0x5EC2E7).to_bytes(8, "little"))
    vm.advise(DATA, size, Advice.REMOVE)
    vm.advise(DATA, size, Advice.ALLOCATE)
    stage.pre_fault(vcpu, DATA, size)
    stage.shown_leaves(vm)
    stage.holds(stage.finish(vcpu) == [0], "the guest read what was in the pages before")


@scenario("M1")
def guest_memfd_is_mapped_whatever_the_host_has_in_its_place(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES, Backing.GUEST_MEMFD))
    vcpu = stage.vcpu(vm, Marker(0), Read(DATA), Report())
    stage.proceed(vcpu)
    vm.write_memory(DATA, (0x55).to_bytes(8, "little"))
    vm.map_anew(DATA, PAGES * stage.page)
    vm.write_memory(DATA, (0x77).to_bytes(8, "little"))
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.shown_leaves(vm)
    stage.holds(stage.finish(vcpu) == [0x55], "the guest did not read what guest_memfd has")


@scenarios("M12", cases=[(Backing.PRIVATE,), (Backing.SHARED,), (Backing.FILE_PRIVATE,)])
def what_the_host_maps_in_place_of_memory_is_what_the_guest_has(stage: Stage, backing: Backing) -> None:
    vm = stage.vm(stage.data(PAGES, backing))
    vcpu = stage.vcpu(vm, Marker(0), Read(DATA), Report())
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    vm.map_anew(DATA, PAGES * stage.page)
    stage.holds(stage.shown_leaves(vm) == [], "memory that the host has given up is still the guest's")
    vm.write_memory(DATA, (0x77).to_bytes(8, "little"))
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.shown_leaves(vm)
    stage.holds(stage.finish(vcpu) == [0x77], "the guest did not read what the host has there now")


_FILES = ((Backing.SHARED,), (Backing.FILE_SHARED,))


@scenarios("M1", "M6", cases=_FILES)
def the_host_keeps_what_the_guest_wrote_to_prefaulted_memory(stage: Stage, backing: Backing) -> None:
    _host_keeps(stage, backing, VmConfig())


@scenarios("M1", "M6", "M14", cases=_FILES)
def guests_with_tags_keep_what_they_wrote_to_prefaulted_memory(stage: Stage, backing: Backing) -> None:
    """Their memory is pre-faulted page by page."""
    _host_keeps(stage, backing, VmConfig(mte=True))


def _host_keeps(stage: Stage, backing: Backing, config: VmConfig) -> None:
    vm = stage.vm(stage.data(PAGES, backing, resident=Resident.READ), config=config)
    size = PAGES * stage.page
    writes, reads = Walk(DATA, size, stage.page, 1000), Walk(DATA, size, stage.page)
    vcpu = stage.vcpu(vm, Marker(0), writes, Marker(1), reads, Report())
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, size)
    stage.proceed(vcpu)
    # The host's own PTEs tell nothing of the guest's writes. That the page is dirty must be known by now.
    vm.advise(DATA, size, Advice.DONTNEED)
    vm.drop_caches()
    total = sum(range(DATA, DATA + size, stage.page))
    stage.holds(stage.finish(vcpu) == [total], "what the guest wrote is lost")


@scenarios("M6", cases=[(Backing.SHARED,), (Backing.FILE_SHARED,)])
def shared_memory_that_the_host_may_only_read_is_allocated_for_reading(
    stage: Stage, backing: Backing
) -> None:
    """Others than the VMM may write it, and so it has pages to allocate."""
    size = PAGES * stage.page
    vm = stage.vm(stage.data(PAGES, backing, resident=Resident.NOTHING))
    vcpu = stage.vcpu(vm, Marker(0), Walk(DATA, size, stage.page), Report())
    vm.protect(DATA, size, Access.READ)
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, size)
    stage.holds(not any(leaf.writable for leaf in stage.shown_leaves(vm)), "PROT_READ came out writable")
    with vm.count_faults() as counts:
        stage.holds(stage.finish(vcpu) == [0], "memory that nobody has written is not zero")
    stage.holds(counts.total == 0, f"{counts.total} stage-2 faults on memory that is mapped")


@scenario("M6")
def memory_that_the_host_may_only_read_comes_out_read_only(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    vm.protect(DATA, PAGES * stage.page, Access.READ)
    stage.pre_fault(stage.vcpu(vm, Marker(0)), DATA, PAGES * stage.page)
    stage.holds(not any(leaf.writable for leaf in stage.shown_leaves(vm)), "PROT_READ came out writable")


LOGGED = tuple(backing for backing in GUEST_MEMORY if backing is not Backing.GUEST_MEMFD)


@scenarios("M7", "M9", cases=[(backing,) for backing in LOGGED])
def prefaulting_makes_nothing_dirty(stage: Stage, backing: Backing) -> None:
    pages = _pages(stage, backing)
    vm = stage.vm(stage.data(pages, backing, flags=SlotFlags.LOG_DIRTY_PAGES))
    vcpu = stage.vcpu(vm, Marker(0), Write(DATA + 3 * stage.page, 1), Write(DATA + 5 * stage.page, 1))
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, pages * stage.page)
    leaves = stage.shown_leaves(vm)
    stage.holds(not any(leaf.writable for leaf in leaves), "a logged slot has a writable leaf")
    stage.holds(all(leaf.level == 3 for leaf in leaves), "a logged slot has a block")
    stage.holds(vm.get_dirty_log(1) == [], "pre-faulting made pages dirty")
    stage.finish(vcpu)
    stage.holds(vm.get_dirty_log(1) == [3, 5], "the guest's writes are not in the log")
    stage.shown_leaves(vm)


_IN_PAGES = tuple(backing for backing in LOGGED if backing not in (Backing.THP, Backing.HUGETLB))
"""Without a bitmap arm64 maps blocks also in logged slots, and has but their first page in the ring."""


@scenarios("M7", cases=[(backing,) for backing in _IN_PAGES])
def prefaulting_puts_nothing_into_a_dirty_ring(stage: Stage, backing: Backing) -> None:
    region = stage.data(PAGES, backing, flags=SlotFlags.LOG_DIRTY_PAGES)
    vm = stage.vm(region, config=VmConfig(dirty_ring=RING))
    rounds = ([3, 5], [5, 11])
    steps = [(*(Write(DATA + page * stage.page, 1) for page in pages), Marker(1)) for pages in rounds]
    vcpu = stage.vcpu(vm, Marker(0), *steps[0], *steps[1])
    stage.proceed(vcpu)
    for pages in rounds:
        stage.pre_fault(vcpu, DATA, PAGES * stage.page)
        leaves = stage.shown_leaves(vm)
        stage.holds(not any(leaf.writable for leaf in leaves), "a logged slot has a writable leaf")
        stage.holds(vm.harvest_dirty_rings() == [], "pre-faulting made pages dirty")
        stage.proceed(vcpu)
        found = vm.harvest_dirty_rings()
        stage.holds(found == [(1, page) for page in pages], f"the guest wrote {pages}, the ring has {found}")
        for advice in (Advice.DONTNEED, Advice.POPULATE_WRITE):  # half of it is to be mapped again
            vm.advise(DATA, PAGES // 2 * stage.page, advice)


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
    stage.holds(
        not any(leaf.writable for leaf in stage.shown_leaves(vm)), "a read-only slot has a writable leaf"
    )
    before = vm.read_memory(DATA, 8)
    stage.proceed(vcpu)
    exit_ = stage.proceed(vcpu)
    stage.holds(exit_ == MmioExit(DATA, 8, True, 0x77), f"a write to a read-only slot gave {exit_}")
    stage.holds(vm.read_memory(DATA, 8) == before, "the write went through")


@scenario("M8")
def read_only_slots_of_a_device_are_mapped_read_only(stage: Stage) -> None:
    stage.not_under_pkvm("no guest has memory of devices")
    vm = stage.vm(stage.data(PAGES, Backing.DEVICE, resident=Resident.NOTHING, flags=SlotFlags.READONLY))
    stage.pre_fault(stage.vcpu(vm, Marker(0)), DATA, PAGES * stage.page)
    stage.holds(
        not any(leaf.writable for leaf in stage.shown_leaves(vm)), "a read-only slot has a writable leaf"
    )


def _same_leaves(stage: Stage, region: MemoryRegion, config: VmConfig = VmConfig()) -> list[Leaf]:  # noqa: B008 - frozen
    """Map a slot by demand faults in one VM and by pre-faulting in another; the leaves, if equal."""
    demand = stage.vm(region, config=config)
    stage.finish(stage.vcpu(demand, Walk(region.gpa, region.size, stage.page), Report()))
    ahead = stage.vm(region, config=config)
    stage.pre_fault(stage.vcpu(ahead, Marker(0)), region.gpa, region.size)
    wanted, found = stage.leaves(demand), stage.leaves(ahead)
    stage.holds(wanted == found, f"demand faults give {wanted}, pre-faulting {found}")
    return found


@scenarios("M1", "M9", cases=[(backing, resident) for backing in GUEST_MEMORY for resident in Resident])
def prefaulting_maps_what_demand_faults_map(stage: Stage, backing: Backing, resident: Resident) -> None:
    _same_leaves(stage, stage.data(_pages(stage, backing), backing, resident=resident))


TAGGED = tuple(backing for backing in GUEST_MEMORY if backing is not Backing.GUEST_MEMFD)


@scenarios("M1", "M14", cases=[(backing, resident) for backing in TAGGED for resident in Resident])
def guests_with_tags_get_what_demand_faults_map(stage: Stage, backing: Backing, resident: Resident) -> None:
    _same_leaves(stage, stage.data(_pages(stage, backing), backing, resident=resident), VmConfig(mte=True))


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
    stage.shown_leaves(vm)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.holds(stage.finish(vcpu) == [0], "the guest saw a page that the host has dropped")


@scenarios("M12", "M10", cases=[(Backing.SHARED,), (Backing.FILE_SHARED,), (Backing.GUEST_MEMFD,)])
def a_hole_punched_into_memory_is_filled_again(stage: Stage, backing: Backing) -> None:
    vm = stage.vm(stage.data(PAGES, backing))
    hole = DATA + 3 * stage.page
    vm.write_memory(hole, b"\x99" * 8)
    vcpu = stage.vcpu(vm, Marker(0), Read(hole), Report())
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    vm.advise(hole, 2 * stage.page, Advice.REMOVE)
    if stage.sees_leaves:
        left = sum(leaf.size for leaf in stage.leaves(vm))
        stage.holds(left == (PAGES - 2) * stage.page, "pages that are gone have leaves, or others have none")
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.shown_leaves(vm)
    with vm.count_faults() as counts:
        values = stage.finish(vcpu)
    stage.holds(values == [0], f"the guest read {values} from a page that is gone")
    stage.holds(counts.total == 0, f"{counts.total} stage-2 faults on memory that is mapped")


@scenario("M12")
def a_new_slot_shows_its_own_memory(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    vm.write_memory(DATA, (0x99).to_bytes(8, "little"))
    vcpu = stage.vcpu(vm, Marker(0), Read(DATA), Report())
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    _delete(vm)
    stage.holds(stage.shown_leaves(vm) == [], "a deleted slot left leaves")
    vm.set_user_memory_region(stage.data(PAGES, Backing.SHARED))
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.proceed(vcpu)
    stage.holds(stage.finish(vcpu) == [0], "the guest saw the memory of a deleted slot")


def _delete(vm: Vm) -> None:
    vm.set_user_memory_region(MemoryRegion(1, DATA, 0))


# What the host does of its own accord.


@scenarios("M6", "M12", cases=[(Backing.PRIVATE,), (Backing.THP,), (Backing.FILE_PRIVATE,)])
def memory_shared_with_a_child_is_mapped_read_only(stage: Stage, backing: Backing) -> None:
    pages = _pages(stage, backing)
    vm = stage.vm(stage.data(pages, backing))
    vm.write_memory(DATA, (0x11).to_bytes(8, "little"))
    vcpu = stage.vcpu(vm, Marker(0), Write(DATA, 0x22), Read(DATA), Report(), Marker(1), Write(DATA, 0x33))
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, pages * stage.page)
    with vm.fork() as child:
        stage.holds(stage.shown_leaves(vm) == [], "fork left leaves that can be written")
        stage.pre_fault(vcpu, DATA, pages * stage.page)
        stage.holds(not any(leaf.writable for leaf in stage.shown_leaves(vm)), "what a child has is writable")
        stage.proceed(vcpu)
        stage.proceed(vcpu)
        kept = child.read_memory(DATA, 8)
        stage.holds(
            kept == (0x11).to_bytes(8, "little"), f"the guest's write reached the child: {kept.hex()}"
        )
        stage.shown_leaves(vm)
    stage.pre_fault(vcpu, DATA, pages * stage.page)
    stage.shown_leaves(vm)
    stage.finish(vcpu)
    stage.shown_leaves(vm)


@scenario("M1", "M6")
def pages_shared_with_a_child_are_read_only_among_those_that_are_not(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    pages = [DATA + number * stage.page for number in range(PAGES)]
    vcpu = stage.vcpu(vm, Marker(0), *(Write(gpa, 0x99) for gpa in pages), Report())
    stage.proceed(vcpu)
    for gpa in pages:
        vm.write_memory(gpa, (0x11).to_bytes(8, "little"))
    with vm.fork() as child:
        for gpa in pages[::2]:
            vm.write_memory(gpa, (0x22).to_bytes(8, "little"))
        stage.pre_fault(vcpu, DATA, PAGES * stage.page)
        writable = [leaf.ipa for leaf in stage.leaves(vm) if leaf.writable and leaf.ipa >= DATA]
        stage.holds(not set(writable) & set(pages[1::2]), f"shared pages came out writable: {writable}")
        stage.finish(vcpu)
        kept = [int.from_bytes(child.read_memory(gpa, 8), "little") for gpa in pages]
    stage.holds(kept == PAGES * [0x11], f"the child has {kept}")


@scenarios("M6", cases=[(Backing.SHARED,), (Backing.FILE_SHARED,), (Backing.GUEST_MEMFD,)])
def a_fork_leaves_shared_memory_alone(stage: Stage, backing: Backing) -> None:
    vm = stage.vm(stage.data(PAGES, backing))
    stage.pre_fault(stage.vcpu(vm, Marker(0)), DATA, PAGES * stage.page)
    before = stage.leaves(vm)
    with vm.fork():
        stage.holds(stage.leaves(vm) == before, "a fork took leaves of shared memory")


@scenario("M6", "M12")
def pages_merged_by_ksm_are_mapped_read_only(stage: Stage) -> None:
    size = PAGES * stage.page
    vm = stage.vm(stage.data(PAGES))
    vm.write_memory(DATA, b"\x5a" * size)
    other = DATA + stage.page
    vcpu = stage.vcpu(vm, Marker(0), Write(DATA, 0x22), Read(DATA), Report(), Read(other), Report())
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, size)
    vm.merge(DATA, size)
    stage.holds(stage.shown_leaves(vm) == [], "merging left leaves that can be written")
    stage.pre_fault(vcpu, DATA, size)
    stage.holds(not any(leaf.writable for leaf in stage.shown_leaves(vm)), "a merged page is writable")
    with vm.count_faults() as counts:
        values = stage.finish(vcpu)
    same = int.from_bytes(b"\x5a" * 8, "little")
    stage.holds(values == [0x22, same], f"the guest read {values}: its write reached another page")
    stage.holds(counts.permission == 1, f"a write to a merged page gave {counts}")
    stage.shown_leaves(vm)


_MOVABLE = (Backing.PRIVATE, Backing.SHARED, Backing.FILE_PRIVATE, Backing.FILE_SHARED)


@scenarios("M12", cases=[(backing,) for backing in _MOVABLE])
def migrated_pages_are_mapped_where_they_are_now(stage: Stage, backing: Backing) -> None:
    # Page by page, the kernel marks each page as used, and holds a reference until it has done so for a few.
    stage.not_under_pkvm("a page that was just mapped cannot be migrated at once")
    vm = stage.vm(stage.data(PAGES, backing))
    moved = DATA + 3 * stage.page
    vm.write_memory(moved, (0x99).to_bytes(8, "little"))
    vcpu = stage.vcpu(vm, Marker(0), Read(moved), Report(), Write(moved, 0x55), Marker(1))
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    vm.advise(moved, 2 * stage.page, Advice.SOFT_OFFLINE)
    if stage.sees_leaves:
        left = sum(leaf.size for leaf in stage.leaves(vm))
        stage.holds(
            left == (PAGES - 2) * stage.page, "pages that are elsewhere have leaves, or others have none"
        )
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.shown_leaves(vm)
    with vm.count_faults() as counts:
        stage.holds(stage.proceed(vcpu) == Reported(0x99), "the guest does not see what was in the page")
        stage.proceed(vcpu)
    stage.see("faults", counts.total)
    stage.holds(vm.read_memory(moved, 1) == b"\x55", "the guest wrote to where the page was")


@scenarios("M12", cases=[(Backing.SHARED,), (Backing.FILE_SHARED,)])
def pages_that_prefaulting_brought_in_are_held_by_nobody(stage: Stage, backing: Backing) -> None:
    stage.not_under_pkvm("a page that was just mapped cannot be migrated at once")
    vm = stage.vm(stage.data(PAGES, backing, resident=Resident.NOTHING))
    stage.pre_fault(stage.vcpu(vm, Marker(0)), DATA, PAGES * stage.page)
    try:
        vm.advise(DATA, 2 * stage.page, Advice.SOFT_OFFLINE)
    except CapabilityMissing as error:
        raise Mismatch(f"somebody holds a reference to a page: {error}") from error
    left = sum(leaf.size for leaf in stage.leaves(vm))
    stage.holds(left == (PAGES - 2) * stage.page, "pages that are elsewhere have leaves, or others have none")


@scenarios("M1", "M12", cases=[(False,), (True,)])
def memory_of_guest_memfd_is_given_back(stage: Stage, among_mapped: bool) -> None:
    """Pages that somebody still holds stay with the kernel; whoever plays scenarios looks for such.

    A page that is mapped already ends a batch, whose other pages were looked up, too.
    """
    pages = 512  # more than what the kernel keeps in its batches per CPU
    resident = Resident.WRITE if among_mapped else Resident.NOTHING
    for _ in range(2):
        vm = stage.vm(stage.data(pages, Backing.GUEST_MEMFD, resident=resident))
        vcpu = stage.vcpu(vm, Marker(0))
        for index in range(4, pages, 8) if among_mapped else ():
            stage.pre_fault(vcpu, DATA + index * stage.page, stage.page)
        stage.pre_fault(vcpu, DATA, pages * stage.page)
        stage.holds(sum(leaf.size for leaf in stage.leaves(vm)) == pages * stage.page, "not all is mapped")


_TRACKED = (Backing.PRIVATE, Backing.SHARED, Backing.FILE_PRIVATE, Backing.FILE_SHARED, Backing.THP)


@scenarios("M5", "M15", cases=[(backing,) for backing in _TRACKED])
def old_leaves_become_young_again(stage: Stage, backing: Backing) -> None:
    pages = _pages(stage, backing)
    vm = stage.vm(stage.data(pages, backing))
    vcpu = stage.vcpu(vm, Marker(0), Walk(DATA, pages * stage.page, stage.page), Report())
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, pages * stage.page)
    young = stage.leaves(vm)
    vm.age(DATA, pages // 2 * stage.page)
    old = [leaf for leaf in stage.leaves(vm) if not leaf.accessed]
    stage.holds(sum(leaf.size for leaf in old) == pages // 2 * stage.page, f"half should be old: {old}")
    progress = stage.pre_fault_once(vcpu, DATA, pages * stage.page)
    stage.holds((progress.errno, progress.size) == (0, 0), f"memory that is mapped gave {progress}")
    stage.holds(stage.leaves(vm) == young, "pre-faulting did more than to make leaves young")
    stage.holds(stage.faults(vm, vcpu).total == 0, "the guest faulted on memory that is mapped")


@scenario("M5", "M2")
def old_young_and_missing_pages_in_one_range(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    vcpu = stage.vcpu(vm, Marker(0), Walk(DATA, PAGES * stage.page, stage.page), Report())
    stage.proceed(vcpu)
    quarter = PAGES // 4 * stage.page
    stage.pre_fault(vcpu, DATA, 2 * quarter)
    stage.pre_fault(vcpu, DATA + 3 * quarter, quarter)
    vm.age(DATA + quarter, quarter)
    vm.age(DATA + 3 * quarter + stage.page, stage.page)
    stage.shown_leaves(vm)
    progress = stage.pre_fault_once(vcpu, DATA, PAGES * stage.page)
    stage.holds((progress.errno, progress.size) == (0, 0), f"a range of all kinds gave {progress}")
    leaves = stage.leaves(vm)
    stage.holds([leaf.size for leaf in leaves] == [PAGES * stage.page], f"all should be alike: {leaves}")
    stage.holds(leaves[0].accessed, "a pre-faulted leaf is not young")
    stage.holds(stage.faults(vm, vcpu).total == 0, "the guest faulted on memory that is mapped")
