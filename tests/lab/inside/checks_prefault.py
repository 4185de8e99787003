# SPDX-License-Identifier: Apache-2.0
"""What must hold of pre-faulting through the back end: no fault is left, and errors are told."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from prefault.abi import constants
from prefault.abi.structures import kvm_enable_cap
from prefault.errors import KvmError
from prefault.guest import port
from prefault.guest.program import DeviceRead, Marker, Read, Report, Walk, Write
from prefault.kvm import mapping
from prefault.machine import Backing, Failed, MmioExit, PreFaultProgress, Resident, VcpuConfig
from tests.lab.inside.checks import Checks, main
from tests.lab.inside.guests import (
    DATA,
    DEVICE,
    LOG,
    MIB,
    PAGE,
    READONLY,
    data_region,
    finish,
    make_vm,
    start,
    until_exit,
)

checks = Checks()
SIZE = 4 * MIB


@checks.each(Backing)
def pre_faulted_memory_costs_the_guest_no_fault(backing: Backing) -> None:
    with make_vm(SIZE, backing, resident=Resident.WRITE) as vm:
        vcpu = start(vm, Marker(0), Walk(DATA, SIZE, PAGE, 500), Marker(1))
        assert until_exit(vcpu) == port.AtMarker(0)
        vcpu.pre_fault_memory(DATA, SIZE)
        with vm.count_faults() as faults:
            assert until_exit(vcpu) == port.AtMarker(1)
        assert faults.total == 0, faults


@checks.each(((1, True, 64), (2, True, 32), (4, True, 64), (4, False, 32), (8, False, 64)))
def a_pending_device_read_survives_pre_faulting(width: int, signed: bool, bits: int) -> None:
    with make_vm(SIZE, Backing.SHARED) as vm:
        vcpu = start(vm, DeviceRead(DEVICE, width, signed, bits), Report())
        assert until_exit(vcpu) == MmioExit(DEVICE, width, False)
        vcpu.pre_fault_memory(DATA, SIZE)
        vcpu.complete_mmio((1 << 8 * width) - 2)
        expected = (1 << bits) - 2 if signed else (1 << 8 * width) - 2
        assert until_exit(vcpu) == port.Reported(expected)


@checks
def pre_faulting_before_the_first_run_works() -> None:
    with make_vm(SIZE, resident=Resident.WRITE) as vm:
        vcpu = vm.create_vcpu()
        vcpu.pre_fault_memory(DATA, SIZE)
        assert sum(leaf.size for leaf in vm.stage2()) == SIZE


@checks
def nothing_becomes_dirty() -> None:
    with make_vm(SIZE, resident=Resident.WRITE, flags=LOG) as vm:
        vm.create_vcpu().pre_fault_memory(DATA, SIZE)
        assert vm.get_dirty_log(1) == []
        assert not any(leaf.writable for leaf in vm.stage2())


RING = 0x1_0000
RING_OFFSET = 64 * PAGE
"""KVM_DIRTY_LOG_PAGE_OFFSET of arm64, in the mapping of a vCPU."""


def _ring(vcpu_fd: int) -> list[tuple[int, int]]:
    """Slots and pages that a vCPU's dirty ring has: struct kvm_dirty_gfn, flags 1 for those that are new."""
    with mmap.mmap(vcpu_fd, RING, offset=RING_OFFSET) as ring:
        entries = struct.iter_unpack("<IIQ", ring[:])
        return [(slot, offset) for flags, slot, offset in entries if flags & 1]


@checks
def a_dirty_ring_without_a_bitmap_has_what_the_guest_wrote_alone() -> None:
    with make_vm(SIZE, Backing.SHARED, resident=Resident.WRITE) as vm:
        arguments = (ctypes.c_uint64 * 4)(RING)
        vm.ioctl("KVM_ENABLE_CAP", kvm_enable_cap(constants.KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 0, arguments))
        vm.set_user_memory_region(data_region(SIZE, Backing.SHARED, resident=Resident.WRITE, flags=LOG))
        vcpu = start(vm, Marker(0), Write(DATA + 3 * PAGE, 1), Marker(1))
        assert until_exit(vcpu) == port.AtMarker(0)
        before = _ring(vcpu.fd)
        vcpu.pre_fault_memory(DATA, SIZE)
        assert _ring(vcpu.fd) == before
        assert not any(leaf.writable for leaf in vm.stage2() if leaf.ipa >= DATA)
        assert until_exit(vcpu) == port.AtMarker(1)
        assert _ring(vcpu.fd) == [*before, (1, 3)]


