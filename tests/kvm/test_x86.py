# SPDX-License-Identifier: Apache-2.0
"""What x86 guests cannot have is missing, not wrong."""

from __future__ import annotations

import ctypes
import os
import platform

import pytest

from prefault.abi import x86
from prefault.errors import CapabilityMissing
from prefault.kvm import open_host
from prefault.kvm import system as kvm_system
from prefault.kvm.x86 import X86Kvm, X86Vm
from prefault.machine import VcpuConfig, VmConfig

PAGE = os.sysconf("SC_PAGE_SIZE")


class FakeKvm(X86Kvm):
    """Every ioctl succeeds; VMs and vCPUs are files."""

    def try_ioctl(self, name: str, argument: int | ctypes.Structure = 0) -> tuple[int, int]:
        if name == "KVM_GET_MSR_INDEX_LIST" and isinstance(argument, ctypes.Structure):
            assert isinstance(argument, x86.kvm_msr_list)
            argument.nmsrs = 2
        elif name == "KVM_GET_MSR_INDEX_LIST":
            assert isinstance(argument, int)
            (ctypes.c_uint32 * 3).from_address(argument)[:] = [2, 0x10, 0xC000_0080]
        elif name == "KVM_CREATE_VM":
            return os.memfd_create("vm"), 0
        return PAGE, 0


@pytest.mark.parametrize(
    "config", [VmConfig(ipa_bits=40), VmConfig(protected=True), VmConfig(mte=True)], ids=str
)
def test_a_vm_has_nothing_of_arm64s(config: VmConfig) -> None:
    with pytest.raises(CapabilityMissing, match="arm64"):
        FakeKvm(-1).create_vm(config)


@pytest.mark.parametrize("config", [VcpuConfig(el2=True), VcpuConfig(initialised=False)], ids=str)
def test_a_vcpu_has_nothing_of_arm64s(config: VcpuConfig) -> None:
    with FakeKvm(-1).create_vm() as vm, pytest.raises(CapabilityMissing):
        vm.create_vcpu(config)


def test_tables_are_missing_and_said_to_be() -> None:
    kvm = FakeKvm(-1)
    assert not kvm.shows_stage2
    with kvm.create_vm() as vm:
        for look in (vm.stage2, vm.nested_stage2, vm.ptdump):
            with pytest.raises(CapabilityMissing, match="does not show"):
                look()


def test_registers_that_never_rest_are_left_out() -> None:
    assert FakeKvm(-1).model_specific_registers() == (0xC000_0080,)


@pytest.mark.parametrize(("machine", "kind"), [("x86_64", X86Kvm), ("aarch64", kvm_system.Kvm)])
def test_the_host_decides_whose_guests_there_are(
    monkeypatch: pytest.MonkeyPatch, machine: str, kind: type[object]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(kvm_system, "open_device", lambda path: os.memfd_create("kvm"))
    monkeypatch.setattr("prefault.kvm.x86.open_device", lambda path: os.memfd_create("kvm"))
    monkeypatch.setattr(kvm_system.AnyKvm, "check_version", lambda self, path: None)
    with open_host() as kvm:
        assert isinstance(kvm, kind)


def test_closing_a_vm_closes_it() -> None:
    vm = FakeKvm(-1).create_vm()
    assert isinstance(vm, X86Vm)
    vm.close()
    assert vm.fd == -1
