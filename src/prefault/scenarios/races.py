# SPDX-License-Identifier: Apache-2.0
"""Pre-faulting while others change what it maps. Who comes first is open; what holds in the end is not."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

from prefault.errors import CapabilityMissing
from prefault.guest.port import Reported
from prefault.guest.program import Marker, Report, Walk, Write
from prefault.machine import (
    Access,
    Advice,
    Backing,
    MemoryRegion,
    Resident,
    SlotFlags,
    Vcpu,
    Vm,
    VmConfig,
)
from prefault.scenarios.scenario import DATA, Stage, scenario, scenarios

PAGES = 64
ROUNDS = 25
"""How often the other side does what it does. Longer races are for `prefault soak`."""
ELSEWHERE = 2 * DATA


def all_of(vcpu: Vcpu, gpa: int, size: int) -> int:
    """Pre-fault a range up to its end or to an error; that error, or 0."""
    while size:
        progress = vcpu.pre_fault_memory_once(gpa, size)
        if progress.errno and progress.errno != errno.EINTR:
            return progress.errno
        gpa, size = progress.gpa, progress.size
    return 0


def meanwhile(change: Callable[[], object], prefault: Callable[[], int]) -> set[int]:
    """Pre-fault as long as another thread does its rounds of ``change``; the errors that came."""

    def rounds() -> None:
        for _ in range(ROUNDS):
            change()

    found = set()
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(rounds)
        while not others.done():
            found.add(prefault())
        others.result()
    return found


def hold(stage: Stage, found: set[int], allowed: set[int]) -> None:
    """Check that no other errors came."""
    names = {errno.errorcode.get(one, one) for one in found - allowed}
    stage.holds(found <= allowed, f"pre-faulting failed with {names} on the way")


def _walk(stage: Stage, write_permille: int = 0) -> Walk:
    return Walk(DATA, PAGES * stage.page, stage.page, write_permille)


def _write_and_drop(stage: Stage, vm: Vm) -> None:
    for index in range(0, PAGES, 4):
        vm.write_memory(DATA + index * stage.page, b"\x99" * 8)
    vm.advise(DATA, PAGES * stage.page, Advice.DONTNEED)


@scenario("M12")
def no_stale_leaf_after_pages_were_dropped_meanwhile(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES, resident=Resident.NOTHING))
    size = PAGES * stage.page
    vcpu = stage.vcpu(vm, Marker(0), _walk(stage), Report())
    stage.proceed(vcpu)
    hold(stage, meanwhile(partial(_write_and_drop, stage, vm), partial(all_of, vcpu, DATA, size)), {0})
    stage.holds(all_of(vcpu, DATA, size) == 0, "pre-faulting fails when all is quiet again")
    stage.shown_leaves(vm)
    values = stage.finish(vcpu)
    stage.holds(values == [0], f"the guest read {values} from pages that the host has dropped")


@scenarios("M12", cases=[(Backing.PRIVATE,), (Backing.SHARED,)])
def pages_can_migrate_meanwhile(stage: Stage, backing: Backing) -> None:
    vm = stage.vm(stage.data(PAGES, backing))
    size, some = PAGES * stage.page, PAGES // 16 * stage.page
    vcpu = stage.vcpu(vm, Marker(0), _walk(stage, 1000), Marker(1))
    stage.proceed(vcpu)

    def migrate() -> None:
        with suppress(CapabilityMissing):  # A page that is in somebody's hands stays where it is.
            vm.advise(DATA, some, Advice.SOFT_OFFLINE)

    hold(stage, meanwhile(migrate, partial(all_of, vcpu, DATA, size)), {0})
    stage.pre_fault(vcpu, DATA, size)
    stage.shown_leaves(vm)
    with vm.count_faults() as counts:
        stage.proceed(vcpu)
    stage.holds(counts.total == 0, f"{counts.total} stage-2 faults on memory that is mapped")
    for gpa in range(DATA, DATA + size, stage.page):
        found = int.from_bytes(vm.read_memory(gpa, 8), "little")
        stage.holds(found == gpa, f"the guest's write to {gpa:#x} is not where the page is")


def _take_and_give_access(vm: Vm, gpa: int, size: int) -> None:
    vm.protect(gpa, size, Access.NONE)
    vm.protect(gpa, size, Access.WRITE)


def _take_and_give_write_access(vm: Vm, gpa: int, size: int) -> None:
    vm.protect(gpa, size, Access.READ)
    vm.protect(gpa, size, Access.WRITE)


_PROTECTIONS: dict[str, tuple[Callable[[Vm, int, int], None], set[int]]] = {
    "none": (_take_and_give_access, {0, errno.EFAULT}),
    "read": (_take_and_give_write_access, {0}),
}


@scenarios("M12", "M10", cases=[(name,) for name in _PROTECTIONS])
def protection_can_change_meanwhile(stage: Stage, name: str) -> None:
    change, allowed = _PROTECTIONS[name]
    vm = stage.vm(stage.data(PAGES))
    vcpu = stage.vcpu(vm, Marker(0), _walk(stage, 1000), _walk(stage), Report())
    stage.proceed(vcpu)
    size = PAGES * stage.page
    hold(stage, meanwhile(partial(change, vm, DATA, size), partial(all_of, vcpu, DATA, size)), allowed)
    stage.holds(all_of(vcpu, DATA, size) == 0, "pre-faulting fails when all is quiet again")
    stage.shown_leaves(vm)
    stage.finish(vcpu)


@scenario("M12", "M6")
def the_vmm_can_fork_meanwhile(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    vm.write_memory(DATA, (0x11).to_bytes(8, "little"))
    vcpu, other = stage.vcpu(vm, Marker(0), Write(DATA, 0x22), Marker(1)), vm.create_vcpu()
    stage.proceed(vcpu)
    size = PAGES * stage.page
    # Forks come from this thread, the only one that the child then has.
    with ThreadPoolExecutor(1) as pool:
        for _ in range(8):
            prefault = pool.submit(all_of, other, DATA, size)
            with vm.fork() as child:
                stage.holds(prefault.result() == 0, "pre-faulting failed")
                stage.holds(child.read_memory(DATA, 8)[0] == 0x11, "the child has lost its memory")
    with vm.fork() as child:
        stage.pre_fault(vcpu, DATA, size)
        stage.proceed(vcpu)
        stage.holds(child.read_memory(DATA, 8)[0] == 0x11, "the guest's write reached the child")
        stage.shown_leaves(vm)


@scenarios("M12", "M7", cases=[(Backing.PRIVATE,), (Backing.THP,), (Backing.SHARED,)])
def logging_can_be_switched_meanwhile(stage: Stage, backing: Backing) -> None:
    pages = stage.block // stage.page if backing is Backing.THP else PAGES
    plain = stage.data(pages, backing)
    logged = replace(plain, flags=SlotFlags.LOG_DIRTY_PAGES)
    vm = stage.vm(plain)
    vcpu = stage.vcpu(vm, Marker(0), Write(DATA, 1), Marker(1), _walk(stage, 1000), Report())
    stage.proceed(vcpu)

    def switch() -> None:
        vm.set_user_memory_region(logged)
        vm.set_user_memory_region(plain)

    hold(stage, meanwhile(switch, partial(all_of, vcpu, DATA, plain.size)), {0})
    vm.set_user_memory_region(logged)
    stage.pre_fault(vcpu, DATA, plain.size)
    # A block that was there before stays one, read-only, until it is written.
    if stage.sees_leaves:
        leaves = [leaf for leaf in vm.stage2() if leaf.ipa >= DATA]
        stage.holds(not any(leaf.writable for leaf in leaves), "a logged slot has a writable leaf")
    stage.holds(vm.get_dirty_log(1) == [], "pre-faulting made pages dirty")
    stage.proceed(vcpu)
    stage.holds(vm.get_dirty_log(1) == [0], "the guest's write is not in the log")
    stage.finish(vcpu)
    stage.holds(vm.get_dirty_log(1) == list(range(PAGES)), "a write is missing in the log")


_GOING = {0, errno.EAGAIN, errno.ENOENT}


@scenarios("M12", "M10", cases=[(Backing.PRIVATE,), (Backing.SHARED,), (Backing.GUEST_MEMFD,)])
def slots_can_come_and_go_meanwhile(stage: Stage, backing: Backing) -> None:
    region = stage.data(PAGES, backing)
    vm = stage.vm(region)
    vcpu = stage.vcpu(vm, Marker(0), _walk(stage), Report())
    stage.proceed(vcpu)
    vm.write_memory(DATA, b"\x99" * 8)

    def renew() -> None:
        vm.set_user_memory_region(replace(region, size=0))
        vm.set_user_memory_region(region)

    hold(stage, meanwhile(renew, partial(all_of, vcpu, DATA, region.size)), _GOING)
    stage.pre_fault(vcpu, DATA, region.size)
    stage.shown_leaves(vm)
    stage.holds(stage.finish(vcpu) == [0], "the guest saw the memory of a slot that is gone")


@scenario("M12", "M10")
def slots_can_move_meanwhile(stage: Stage) -> None:
    here = stage.data(PAGES)
    there = replace(here, gpa=ELSEWHERE)
    vm = stage.vm(here)
    vcpus = [stage.vcpu(vm, Marker(0), _walk(stage), Report()), vm.create_vcpu()]
    stage.proceed(vcpus[0])
    vm.write_memory(DATA, (0x11).to_bytes(8, "little"))

    def move() -> None:
        vm.set_user_memory_region(there)
        vm.set_user_memory_region(here)

    def prefault() -> int:
        return all_of(vcpus[0], DATA, here.size) or all_of(vcpus[1], ELSEWHERE, here.size)

    hold(stage, meanwhile(move, prefault), _GOING)
    stage.holds(stage.shown_leaves(vm, ELSEWHERE) == [], "where the slot was, there still are leaves")
    stage.pre_fault(vcpus[0], DATA, here.size)
    stage.shown_leaves(vm, DATA, here.size)
    stage.holds(stage.finish(vcpus[0]) == [0x11], "the guest does not see the slot that came back")


_RANGES = {"one": ((0, 1), (0, 1)), "overlapping": ((0, 0.75), (0.25, 1)), "disjoint": ((0, 0.5), (0.5, 1))}


@scenarios(
    "M12", "M3", cases=[(name, backing) for name in _RANGES for backing in (Backing.SHARED, Backing.THP)]
)
def vcpus_can_prefault_at_once(stage: Stage, name: str, backing: Backing) -> None:
    pages = 2 * stage.block // stage.page if backing is Backing.THP else 16 * PAGES
    region = stage.data(pages, backing, resident=Resident.NOTHING)
    vm = stage.vm(region)
    tasks = []
    for first, last in _RANGES[name]:
        start, end = (int(part * pages) * stage.page for part in (first, last))
        tasks.append(partial(all_of, vm.create_vcpu(), DATA + start, end - start))
    with ThreadPoolExecutor(len(tasks)) as pool:
        errors = {running.result() for running in [pool.submit(task) for task in tasks]}
    hold(stage, errors, {0})
    if stage.sees_leaves:
        leaves = stage.leaves(vm)
        stage.holds(sum(leaf.size for leaf in leaves) == region.size, "a page was left out")


@contextmanager
def _signals(seconds: float) -> Iterator[None]:
    """Send this process a signal every so often."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@scenarios("M10", "M2", "M12", cases=[(Backing.PRIVATE,), (Backing.SHARED,), (Backing.GUEST_MEMFD,)])
