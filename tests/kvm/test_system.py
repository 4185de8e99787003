# SPDX-License-Identifier: Apache-2.0
"""Opening KVM where it is not, may not be had, or is of no use; probing all the same; closing order."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest

from prefault.abi import constants
from prefault.errors import CapabilityMissing, KvmError, KvmMissing, UsageError
from prefault.kvm import mapping, memory, open_kvm, probe
from prefault.kvm.device import Device
from prefault.kvm.system import Kvm
from prefault.kvm.vm import Vm
from prefault.machine import Backing, MemoryRegion, VcpuConfig, VmConfig

PAGE = os.sysconf("SC_PAGE_SIZE")


def test_no_device_says_where_guests_can_be_had(tmp_path: Path) -> None:
    with pytest.raises(KvmMissing, match="lab"):
        open_kvm(str(tmp_path / "kvm"))


def test_no_permission_says_which_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KvmMissing, match="group kvm"):
        open_kvm()


def test_a_file_that_is_no_kvm_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(KvmMissing, match="not the KVM"):
        open_kvm(str(tmp_path / "kvm"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_guests_are_refused_where_the_cpu_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(UsageError, match="x86_64"):
        Kvm(-1).create_vm()


class FakeKvm(Kvm):
    """Answers like a KVM of 48 bits that makes no VM."""

    def try_ioctl(self, name: str, argument: int | ctypes.Structure = 0) -> tuple[int, int]:
        if name == "KVM_CREATE_VM":
            return -1, errno.EINVAL
        return (48, 0) if argument == constants.KVM_CAP_ARM_VM_IPA_SIZE else (PAGE, 0)


def test_an_ipa_space_beyond_the_limit_is_told_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(UsageError, match="52 bits is more than this host's 48"):
        FakeKvm(-1).create_vm(VmConfig(ipa_bits=52))


def test_protected_vms_that_cannot_be_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(CapabilityMissing, match=r"kvm-arm\.mode=protected"):
        FakeKvm(-1).create_vm(VmConfig(protected=True))


def test_probing_works_without_kvm(tmp_path: Path) -> None:
    found = probe.facts(str(tmp_path / "kvm"))
    assert not found.kvm and not found.guests and found.page_size == PAGE
    assert found.missing == (found.kvm_error,) and "lab" in found.kvm_error


def test_probing_this_host_says_what_is_missing_or_nothing_is() -> None:
    found = probe.facts()
    assert found.machine == platform.machine()
    works = any(kind.pre_fault_memory for kind in found.vm_kinds)
    assert works or found.missing


class FakeVm(Vm):
    """Every ioctl succeeds; vCPUs are files of one page."""

    def try_ioctl(self, name: str, argument: int | ctypes.Structure = 0) -> tuple[int, int]:
        if name != "KVM_CREATE_VCPU":
            return 0, 0
        fd = os.memfd_create("vcpu")
        os.ftruncate(fd, PAGE)
        return fd, 0


def fake_vm() -> FakeVm:
    return FakeVm(os.memfd_create("vm"), VmConfig(gic=False), PAGE, PAGE)


def test_a_vm_closes_vcpus_then_devices_then_itself_then_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    vm = fake_vm()
    vm.set_user_memory_region(MemoryRegion(0, 0, PAGE))
    vcpu = vm.create_vcpu(VcpuConfig(initialised=False))
    vm._gic = Device(os.memfd_create("gic"))
    names = {vcpu.fd: "vcpu", vm._gic.fd: "gic", vm.fd: "vm"}
    order: list[str] = []
    close, unmap = os.close, mapping.unmap

    def note_close(fd: int) -> None:
        order.append(names[fd])
        close(fd)

    def note_unmap(hva: int, size: int) -> None:
        order.append("unmap")
        unmap(hva, size)

    monkeypatch.setattr(os, "close", note_close)
    monkeypatch.setattr(mapping, "unmap", note_unmap)
    vm.close()
    vm.close()
    assert order == ["unmap", "vcpu", "gic", "vm", "unmap"]


def test_memory_outlives_its_slot_until_the_vm_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[memory.Memory] = []
    create = memory.create

    def remember(region: MemoryRegion, *arguments: int) -> memory.Memory:
        made.append(create(region, *arguments))
        return made[-1]

    monkeypatch.setattr(memory, "create", remember)
    with fake_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(3, 0, PAGE))
        vm.write_memory(8, b"here")
        vm.set_user_memory_region(MemoryRegion(3, 0, 0))
        with pytest.raises(UsageError, match="no memslot"):
            vm.read_memory(8, 4)
        assert made[0].read(8, 4) == b"here"
    assert made[0]._pieces == []


def test_a_slot_that_changes_its_flags_or_place_keeps_its_memory() -> None:
    with fake_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(3, 0, PAGE))
        vm.write_memory(0, b"here")
        vm.set_user_memory_region(MemoryRegion(3, 4 * PAGE, PAGE))
        assert vm.read_memory(4 * PAGE, 4) == b"here"


def test_a_slot_without_a_dirty_log_has_none_to_give() -> None:
    with fake_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(3, 0, PAGE))
        with pytest.raises(UsageError, match="LOG_DIRTY_PAGES"):
            vm.get_dirty_log(3)


class TaglessVm(FakeVm):
    """Guests can have tags, but not in whatever memory is asked for."""

    def try_ioctl(self, name: str, argument: int | ctypes.Structure = 0) -> tuple[int, int]:
        if name == "KVM_SET_USER_MEMORY_REGION":
            return -1, errno.EINVAL
        return int(name == "KVM_CHECK_EXTENSION"), 0


def test_hugetlb_pages_that_cannot_have_tags_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    create = memory.create

    def without_huge_pages(region: MemoryRegion, *arguments: int) -> memory.Memory:
        return create(replace(region, backing=Backing.PRIVATE), *arguments)

    monkeypatch.setattr(memory, "create", without_huge_pages)
    config = VmConfig(gic=False, mte=True)
    with TaglessVm(os.memfd_create("vm"), config, PAGE, PAGE) as vm:
        with pytest.raises(CapabilityMissing, match="no memory tags"):
            vm.set_user_memory_region(MemoryRegion(3, 0, PAGE, Backing.HUGETLB))
        with pytest.raises(KvmError, match="EINVAL"):
            vm.set_user_memory_region(MemoryRegion(3, 0, PAGE))


def test_a_signal_does_not_keep_a_vm_from_being_made() -> None:
    answers = [(-1, errno.EINTR), (-1, errno.EINTR), (7, 0)]

    class InterruptedKvm(Kvm):
        def try_ioctl(self, name: str, argument: int | ctypes.Structure = 0) -> tuple[int, int]:
            return answers.pop(0)

    assert InterruptedKvm(-1).create_vm_descriptor(0) == 7
