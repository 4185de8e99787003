# SPDX-License-Identifier: Apache-2.0
"""What the ioctl refuses, with which errno, and that it leaves everything as it was then."""

from __future__ import annotations

import errno
import signal

from prefault.abi.constants import EHWPOISON, KVM_CAP_PRE_FAULT_MEMORY
from prefault.errors import CapabilityMissing
from prefault.guest.program import Marker
from prefault.machine import (
    Access,
    Advice,
    Backing,
    MemoryRegion,
    Resident,
    Userfault,
    UserfaultMode,
    Vcpu,
    VcpuConfig,
    Vm,
    VmConfig,
)
from prefault.scenarios.scenario import DATA, Stage, scenario, scenarios

PAGES = 8


def _refused(stage: Stage, vcpu: Vcpu, gpa: int, size: int, error: int, flags: int = 0) -> None:
    progress = stage.pre_fault_once(vcpu, gpa, size, flags)
    wanted = errno.errorcode.get(error, str(error))
    stage.holds(
        progress.errno == error, f"gpa {gpa:#x} size {size:#x} flags {flags:#x}: {wanted}, not {progress}"
    )
    stage.holds((progress.gpa, progress.size) == (gpa, size), f"a refused range came back as {progress}")


def _ready(stage: Stage, backing: Backing = Backing.PRIVATE) -> tuple[Vm, Vcpu]:
    vm = stage.vm(stage.data(PAGES, backing))
    vcpu = stage.vcpu(vm, Marker(0))
    stage.proceed(vcpu)
    return vm, vcpu


@scenario("M10")
def bad_ranges_are_einval(stage: Stage) -> None:
    vm, vcpu = _ready(stage)
    top = (1 << 64) - stage.page
    for gpa, size, flags in (
        (DATA, stage.page, 1),
        (DATA, stage.page, 1 << 63),
        (DATA + 1, stage.page, 0),
        (DATA + stage.page // 2, stage.page, 0),
        (DATA, stage.page - 1, 0),
        (DATA, 0, 0),
        (top, stage.page, 0),
        (top, 2 * stage.page, 0),
        (DATA, top, 0),
    ):
        _refused(stage, vcpu, gpa, size, errno.EINVAL, flags)
    stage.holds(stage.shown_leaves(vm) == [], "a refused range was mapped")


@scenarios(
    "M10", cases=[(0,), (DATA - (1 << 20),), (1 << 39,), (1 << 40,), (1 << 48,), (1 << 52,), (1 << 63,)]
)
def no_memslot_is_enoent_at_any_ipa(stage: Stage, gpa: int) -> None:
    _, vcpu = _ready(stage)
    _refused(stage, vcpu, gpa, stage.page, errno.ENOENT)
    _refused(stage, vcpu, gpa, 64 * stage.page, errno.ENOENT)


@scenario("M10")
def deleted_slot_is_enoent(stage: Stage) -> None:
    vm, vcpu = _ready(stage)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    vm.set_user_memory_region(MemoryRegion(1, DATA, 0))
    _refused(stage, vcpu, DATA, stage.page, errno.ENOENT)


@scenario("M10")
def memory_unmapped_by_the_host_is_efault(stage: Stage) -> None:
    vm, vcpu = _ready(stage)
    hole = DATA + 3 * stage.page
    vm.unmap(hole, stage.page)
    _refused(stage, vcpu, hole, stage.page, errno.EFAULT)
    progress = stage.pre_fault_once(vcpu, DATA, PAGES * stage.page)
    stage.holds(
        (progress.errno, progress.gpa) == (0, hole), f"progress up to a hole is success, not {progress}"
    )
    stage.shown_leaves(vm)


@scenario("M10")
def memory_without_access_is_efault(stage: Stage) -> None:
    vm, vcpu = _ready(stage)
    vm.protect(DATA, PAGES * stage.page, Access.NONE)
    _refused(stage, vcpu, DATA, PAGES * stage.page, errno.EFAULT)
    vm.protect(DATA, PAGES * stage.page, Access.WRITE)
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)


