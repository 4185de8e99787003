# SPDX-License-Identifier: Apache-2.0
"""Invalidations of the VMM's memory that last: a pre-fault waits for their end, and can be interrupted."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prefault.guest.program import Marker, Read, Report, Walk
from prefault.machine import Backing, Held, MemoryRegion, PreFaultProgress, Resident, Vcpu, Vm
from prefault.scenarios.scenario import DATA, Stage, scenarios

PAGES = 16
LONG = 32768
"""Pages that are dropped, all of them the zero page: so many that it takes the kernel milliseconds."""
_PATIENCE = 20.0
_SIGNAL_SECONDS = 0.02


def _long(stage: Stage) -> MemoryRegion:
    """Slot 2, right behind slot 1."""
    return MemoryRegion(2, DATA + PAGES * stage.page, LONG * stage.page, resident=Resident.READ)


def _with_a_walk(stage: Stage, long: MemoryRegion, start: int, size: int) -> tuple[Vm, Vcpu]:
    """A VM with slot 1 pre-faulted and slot 2, and a vCPU that is about to walk a range of theirs."""
    vm = stage.vm(stage.data(PAGES), long)
    vcpu = stage.vcpu(vm, Marker(0), Walk(start, size, stage.page), Report())
    stage.proceed(vcpu)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    return vm, vcpu


@contextmanager
def _signals(held: Held) -> Iterator[threading.Event]:
    """Send signals while this is open. If that is in vain, the event is set and the invalidation ends."""
    enough, in_vain = threading.Event(), threading.Event()

    def send() -> None:
        give_up = time.monotonic() + _PATIENCE
        while not enough.wait(_SIGNAL_SECONDS):
            held.interrupt()
            if time.monotonic() > give_up:
                in_vain.set()
                held.release()
                return

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield in_vain
    finally:
        enough.set()
        sender.join()


def _until_eintr(stage: Stage, vcpu: Vcpu, gpa: int, size: int, in_vain: threading.Event) -> PreFaultProgress:
    """Pre-fault under signals until one comes where there is nothing left to do."""
    while True:
        progress = vcpu.pre_fault_memory_once(gpa, size)
        stage.holds(
            not in_vain.is_set(), f"no signal ended the wait for an invalidation, which gave {progress}"
        )
        stage.holds(progress.errno in (0, errno.EINTR), f"a pre-fault that was interrupted gave {progress}")
        done = progress.gpa - gpa
        stage.holds(
            (done == 0) == (progress.errno == errno.EINTR), f"EINTR is for no progress only: {progress}"
        )
        stage.holds(progress.size == size - done, f"what is left does not fit: {progress}")
        if not done or not progress.size:
            return progress
        gpa, size = progress.gpa, progress.size


@scenarios("M10", "M2", "M12", cases=[(0,), (1,), (PAGES,)])
def a_signal_ends_the_wait_for_an_invalidation_that_lasts(stage: Stage, done: int) -> None:
    long = _long(stage)
    start, size = long.gpa - done * stage.page, (done + PAGES) * stage.page
    vm, vcpu = _with_a_walk(stage, long, start, size)
    with vm.hold_invalidation(long.gpa, long.size) as held, _signals(held) as in_vain:
        progress = _until_eintr(stage, vcpu, start, size, in_vain)
        while progress.gpa < long.gpa:  # A signal may come before the first page.
            progress = _until_eintr(stage, vcpu, progress.gpa, progress.size, in_vain)
    stage.see("interrupted", progress)
    stage.holds(progress.gpa == long.gpa, f"what is being invalidated was mapped: {progress}")
    vm.write_memory(long.gpa, (0x77).to_bytes(8, "little"))
    stage.pre_fault(vcpu, progress.gpa, progress.size)
    stage.shown_leaves(vm)
    with vm.count_faults() as counts:
        values = stage.finish(vcpu)
    stage.holds(values == [0x77], f"the guest read words that sum up to {values}")
    stage.holds(counts.total == 0, f"{counts.total} stage-2 faults on memory that was pre-faulted afterwards")


@scenarios(
    "M10", "M12", cases=[(Backing.PRIVATE,), (Backing.SHARED,), (Backing.THP,), (Backing.GUEST_MEMFD,)]
)
def a_signal_ends_the_wait_for_an_invalidation_elsewhere(stage: Stage, backing: Backing) -> None:
    """Whether there is a wait is up to KVM: arm64's has one count of invalidations for all memory of a VM."""
    pages = stage.block // stage.page if backing is Backing.THP else PAGES
    long = MemoryRegion(2, 2 * DATA, LONG * stage.page, resident=Resident.READ)
    vm = stage.vm(stage.data(pages, backing), long)
    vcpu = stage.vcpu(vm, Marker(0), Read(DATA), Report())
    stage.proceed(vcpu)
    vm.write_memory(DATA, (0x77).to_bytes(8, "little"))
    with vm.hold_invalidation(long.gpa, long.size) as held, _signals(held) as in_vain:
        _until_eintr(stage, vcpu, DATA, pages * stage.page, in_vain)
    stage.pre_fault(vcpu, DATA, pages * stage.page)
    stage.shown_leaves(vm, DATA, pages * stage.page)
    stage.holds(stage.finish(vcpu) == [0x77], "the guest does not see what the host wrote")


@scenarios("M12", cases=[(0,), (PAGES,)])
def a_prefault_goes_on_when_an_invalidation_that_lasts_ends(stage: Stage, done: int) -> None:
    long = _long(stage)
    start, size = long.gpa - done * stage.page, (done + PAGES) * stage.page
    vm, vcpu = _with_a_walk(stage, long, start, size)
    with vm.hold_invalidation(long.gpa, long.size) as held:
        ends = threading.Timer(0.1, held.release)
        ends.start()
        # What was found while pages were being dropped must not be what is mapped.
        progress = stage.pre_fault_once(vcpu, start, size)
        ends.join()
    stage.holds((progress.errno, progress.size) == (0, 0), f"when the invalidation ended: {progress}")
    stage.shown_leaves(vm)
    vm.write_memory(long.gpa, (0x77).to_bytes(8, "little"))
    stage.pre_fault(vcpu, start, size)
    stage.holds(stage.finish(vcpu) == [0x77], "the guest does not see what the host wrote")
