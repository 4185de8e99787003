# SPDX-License-Identifier: Apache-2.0
"""Memory whose faults a handler of the VMM serves: pre-faulting waits, can be interrupted, and goes on."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from prefault.abi.constants import EHWPOISON
from prefault.guest.program import EnterL2, L2Mapping, Marker, Read, Report, Walk, Write
from prefault.machine import (
    Access,
    Advice,
    Backing,
    MemoryRegion,
    Resident,
    SlotFlags,
    Userfault,
    UserfaultHandler,
    UserfaultMode,
    Vcpu,
    VcpuConfig,
    Vm,
    VmConfig,
)
from prefault.scenarios.scenario import DATA, RING, Stage, scenario, scenarios

PAGES = 16
MISSING = ((Backing.PRIVATE,), (Backing.SHARED,), (Backing.FILE_SHARED,))
_PATIENCE = 20.0

Asked = list[tuple[int, bool]]


def _contents(stage: Stage, gpa: int) -> bytes:
    """What handlers here put into a page: its own address."""
    return gpa.to_bytes(8, "little") * (stage.page // 8)


def _copying(stage: Stage, asked: Asked, pages: int = 1) -> UserfaultHandler:
    """A handler that serves so many pages from the one it is asked for, and remembers what it was asked."""

    def handler(userfault: Userfault, gpa: int, write: bool) -> None:
        asked.append((gpa, write))
        data = b"".join(_contents(stage, gpa + index * stage.page) for index in range(pages))
        userfault.copy(gpa, data)

    return handler


def _each_page(stage: Stage, step: int = 1) -> Asked:
    """What a handler is asked if every page is read once."""
    return [(DATA + index * stage.page, False) for index in range(0, PAGES, step)]


def _absent(stage: Stage, backing: Backing = Backing.PRIVATE) -> MemoryRegion:
    return stage.data(PAGES, backing, resident=Resident.NOTHING)


def _walk(stage: Stage) -> Walk:
    return Walk(DATA, PAGES * stage.page, stage.page)


def _guest_sees(stage: Stage, vm: Vm, vcpu: Vcpu, total: int, faults: int = 0) -> None:
    """The guest's walk must find what the handler put there, at the cost of so many faults."""
    with vm.count_faults() as counts:
        values = stage.finish(vcpu)
    stage.holds(values == [total], f"the guest read words that sum up to {values}, not {total:#x}")
    stage.holds(counts.total == faults, f"{counts.total} stage-2 faults, not {faults}")


@scenarios("M13", "M1", cases=MISSING)
def prefaulting_waits_for_the_handler(stage: Stage, backing: Backing) -> None:
    vm = stage.vm(_absent(stage, backing))
    vcpu = stage.vcpu(vm, Marker(0), _walk(stage), Report())
    stage.proceed(vcpu)
    asked: Asked = []
    size = PAGES * stage.page
    with vm.handle_userfaults(DATA, size, UserfaultMode.MISSING, _copying(stage, asked)):
        stage.pre_fault(vcpu, DATA, size)
    stage.see("asked", asked)
    stage.holds(asked == _each_page(stage), "the handler was not asked once for each page, as by a read")
    stage.holds(
        all(leaf.writable for leaf in stage.shown_leaves(vm)), "a page of the handler's came out read-only"
    )
    _guest_sees(stage, vm, vcpu, sum(gpa for gpa, _ in asked))


@scenarios("M13", "M1", cases=MISSING)
def the_handler_is_asked_as_by_the_guest(stage: Stage, backing: Backing) -> None:
    vm = stage.vm(_absent(stage, backing))
    vcpu = stage.vcpu(vm, Marker(0), _walk(stage), Report())
    stage.proceed(vcpu)
    asked: Asked = []
    with vm.handle_userfaults(DATA, PAGES * stage.page, UserfaultMode.MISSING, _copying(stage, asked)):
        _guest_sees(stage, vm, vcpu, sum(gpa for gpa, _ in _each_page(stage)), faults=PAGES)
    stage.see("asked", asked)
    stage.holds(asked == _each_page(stage), "the guest's reads asked for something else")