@checks
def a_read_only_slot_is_mapped_read_only() -> None:
    with make_vm(SIZE, resident=Resident.WRITE, flags=READONLY) as vm:
        vm.create_vcpu().pre_fault_memory(DATA, SIZE)
        assert [leaf.writable for leaf in vm.stage2()] == [False]


@checks
def where_no_slot_is_says_enoent_with_the_place() -> None:
    with make_vm(SIZE) as vm:
        vcpu = vm.create_vcpu()
        try:
            vcpu.pre_fault_memory(DATA, SIZE + 2 * PAGE)
        except KvmError as error:
            assert (error.errno, error.gpa, error.size) == (errno.ENOENT, DATA + SIZE, 2 * PAGE), error
            assert "memslot" in str(error), error
            return
        raise AssertionError("accepted")


_libc = ctypes.CDLL(None, use_errno=True)
_NR_MEMFD_SECRET = 447


def _put_secret_memory_at(hva: int) -> None:
    fd = _libc.syscall(_NR_MEMFD_SECRET, 0)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    os.ftruncate(fd, PAGE)
    mapping.map_at(hva, PAGE, shared=True, fd=fd)
    ctypes.memset(hva, 0x5A, PAGE)
    os.close(fd)


@checks
def secret_memory_is_no_more_the_guests_than_by_its_own_faults() -> None:
    secret = DATA + SIZE // 2
    with make_vm(SIZE, resident=Resident.WRITE) as vm:
        _put_secret_memory_at(vm.hva_of(secret))
        try:
            vm.create_vcpu().pre_fault_memory(DATA, SIZE)
        except KvmError as error:
            assert (error.errno, error.gpa) == (errno.EFAULT, secret), error
        else:
            raise AssertionError("secret memory was pre-faulted")
        assert sum(leaf.size for leaf in vm.stage2()) == SIZE // 2
        vcpu = start(vm, Read(secret), Marker(0))
        assert until_exit(vcpu) == Failed(errno.EFAULT)


@checks.each(
    (
        (DATA + 1, PAGE, 0),
        (DATA, PAGE + 1, 0),
        (DATA, 0, 0),
        (DATA, PAGE, 1),
        (-PAGE & (1 << 64) - 1, 2 * PAGE, 0),
    )
)
def a_bad_range_is_einval_and_untouched(gpa: int, size: int, flags: int) -> None:
    with make_vm(SIZE) as vm:
        progress = vm.create_vcpu().pre_fault_memory_once(gpa, size, flags)
        assert progress == PreFaultProgress(gpa, size, errno.EINVAL), progress


@checks
def an_uninitialised_vcpu_says_enoexec() -> None:
    with make_vm(SIZE) as vm:
        vcpu = vm.create_vcpu(VcpuConfig(initialised=False))
        assert vcpu.pre_fault_memory_once(DATA, SIZE).errno == errno.ENOEXEC


def _in_threads(*tasks: Callable[[], object]) -> None:
    """Do tasks at once; the first error, if there is one."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()


@checks
def two_vcpus_pre_fault_one_range_at_once() -> None:
    with make_vm(SIZE, resident=Resident.WRITE) as vm:
        vcpus = [vm.create_vcpu() for _ in range(2)]
        _in_threads(*(partial(vcpu.pre_fault_memory, DATA, SIZE) for vcpu in vcpus))
        assert [(leaf.ipa, leaf.size) for leaf in vm.stage2()] == [(DATA, SIZE)]


@checks
def memory_is_pre_faulted_while_another_vcpu_walks_it() -> None:
    with make_vm(SIZE, resident=Resident.WRITE) as vm:
        helper = vm.create_vcpu()
        walk = Walk(DATA, SIZE, 64, 500)
        vcpu = start(vm, walk, Report())
        values: list[int] = []
        _in_threads(lambda: values.extend(finish(vcpu)), lambda: helper.pre_fault_memory(DATA, SIZE))
        assert values == [0]
        words = memoryview(vm.read_memory(DATA, SIZE)).cast("Q")[::8].tolist()
        addresses = range(DATA, DATA + SIZE, 64)
        assert all(not found or found == gpa for gpa, found in zip(addresses, words, strict=True))
        assert sum(map(bool, words)) == len(words) // 2


if __name__ == "__main__":
    main(checks)
