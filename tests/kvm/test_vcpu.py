# SPDX-License-Identifier: Apache-2.0
"""Exits decoded from a kvm_run that the test fills in."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.abi import constants, structures
from prefault.errors import CapabilityMissing, UsageError
from prefault.guest.program import Argument, EnterL2, Program, Read
from prefault.kvm.vcpu import Vcpu, decode
from prefault.machine import (
    Exit,
    Failed,
    Interrupted,
    MemoryFault,
    MmioExit,
    OtherExit,
    VcpuConfig,
)

PAGE = os.sysconf("SC_PAGE_SIZE")


def mmio(gpa: int, data: bytes, is_write: bool) -> structures.kvm_run:
    run = structures.kvm_run(exit_reason=constants.KVM_EXIT_MMIO)
    run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = gpa, len(data), is_write
    run.mmio.data[: len(data)] = data
    return run


@given(
    gpa=st.integers(0, (1 << 52) - 1),
    width=st.sampled_from([1, 2, 4, 8]),
    data=st.binary(min_size=8, max_size=8),
    is_write=st.booleans(),
)
def test_mmio_has_the_bytes_of_its_width(gpa: int, width: int, data: bytes, is_write: bool) -> None:
    run = mmio(gpa, data[:width], is_write)
    value = int.from_bytes(data[:width], "little") if is_write else 0
    assert decode(run, 0) == MmioExit(gpa, width, is_write, value)


def memory_fault() -> structures.kvm_run:
    run = structures.kvm_run(exit_reason=constants.KVM_EXIT_MEMORY_FAULT)
    run.memory_fault.gpa, run.memory_fault.size, run.memory_fault.flags = 0x1000, PAGE, 8
    return run


@pytest.mark.parametrize("error", [errno.EFAULT, constants.EHWPOISON])
def test_a_memory_fault_keeps_its_errno(error: int) -> None:
    assert decode(memory_fault(), error) == MemoryFault(0x1000, PAGE, 8, error)


@pytest.mark.parametrize(
    ("run", "error", "expected"),
    [
        (memory_fault(), errno.EINTR, Interrupted()),
        (memory_fault(), errno.ENOEXEC, Failed(errno.ENOEXEC)),
        (structures.kvm_run(exit_reason=constants.KVM_EXIT_MMIO), errno.EFAULT, Failed(errno.EFAULT)),
        (structures.kvm_run(exit_reason=5), 0, OtherExit(5, "KVM_EXIT_HLT")),
        (structures.kvm_run(exit_reason=999), 0, OtherExit(999, "999")),
    ],
)
def test_errno_comes_before_the_exit_reason(run: structures.kvm_run, error: int, expected: Exit) -> None:
    assert decode(run, error) == expected


def test_a_system_event_has_its_data() -> None:
    run = structures.kvm_run(exit_reason=constants.KVM_EXIT_SYSTEM_EVENT)
    run.system_event.type, run.system_event.ndata = constants.KVM_SYSTEM_EVENT_RESET, 1
    run.system_event.data[0] = 7
    assert decode(run, 0) == OtherExit(24, "KVM_EXIT_SYSTEM_EVENT", (2, 7))


@pytest.fixture
def vcpu() -> Iterator[Vcpu]:
    """A vCPU over a file: it has a run page, and no ioctl works."""
    fd = os.memfd_create("vcpu")
    os.ftruncate(fd, PAGE)
    made = Vcpu(fd, PAGE, VcpuConfig(), lambda _: None, lambda: False)
    yield made
    made.close()


def test_without_the_capability_nothing_is_tried(vcpu: Vcpu) -> None:
    with pytest.raises(CapabilityMissing, match="KVM_CAP_PRE_FAULT_MEMORY"):
        vcpu.pre_fault_memory(0, PAGE)


def test_completing_no_read_is_refused(vcpu: Vcpu) -> None:
    with pytest.raises(UsageError, match="no MMIO read"):
        vcpu.complete_mmio(1)


@pytest.mark.parametrize("arguments", [(), (1,) * 9])
def test_arguments_must_be_as_many_as_the_program_uses(vcpu: Vcpu, arguments: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="1 of 8"):
        vcpu.load(Program((Read(Argument(0)),)), arguments)


def test_a_nested_program_needs_el2(vcpu: Vcpu) -> None:
    with pytest.raises(UsageError, match="el2=True"):
        vcpu.load(Program((EnterL2(()),)))


def test_an_unknown_register_is_named(vcpu: Vcpu) -> None:
    with pytest.raises(UsageError, match="x31"):
        vcpu.get_register("x31")