@scenarios("M13", "M7", cases=MISSING)
def what_the_handler_serves_to_a_logged_slot_is_mapped_read_only(stage: Stage, backing: Backing) -> None:
    """A page at a time: nothing but the page-wise path waits for a handler."""
    vm = stage.vm(replace(_absent(stage, backing), flags=SlotFlags.LOG_DIRTY_PAGES))
    vcpu = stage.vcpu(vm, Write(DATA + 3 * stage.page, 1), Marker(0))
    asked: Asked = []
    with vm.handle_userfaults(DATA, PAGES * stage.page, UserfaultMode.MISSING, _copying(stage, asked)):
        stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.holds(asked == _each_page(stage), "the handler was not asked once for each page, as by a read")
    stage.holds(
        not any(leaf.writable for leaf in stage.shown_leaves(vm)), "a logged slot has a writable leaf"
    )
    stage.holds(vm.get_dirty_log(1) == [], "pre-faulting made pages dirty")
    stage.proceed(vcpu)
    stage.holds(vm.get_dirty_log(1) == [3], "the guest's write is not in the log")


@scenarios("M13", "M7", cases=MISSING)
def what_the_handler_serves_is_in_a_dirty_ring_once_it_is_written(stage: Stage, backing: Backing) -> None:
    logged = replace(_absent(stage, backing), flags=SlotFlags.LOG_DIRTY_PAGES)
    vm = stage.vm(logged, config=VmConfig(dirty_ring=RING))
    vcpu = stage.vcpu(vm, Write(DATA + 3 * stage.page, 1), Marker(0))
    asked: Asked = []
    with vm.handle_userfaults(DATA, PAGES * stage.page, UserfaultMode.MISSING, _copying(stage, asked)):
        stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.holds(
        not any(leaf.writable for leaf in stage.shown_leaves(vm)), "a logged slot has a writable leaf"
    )
    stage.holds(vm.harvest_dirty_rings() == [], "pre-faulting made pages dirty")
    stage.proceed(vcpu)
    stage.holds(vm.harvest_dirty_rings() == [(1, 3)], "the guest's write is not in the ring")


@scenarios("M13", "M8", cases=MISSING)
def what_the_handler_serves_to_a_read_only_slot_is_mapped_read_only(stage: Stage, backing: Backing) -> None:
    vm = stage.vm(replace(_absent(stage, backing), flags=SlotFlags.READONLY))
    vcpu = stage.vcpu(vm, Marker(0), _walk(stage), Report())
    stage.proceed(vcpu)
    asked: Asked = []
    with vm.handle_userfaults(DATA, PAGES * stage.page, UserfaultMode.MISSING, _copying(stage, asked)):
        stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.holds(asked == _each_page(stage), "the handler was not asked once for each page, as by a read")
    stage.holds(
        not any(leaf.writable for leaf in stage.shown_leaves(vm)), "a read-only slot has a writable leaf"
    )
    _guest_sees(stage, vm, vcpu, sum(gpa for gpa, _ in asked))


@scenarios("M13", cases=[(2,), (5,), (PAGES,)])
def pages_that_come_together_are_asked_for_once(stage: Stage, pages: int) -> None:
    vm = stage.vm(stage.data(pages * 3, resident=Resident.NOTHING))
    asked: Asked = []
    size = pages * 3 * stage.page
    with vm.handle_userfaults(DATA, size, UserfaultMode.MISSING, _copying(stage, asked, pages)):
        stage.pre_fault(stage.vcpu(vm, Marker(0)), DATA, size)
    stage.holds(asked == [(DATA + index * pages * stage.page, False) for index in range(3)], f"asked {asked}")
    stage.shown_leaves(vm)