@scenarios("M10", cases=[(Backing.SHARED,), (Backing.FILE_SHARED,)])
def memory_without_access_is_not_allocated(stage: Stage, backing: Backing) -> None:
    """A handler of missing pages is asked for all of them afterwards."""
    size = PAGES * stage.page
    asked: list[int] = []
    vm = stage.vm(stage.data(PAGES, backing, resident=Resident.NOTHING))
    vcpu = stage.vcpu(vm, Marker(0))
    vm.protect(DATA, size, Access.NONE)
    _refused(stage, vcpu, DATA, size, errno.EFAULT)
    vm.protect(DATA, size, Access.WRITE)

    def handler(userfault: Userfault, gpa: int, write: bool) -> None:
        asked.append(gpa)
        userfault.zero(gpa, stage.page)

    with vm.handle_userfaults(DATA, size, UserfaultMode.MISSING, handler):
        stage.pre_fault(vcpu, DATA, size)
    stage.holds(asked == list(range(DATA, DATA + size, stage.page)), f"missing were {asked}")


@scenarios("M10", cases=[(Backing.PRIVATE,), (Backing.SHARED,), (Backing.GUEST_MEMFD,)])
def poisoned_page_is_ehwpoison_without_a_signal(stage: Stage, backing: Backing) -> None:
    vm, vcpu = _ready(stage, backing)
    bad = DATA + 2 * stage.page
    vm.advise(bad, stage.page, Advice.HWPOISON)
    signals: list[int] = []
    before = signal.signal(signal.SIGBUS, lambda number, frame: signals.append(number))
    _refused(stage, vcpu, bad, stage.page, EHWPOISON)
    signal.signal(signal.SIGBUS, before)
    stage.holds(not signals, "pre-faulting a poisoned page sent SIGBUS")
    progress = stage.pre_fault_once(vcpu, DATA, PAGES * stage.page)
    stage.holds(
        (progress.errno, progress.gpa) == (0, bad), f"progress up to a bad page is success, not {progress}"
    )
    stage.pre_fault(vcpu, bad + stage.page, 5 * stage.page)
    stage.shown_leaves(vm)


@scenarios("M10", cases=[(False,), (True,)])
def uninitialised_vcpu_is_enoexec(stage: Stage, el2: bool) -> None:
    vm = stage.vm(stage.data(PAGES))
    vm.create_vcpu(VcpuConfig(el2=el2))
    # More of them than shadow MMUs would be there for.
    for _ in range(4):
        _refused(stage, vm.create_vcpu(VcpuConfig(initialised=False)), DATA, stage.page, errno.ENOEXEC)
    stage.holds(stage.shown_leaves(vm) == [], "a vCPU without state mapped memory")


@scenario("M11")
def capability_is_reported_where_it_works(stage: Stage) -> None:
    vm, vcpu = _ready(stage)
    reported = vm.check_extension(KVM_CAP_PRE_FAULT_MEMORY)
    stage.see("capability", reported)
    stage.see("capability of the system", stage.kvm.check_extension(KVM_CAP_PRE_FAULT_MEMORY))
    progress = stage.pre_fault_once(vcpu, DATA, stage.page)
    wanted = 0 if reported else errno.EOPNOTSUPP
    stage.holds(progress.errno == wanted, f"the capability is {reported}, and the ioctl gave {progress}")


@scenario("M11")
def protected_vms_are_refused(stage: Stage) -> None:
    try:
        vm = stage.vm(stage.data(PAGES), config=VmConfig(protected=True))
    except CapabilityMissing:
        stage.see("protected VMs", "none on this host")
        return
    reported = vm.check_extension(KVM_CAP_PRE_FAULT_MEMORY)
    stage.holds(not reported, f"a protected VM reports the capability as {reported}")
    vcpu = stage.vcpu(vm, Marker(0))
    _refused(stage, vcpu, DATA, stage.page, errno.EOPNOTSUPP)
    stage.proceed(vcpu)
    _refused(stage, vcpu, DATA, stage.page, errno.EOPNOTSUPP)


@scenario("M10")
def vm_without_that_memory_keeps_working(stage: Stage) -> None:
    vm = stage.vm()
    vcpu = stage.vcpu(vm, Marker(0), Marker(1))
    stage.proceed(vcpu)
    _refused(stage, vcpu, DATA, stage.page, errno.ENOENT)
    vm.set_user_memory_region(stage.data(PAGES, resident=Resident.NOTHING))
    stage.pre_fault(vcpu, DATA, PAGES * stage.page)
    stage.proceed(vcpu)