def signals_never_lose_progress(stage: Stage, backing: Backing) -> None:
    region = MemoryRegion(1, DATA, 16 * PAGES * stage.page, backing)
    vm = stage.vm(region)
    vcpu = stage.vcpu(vm, Marker(0), _walk(stage), Report())
    stage.proceed(vcpu)
    gpa, size, found = region.gpa, region.size, set()
    with _signals(0.001):
        while size:
            progress = vcpu.pre_fault_memory_once(gpa, size)
            found.add(progress.errno)
            stuck = (progress.gpa, progress.size) == (gpa, size)
            stage.holds(stuck == bool(progress.errno), f"EINTR is for no progress only: {progress}")
            stage.holds(progress.gpa + progress.size == region.gpa + region.size, f"lost some: {progress}")
            gpa, size = progress.gpa, progress.size
    hold(stage, found, {0, errno.EINTR})
    if stage.sees_leaves:
        leaves = stage.leaves(vm)
        stage.holds(sum(leaf.size for leaf in leaves) == region.size, "a page was left out")
    stage.holds(stage.faults(vm, vcpu).total == 0, "the guest faulted on memory that is mapped")


_MOMENTS = 60
_MORE_MOMENTS = 150
"""Where what is looked for takes a fortieth of the time: so many miss it once in a hundred runs."""
_LONG = 8 << 20
"""Bytes: a pre-fault of less is over too soon to be hit."""
_AROUND = 16
"""Pages that the fault of one page of a file brings in."""