@scenarios("M13", "M6", cases=MISSING)
def pages_served_with_zeroes_keep_their_copy_on_write(stage: Stage, backing: Backing) -> None:
    vm = stage.vm(_absent(stage, backing))
    vcpu = stage.vcpu(vm, Marker(0), Write(DATA, 7), Read(DATA), Report())
    stage.proceed(vcpu)

    def handler(userfault: Userfault, gpa: int, write: bool) -> None:
        userfault.zero(gpa, stage.page)

    with vm.handle_userfaults(DATA, PAGES * stage.page, UserfaultMode.MISSING, handler):
        stage.pre_fault(vcpu, DATA, PAGES * stage.page)
        shared = backing is not Backing.PRIVATE
        stage.holds(
            all(leaf.writable == shared for leaf in stage.shown_leaves(vm)),
            "the zero page came out writable, or a page of shared memory did not",
        )
        stage.holds(stage.finish(vcpu) == [7], "the guest's write is lost")


@scenarios("M13", cases=[(Backing.SHARED,), (Backing.FILE_SHARED,)])
def prefaulting_waits_for_the_handler_of_minor_faults(stage: Stage, backing: Backing) -> None:
    vm = stage.vm(stage.data(PAGES, backing))
    vcpu = stage.vcpu(vm, Marker(0), _walk(stage), Report())
    stage.proceed(vcpu)
    for gpa, _ in _each_page(stage):
        vm.write_memory(gpa, _contents(stage, gpa))
    vm.advise(DATA, PAGES * stage.page, Advice.DONTNEED)
    asked: Asked = []

    def handler(userfault: Userfault, gpa: int, write: bool) -> None:
        asked.append((gpa, write))
        userfault.proceed(gpa, stage.page)

    with vm.handle_userfaults(DATA, PAGES * stage.page, UserfaultMode.MINOR, handler):
        stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.see("asked", asked)
    stage.holds(asked == _each_page(stage), "the handler was not asked once for each page, as by a read")
    stage.shown_leaves(vm)
    _guest_sees(stage, vm, vcpu, sum(gpa for gpa, _ in asked))


@scenarios("M13", "M10", "M2", cases=[(0,), (1,), (5,), (PAGES - 1,)])
def a_signal_ends_the_wait_with_progress_or_eintr(stage: Stage, done: int) -> None:
    vm = stage.vm(_absent(stage))
    vcpu = stage.vcpu(vm, Marker(0), _walk(stage), Report())
    stage.proceed(vcpu)
    asked: Asked = []
    serve = _copying(stage, asked)
    stop = DATA + done * stage.page
    signals = [stop]

    def handler(userfault: Userfault, gpa: int, write: bool) -> None:
        if gpa in signals:
            signals.clear()
            userfault.interrupt()
        else:
            serve(userfault, gpa, write)

    with vm.handle_userfaults(DATA, PAGES * stage.page, UserfaultMode.MISSING, handler):
        progress = stage.pre_fault_once(vcpu, DATA, PAGES * stage.page)
        wanted = (0 if done else errno.EINTR, stop, DATA + PAGES * stage.page - stop)
        found = (progress.errno, progress.gpa, progress.size)
        stage.holds(found == wanted, f"a signal at page {done} gave {progress}")
        stage.pre_fault(vcpu, progress.gpa, progress.size)
    # The handler may have been asked again before the thread was gone.
    stage.holds(sorted(set(asked)) == _each_page(stage), f"after the signal, asked {asked}")
    stage.shown_leaves(vm)
    _guest_sees(stage, vm, vcpu, sum(gpa for gpa, _ in _each_page(stage)))


@scenarios("M13", "M10", cases=[(Backing.PRIVATE,), (Backing.SHARED,)])
def a_page_that_the_handler_has_lost_is_ehwpoison(stage: Stage, backing: Backing) -> None:
    vm = stage.vm(_absent(stage, backing))
    vcpu = stage.vcpu(vm, Marker(0))
    stage.proceed(vcpu)
    bad = DATA + 5 * stage.page
    asked: Asked = []
    serve = _copying(stage, asked)

    def handler(userfault: Userfault, gpa: int, write: bool) -> None:
        if gpa == bad:
            userfault.poison(gpa, stage.page)
        else:
            serve(userfault, gpa, write)

    with vm.handle_userfaults(DATA, PAGES * stage.page, UserfaultMode.MISSING, handler):
        progress = stage.pre_fault_once(vcpu, DATA, PAGES * stage.page)
        stage.holds((progress.errno, progress.gpa) == (0, bad), f"up to the page that is lost: {progress}")
        progress = stage.pre_fault_once(vcpu, bad, 2 * stage.page)
        stage.holds((progress.errno, progress.gpa) == (EHWPOISON, bad), f"a page that is lost: {progress}")
        stage.pre_fault(vcpu, bad + stage.page, (PAGES - 6) * stage.page)
    stage.shown_leaves(vm)


