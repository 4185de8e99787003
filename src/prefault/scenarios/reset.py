# SPDX-License-Identifier: Apache-2.0
"""Guests that reboot: KVM_ARM_VCPU_INIT on a vCPU that has run.

Where the processor has no FEAT_S2FWB, KVM takes all memory away from the guest then, to clean the caches when
it comes back. What was pre-faulted is gone, which is as good as memory that the host has dropped: it can be
pre-faulted again, before the guest runs and while another vCPU does so.
"""

from __future__ import annotations

from functools import partial

from prefault.guest.program import Marker, Report, Walk
from prefault.machine import Backing, Resident, Userfault, UserfaultMode, Vcpu, Vm
from prefault.scenarios.races import all_of, hold, meanwhile
from prefault.scenarios.scenario import DATA, Stage, scenario, scenarios

PAGES = 64
_BACKINGS = (Backing.PRIVATE, Backing.SHARED, Backing.THP, Backing.GUEST_MEMFD)


def _pages(stage: Stage, backing: Backing) -> int:
    return 2 * stage.block // stage.page if backing is Backing.THP else PAGES


def _fill(stage: Stage, vm: Vm, pages: int, salt: int) -> int:
    """Have the host write to each page; the sum of what it wrote."""
    words = [salt + index for index in range(pages)]
    for index, word in enumerate(words):
        vm.write_memory(DATA + index * stage.page, word.to_bytes(8, "little"))
    return sum(words)


def _guest_sees(stage: Stage, vm: Vm, vcpu: Vcpu, pages: int, total: int) -> None:
    """A guest that has booted again walks what was pre-faulted, at no cost."""
    stage.load(vm, vcpu, Marker(1), Walk(DATA, pages * stage.page, stage.page), Report())
    stage.proceed(vcpu)  # its code may have to come back first
    with vm.count_faults() as counts:
        values = stage.finish(vcpu)
    stage.holds(values == [total], f"the guest read words that sum up to {values}, not {total:#x}")
    stage.holds(counts.total == 0, f"{counts.total} stage-2 faults on memory that was pre-faulted again")


@scenarios("M3", "M12", cases=[(backing,) for backing in _BACKINGS])
def memory_can_be_prefaulted_again_after_a_reset(stage: Stage, backing: Backing) -> None:
    pages = _pages(stage, backing)
    vm = stage.vm(stage.data(pages, backing))
    vcpu = stage.vcpu(vm, Marker(0))
    stage.proceed(vcpu)
    _fill(stage, vm, pages, 0x11)
    stage.pre_fault(vcpu, DATA, pages * stage.page)
    before = stage.shown_leaves(vm)
    vcpu.reset()
    if stage.sees_leaves:
        left = [leaf for leaf in vm.stage2() if leaf.ipa >= DATA]
        stage.holds(left in ([], before), f"a reset takes all of the memory or nothing, and left {left}")
    total = _fill(stage, vm, pages, 0x2200)
    stage.pre_fault(vcpu, DATA, pages * stage.page)
    stage.holds(stage.shown_leaves(vm) == before, "pre-faulting after a reset gives other leaves than before")
    _guest_sees(stage, vm, vcpu, pages, total)


@scenarios("M3", "M12", cases=[(backing,) for backing in _BACKINGS])
def a_vcpu_can_be_reset_while_another_prefaults(stage: Stage, backing: Backing) -> None:
    pages = _pages(stage, backing)
    vm = stage.vm(stage.data(pages, backing))
    vcpu, other = stage.vcpu(vm, Marker(0)), vm.create_vcpu()
    stage.proceed(vcpu)
    total = _fill(stage, vm, pages, 0x11)
    found = meanwhile(vcpu.reset, partial(all_of, other, DATA, pages * stage.page))
    hold(stage, found, {0})
    stage.pre_fault(other, DATA, pages * stage.page)
    stage.shown_leaves(vm)
    _guest_sees(stage, vm, vcpu, pages, total)


@scenario("M12", "M13")
def a_vcpu_can_be_reset_while_a_prefault_waits(stage: Stage) -> None:
    size = PAGES * stage.page
    vm = stage.vm(stage.data(PAGES, resident=Resident.NOTHING))
    vcpu, waits = stage.vcpu(vm, Marker(0)), vm.create_vcpu()
    stage.proceed(vcpu)
    middle = DATA + size // 2

    def handler(userfault: Userfault, gpa: int, write: bool) -> None:
        if gpa == middle:
            # Who waits is in the ioctl; what it has mapped so far may go.
            vcpu.reset()
        userfault.copy(gpa, gpa.to_bytes(8, "little") * (stage.page // 8))

    with vm.handle_userfaults(DATA, size, UserfaultMode.MISSING, handler):
        stage.pre_fault(waits, DATA, size)
        stage.pre_fault(waits, DATA, size)
    stage.shown_leaves(vm)
    _guest_sees(stage, vm, vcpu, PAGES, sum(range(DATA, DATA + size, stage.page)))
