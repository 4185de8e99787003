# SPDX-License-Identifier: Apache-2.0
"""userfaultfd in the spec, beyond what scenarios show on both back ends."""

from __future__ import annotations

import threading

import pytest

from prefault.guest import port
from prefault.guest.program import Program, Read, Report
from prefault.machine import MemoryRegion, Resident, Userfault, UserfaultMode
from prefault.spec import open_spec, steps
from prefault.spec.steps import Violation
from prefault.spec.vm import SpecVm

CODE, DATA, PAGE = 0x4000_0000, 0x1_0000_0000, 0x1000


@pytest.fixture
def vm() -> SpecVm:
    made = open_spec().create_vm()
    made.set_user_memory_region(MemoryRegion(0, CODE, 2 << 20, resident=Resident.WRITE))
    made.set_user_memory_region(MemoryRegion(1, DATA, 4 * PAGE))
    return made


def test_a_wait_that_nobody_ends_is_a_deadlock(vm: SpecVm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_PATIENCE", 0.1)
    with (
        vm.handle_userfaults(DATA, PAGE, UserfaultMode.MISSING, lambda userfault, gpa, write: None),
        pytest.raises(Violation, match=r"deadlock: uffd\.wait"),
    ):
        vm.create_vcpu().pre_fault_memory_once(DATA, PAGE)


def test_a_guest_waits_on_after_a_signal(vm: SpecVm) -> None:
    asked: list[int] = []

    def handler(userfault: Userfault, gpa: int, write: bool) -> None:
        asked.append(gpa)
        if len(asked) == 1:
            userfault.interrupt()
        else:
            userfault.copy(gpa, b"\5" * PAGE)

    program = Program((Read(DATA, 1), Report()), CODE)
    vm.install(program)
    vcpu = vm.create_vcpu()
    vcpu.load(program)
    with vm.handle_userfaults(DATA, PAGE, UserfaultMode.MISSING, handler):
        assert next(port.events(vcpu)) == port.Reported(5)
    assert asked == [DATA, DATA]


def test_closing_lets_those_go_on_who_wait(vm: SpecVm) -> None:
    waiting = threading.Event()
    vcpu = vm.create_vcpu()
    userfault = vm.handle_userfaults(
        DATA, 4 * PAGE, UserfaultMode.MISSING, lambda userfault, gpa, write: waiting.set()
    )
    thread = threading.Thread(target=vcpu.pre_fault_memory, args=(DATA, 4 * PAGE))
    thread.start()
    waiting.wait(5)
    userfault.close()
    thread.join(5)
    assert not thread.is_alive()
    assert [(leaf.size, leaf.writable) for leaf in vm.stage2()] == [(4 * PAGE, False)]


def test_a_handler_that_fails_is_not_hushed_up(vm: SpecVm) -> None:
    def handler(userfault: Userfault, gpa: int, write: bool) -> None:
        raise ValueError("this handler has a bug")

    userfault = vm.handle_userfaults(DATA, PAGE, UserfaultMode.MISSING, handler)
    vm.create_vcpu().pre_fault_memory(DATA, PAGE)
    with pytest.raises(ValueError, match="has a bug"):
        userfault.close()