@scenario("M13", "M9")
def memory_of_a_handler_comes_in_pages(stage: Stage) -> None:
    pages = stage.block // stage.page
    vm = stage.vm(stage.data(pages, Backing.THP, resident=Resident.NOTHING))
    asked: Asked = []
    vcpu = stage.vcpu(vm, Marker(0))
    with vm.handle_userfaults(DATA, stage.block, UserfaultMode.MISSING, _copying(stage, asked, pages // 8)):
        stage.pre_fault(vcpu, DATA, stage.block)
    wanted = [(DATA + index * stage.block // 8, False) for index in range(8)]
    stage.holds(asked == wanted, f"asked {asked}")
    leaves = stage.shown_leaves(vm)
    stage.holds(all(leaf.level == 3 for leaf in leaves), "pages that came one by one are a block")


@scenarios("M13", "M4", cases=[(False,), (True,)])
def nested_prefaulting_waits_for_the_handler(stage: Stage, e2h0: bool) -> None:
    vm = stage.vm(_absent(stage))
    l2 = 0x20_0000_0000
    steps = EnterL2((Marker(0), Read(l2), Report()), (L2Mapping(l2, DATA, PAGES * stage.page),))
    vcpu = stage.vcpu(vm, steps, config=VcpuConfig(el2=True, e2h0=e2h0))
    stage.proceed(vcpu)
    before = vm.nested_stage2()
    asked: Asked = []
    with vm.handle_userfaults(DATA, PAGES * stage.page, UserfaultMode.MISSING, _copying(stage, asked)):
        stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.holds(asked == _each_page(stage), "the handler was not asked once for each page, as by a read")
    stage.holds(vm.nested_stage2() == before, "a shadow table changed")
    stage.shown_leaves(vm)
    stage.holds(stage.finish(vcpu) == [DATA], "the L2 does not see what the handler put there")


@scenario("M13", "M12", "M3")
def others_go_on_while_a_prefault_waits(stage: Stage) -> None:
    other = MemoryRegion(2, 2 * DATA, PAGES * stage.page, resident=Resident.WRITE)
    vm = stage.vm(_absent(stage), other)
    waits = vm.create_vcpu()
    walk = Walk(other.gpa, other.size // 2, stage.page, 1000)
    goes_on = stage.vcpu(vm, Marker(0), walk, Report())
    # The first KVM_RUN of a VM puts the GIC on the I/O bus, and may wait for all readers of it to leave.
    stage.proceed(goes_on)
    asked: Asked = []
    serve = _copying(stage, asked)

    def handler(userfault: Userfault, gpa: int, write: bool) -> None:
        if gpa == DATA:
            goes_on.pre_fault_memory(other.gpa + other.size // 2, other.size // 2)
            stage.finish(goes_on)
        serve(userfault, gpa, write)

    with vm.handle_userfaults(DATA, PAGES * stage.page, UserfaultMode.MISSING, handler):
        stage.pre_fault(waits, DATA, PAGES * stage.page)
    stage.holds(asked == _each_page(stage), f"asked {asked}")
    stage.shown_leaves(vm)
    stage.shown_leaves(vm, other.gpa, other.size)


def _forbid_writing(vm: Vm, gpa: int, size: int) -> None:
    vm.protect(gpa, size, Access.READ)


def _unmap(vm: Vm, gpa: int, size: int) -> None:
    vm.unmap(gpa, size)


def _use_huge_pages(vm: Vm, gpa: int, size: int) -> None:
    vm.advise(gpa, size, Advice.HUGEPAGE)


_CHANGES: dict[str, Callable[[Vm, int, int], None]] = {
    "mprotect": _forbid_writing,
    "munmap": _unmap,
    "madvise": _use_huge_pages,
}


@scenarios("M13", "M12", cases=[(name,) for name in _CHANGES])
def the_host_can_change_its_mappings_while_a_prefault_waits(stage: Stage, change: str) -> None:
    vm = stage.vm(_absent(stage))
    half = PAGES // 2 * stage.page
    asked: Asked = []
    serve = _copying(stage, asked)

    def handler(userfault: Userfault, gpa: int, write: bool) -> None:
        if gpa == DATA:
            # This takes the lock of the VMM's mappings, which who waits must not hold.
            _CHANGES[change](vm, DATA + half, half)
        serve(userfault, gpa, write)

    vcpu = stage.vcpu(vm, Marker(0))
    with vm.handle_userfaults(DATA, 2 * half, UserfaultMode.MISSING, handler):
        progress = stage.pre_fault_once(vcpu, DATA, 2 * half)
        while progress.size and not progress.errno:
            progress = stage.pre_fault_once(vcpu, progress.gpa, progress.size)
    wanted = errno.EFAULT if change == "munmap" else 0
    stage.holds(progress.errno == wanted, f"{change} during the wait: {progress}")
    stage.see("asked", asked)
    stage.shown_leaves(vm)


def _move(region: MemoryRegion) -> MemoryRegion:
    return replace(region, gpa=2 * DATA)


def _delete(region: MemoryRegion) -> MemoryRegion:
    return replace(region, size=0)


_ENDS: dict[str, Callable[[MemoryRegion], MemoryRegion]] = {"delete": _delete, "move": _move}


@scenarios("M12", "M10", "M13", cases=[(name, pages) for name in _ENDS for pages in (1, PAGES // 2)])
def a_slot_that_is_going_away_is_eagain(stage: Stage, end: str, pages: int) -> None:
    region = stage.data(PAGES)
    vm = stage.vm(region)
    vm.advise(DATA, pages * stage.page, Advice.DONTNEED)
    waits, other = vm.create_vcpu(), vm.create_vcpu()
    found: list[int] = []
    asked: Asked = []
    serve = _copying(stage, asked)
    # What changes a memslot waits for the pre-fault, which waits for the handler.
    change = threading.Thread(target=vm.set_user_memory_region, args=(_ENDS[end](region),))

    def handler(userfault: Userfault, gpa: int, write: bool) -> None:
        if not asked:
            change.start()
        give_up = time.monotonic() + _PATIENCE
        while not found and time.monotonic() < give_up:
            progress = other.pre_fault_memory_once(DATA + pages * stage.page, stage.page)
            found.extend([progress.errno] if progress.errno else [])
        serve(userfault, gpa, write)

    with vm.handle_userfaults(DATA, pages * stage.page, UserfaultMode.MISSING, handler):
        progress = stage.pre_fault_once(waits, DATA, PAGES * stage.page)
        change.join(_PATIENCE)
    stage.see("meanwhile", found)
    stage.holds(found == [errno.EAGAIN], f"a pre-fault of a slot that is going away gave {found}")
    stage.see("asked", asked)
    stage.holds(asked == [(DATA, False)], f"pages of a slot that is going away were asked for: {asked}")
    stage.holds(
        (progress.errno, progress.gpa) == (0, DATA + stage.page), f"who waited should stop there: {progress}"
    )
    stage.holds(not change.is_alive(), "the slot never went away")
    stage.holds(stage.shown_leaves(vm) == [], "a slot that is gone left leaves")
    gone = stage.pre_fault_once(waits, DATA, stage.page)
    stage.holds(gone.errno == errno.ENOENT, f"a slot that is gone gave {gone}")


@scenarios("M12", "M7", "M13", cases=[(Backing.PRIVATE,), (Backing.SHARED,)])
def logging_that_starts_while_a_prefault_waits_sees_every_write(stage: Stage, backing: Backing) -> None:
    region = _absent(stage, backing)
    vm = stage.vm(region)
    vcpu = stage.vcpu(vm, Write(DATA + 3 * stage.page, 1), Marker(0))
    logged = replace(region, flags=SlotFlags.LOG_DIRTY_PAGES)
    change = threading.Thread(target=vm.set_user_memory_region, args=(logged,))
    asked: Asked = []
    serve = _copying(stage, asked)

    def handler(userfault: Userfault, gpa: int, write: bool) -> None:
        if gpa == DATA:
            change.start()
            change.join(0.05)
        serve(userfault, gpa, write)

    with vm.handle_userfaults(DATA, PAGES * stage.page, UserfaultMode.MISSING, handler):
        stage.pre_fault(vcpu, DATA, PAGES * stage.page)
        change.join(_PATIENCE)
    stage.holds(not change.is_alive(), "logging never started")
    stage.holds(
        not any(leaf.writable for leaf in stage.shown_leaves(vm)), "a logged slot has a writable leaf"
    )
    stage.holds(vm.get_dirty_log(1) == [], "pre-faulting made pages dirty")
    stage.proceed(vcpu)
    stage.holds(vm.get_dirty_log(1) == [3], "the guest's write is not in the log")


@scenario("M13", "M12")
def two_prefaults_wait_for_one_page(stage: Stage) -> None:
    vm = stage.vm(_absent(stage))
    vcpus = [vm.create_vcpu() for _ in range(2)]
    asked: Asked = []
    size = PAGES * stage.page
    with vm.handle_userfaults(DATA, size, UserfaultMode.MISSING, _copying(stage, asked)):
        threads = [threading.Thread(target=vcpu.pre_fault_memory, args=(DATA, size)) for vcpu in vcpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_PATIENCE)
    stage.holds(not any(thread.is_alive() for thread in threads), "a wake-up was lost")
    stage.holds(sorted(set(asked)) == _each_page(stage), f"asked {asked}")
    stage.shown_leaves(vm)


@scenario("M13", "M12", "M3")
def a_guest_and_a_prefault_wait_for_one_page(stage: Stage) -> None:
    vm = stage.vm(_absent(stage))
    walker, other = stage.vcpu(vm, _walk(stage), Report()), vm.create_vcpu()
    asked: Asked = []
    size = PAGES * stage.page
    with vm.handle_userfaults(DATA, size, UserfaultMode.MISSING, _copying(stage, asked)):
        thread = threading.Thread(target=other.pre_fault_memory, args=(DATA, size))
        thread.start()
        values = stage.finish(walker)
        thread.join(_PATIENCE)
    stage.holds(not thread.is_alive(), "a wake-up was lost")
    stage.holds(values == [sum(gpa for gpa, _ in _each_page(stage))], f"the guest read {values}")
    stage.holds(sorted(set(asked)) == _each_page(stage), f"asked {asked}")
    stage.shown_leaves(vm)


@scenario("M13", "M6")
def a_page_protected_by_the_handler_is_mapped_read_only(stage: Stage) -> None:
    vm = stage.vm(stage.data(PAGES))
    vcpu = stage.vcpu(vm, Marker(0), Write(DATA, 7), Read(DATA), Report())
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, stage.page)
    asked: Asked = []

    def handler(userfault: Userfault, gpa: int, write: bool) -> None:
        asked.append((gpa, write))
        userfault.write_protect(gpa, stage.page, protect=False)

    half = PAGES // 2 * stage.page
    with vm.handle_userfaults(DATA, 2 * half, UserfaultMode.WRITE_PROTECT, handler) as userfault:
        userfault.write_protect(DATA, half, protect=True)
        stage.holds(stage.shown_leaves(vm) == [], "write-protecting left a leaf")
        stage.pre_fault(vcpu, DATA, 2 * half)
        stage.holds(asked == [], f"pre-faulting asked for write access: {asked}")
        if stage.sees_leaves:
            leaves = stage.leaves(vm)
            stage.holds(
                [(leaf.ipa, leaf.writable) for leaf in leaves] == [(DATA, False), (DATA + half, True)],
                f"half of the pages are protected: {leaves}",
            )
        stage.holds(stage.finish(vcpu) == [7], "the guest's write is lost")
    stage.holds(asked == [(DATA, True)], f"the guest's write asked {asked}")
    stage.shown_leaves(vm)