@scenarios(
    "M12",
    cases=[
        (Backing.PRIVATE, True),
        (Backing.PRIVATE, False),
        (Backing.THP, True),
        (Backing.FILE_PRIVATE, False),
        (Backing.GUEST_MEMFD, True),
        (Backing.GUEST_MEMFD, False),
    ],
)
def what_is_dropped_at_any_moment_of_a_prefault_is_not_mapped(
    stage: Stage, backing: Backing, resident: bool
) -> None:
    """The guest reads what the host has written since: who maps an older page is noticed."""
    few = 4 * PAGES * stage.page
    # Of guest_memfd, few pages are long enough; x86 takes them away one by one, which takes it long as well.
    enough = {Backing.THP: stage.block, Backing.GUEST_MEMFD: few, Backing.FILE_PRIVATE: max(few, _LONG // 4)}
    size = enough.get(backing, max(few, _LONG))
    drop = Advice.REMOVE if backing is Backing.GUEST_MEMFD else Advice.DONTNEED
    # Of a file, only one page in so many takes the path that all of this is about.
    step = _AROUND * stage.page if backing is Backing.FILE_PRIVATE else size // PAGES
    vm = stage.vm(MemoryRegion(1, DATA, size, backing))
    _dropped(stage, vm, range(DATA, DATA + size, step), _MOMENTS, drop, resident=resident)


@scenarios("M12", "M14", cases=[(True,), (False,)])
def guests_with_tags_get_nothing_that_was_dropped_at_any_moment_of_a_prefault(
    stage: Stage, resident: bool
) -> None:
    """Page by page, for the tags of each have to be made fit for the guest."""
    pages = range(DATA, DATA + PAGES * stage.page, stage.page)
    vm = stage.vm(stage.data(PAGES), config=VmConfig(mte=True))
    _dropped(stage, vm, pages, _MORE_MOMENTS, Advice.DONTNEED, resident=resident)


def _dropped(stage: Stage, vm: Vm, looked_at: range, moments: int, drop: Advice, *, resident: bool) -> None:
    """Drop memory at any moment of a pre-fault, and write what is looked at anew: the guest must see that."""
    size = looked_at.stop - DATA
    vcpu = stage.vcpu(vm, *(moments * (Walk(DATA, size, looked_at.step), Report())))

    def renew(value: int) -> None:
        vm.advise(DATA, size, drop)
        for gpa in looked_at:
            vm.write_memory(gpa, value.to_bytes(8, "little"))

    with vm.preempt() as preempted:
        for moment in range(1, 1 + moments):
            vm.advise(DATA, size, drop)
            if resident:
                vm.advise(DATA, size, Advice.POPULATE_WRITE)
            preempted.run(partial(all_of, vcpu, DATA, size), partial(renew, moment))
            event, expected = stage.proceed(vcpu), moment * len(looked_at)
            stage.holds(
                event == Reported(expected), f"the guest read {event}, not what sums up to {expected}"
            )


_BATCH = 512
"""Pages that are pre-faulted by one look at their VMA."""


@scenario("M12", "M6")
def memory_that_becomes_secret_at_any_moment_of_a_prefault_is_for_no_guest(stage: Stage) -> None:
    """The PTEs of what was mapped in its place are like any others: only the VMA tells."""
    size, end = _BATCH * stage.page, _BATCH // 8 * stage.page
    at = DATA + size - end
    vm = stage.vm(MemoryRegion(1, DATA, size, Backing.PRIVATE, Resident.WRITE))
    vcpu = stage.vcpu(vm, Marker(0))

    def renew() -> None:
        vm.map_anew(at, end, secret=True)
        vm.write_memory(at, bytes(end))

    with vm.preempt() as preempted:
        for _ in range(_MOMENTS):
            vm.map_anew(DATA, size)
            vm.advise(DATA, size, Advice.POPULATE_WRITE)
            preempted.run(partial(all_of, vcpu, DATA, size), renew)
            # What is left of the rest depends on the moment.
            leaves = vm.stage2() if stage.sees_leaves else []
            mapped = [leaf for leaf in leaves if leaf.ipa + leaf.size > at]
            stage.holds(not mapped, f"secret memory is mapped: {mapped}")
