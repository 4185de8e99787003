# SPDX-License-Identifier: Apache-2.0
"""Every wrapper, driven on a bad descriptor, says EBADF. Runs anywhere."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from prefault.abi import structures
from prefault.errors import KvmError
from prefault.kvm import device
from prefault.kvm.descriptor import Descriptor
from prefault.kvm.device import Device
from prefault.kvm.system import Kvm
from prefault.kvm.vcpu import Vcpu
from prefault.kvm.vm import Vm
from prefault.machine import Failed, MemoryRegion, VcpuConfig, VmConfig

PAGE = os.sysconf("SC_PAGE_SIZE")


def bad_vm() -> Vm:
    return Vm(-1, VmConfig(gic=False), PAGE, PAGE)


@pytest.fixture
def bad_vcpu() -> Vcpu:
    """A vCPU over a file that is no vCPU, closed: what is left of one after ``close``."""
    fd = os.memfd_create("vcpu")
    os.ftruncate(fd, PAGE)
    vcpu = Vcpu(fd, PAGE, VcpuConfig(), lambda _: None, lambda: True)
    vcpu.close()
    return vcpu


@pytest.mark.parametrize(
    "use",
    [
        lambda: Kvm(-1).check_extension(1),
        lambda: Kvm(-1).create_vm_descriptor(0),
        lambda: bad_vm().check_extension(1),
        lambda: bad_vm().set_user_memory_region(MemoryRegion(0, 0, 1 << 20)),
        lambda: bad_vm().set_user_memory_region(MemoryRegion(0, 0, 0)),
        lambda: bad_vm().create_vcpu(),
        lambda: Device(-1).set_attribute(0, 0, 1),
        lambda: device.initialise_gic(Device(-1)),
    ],
)
def test_a_bad_descriptor_is_ebadf(use: Callable[[], object]) -> None:
    with pytest.raises(KvmError) as caught:
        use()
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize(
    "use",
    [
        lambda vcpu: vcpu.get_register("pc"),
        lambda vcpu: vcpu.set_register("pc", 0),
        lambda vcpu: vcpu.pre_fault_memory(0, PAGE),
        lambda vcpu: vcpu.initialise(structures.kvm_vcpu_init()),
    ],
)
def test_a_closed_vcpu_is_ebadf(use: Callable[[Vcpu], object], bad_vcpu: Vcpu) -> None:
    with pytest.raises(KvmError) as caught:
        use(bad_vcpu)
    assert caught.value.errno == errno.EBADF


def test_a_closed_vcpu_does_not_run(bad_vcpu: Vcpu) -> None:
    assert bad_vcpu.run() == Failed(errno.EBADF)
    assert bad_vcpu.pre_fault_memory_once(PAGE, PAGE).errno == errno.EBADF


def test_a_file_that_is_no_kvm_is_enotty() -> None:
    with Descriptor(os.memfd_create("no kvm")) as file, pytest.raises(KvmError) as caught:
        file.ioctl("KVM_RUN")
    assert caught.value.errno == errno.ENOTTY
    assert caught.value.ioctl == "KVM_RUN"


def test_a_descriptor_is_closed_once() -> None:
    file = Descriptor(os.memfd_create("once"))
    number = file.fd
    file.close()
    again = os.dup(0)
    try:
        assert again == number
        file.close()
        os.fstat(again)
    finally:
        os.close(again)
