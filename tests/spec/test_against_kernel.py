# SPDX-License-Identifier: Apache-2.0
"""What the processor and the host do, where random programs have shown the kernel to do otherwise."""

from __future__ import annotations

import pytest

from prefault.errors import CapabilityMissing, GuestFailed, PrefaultError, UsageError
from prefault.guest import port
from prefault.guest.program import Execute, Program
from prefault.machine import Access, Advice, Backing, MemoryRegion, Resident, Vm
from prefault.spec import open_spec

CODE, DATA, BLOCK = 0x4000_0000, 0x1_0000_0000, 2 << 20


def test_an_undefined_instruction_leaves_the_fault_address_as_it_was() -> None:
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(0, CODE, BLOCK, resident=Resident.WRITE))
        vcpu = vm.create_vcpu()
        program = Program((Execute(DATA),))
        vm.install(program)
        vcpu.load(program)
        with pytest.raises(GuestFailed) as abort:
            port.proceed(vcpu)
        assert abort.value.far == DATA
        vm.set_user_memory_region(MemoryRegion(1, 2 * DATA, BLOCK, resident=Resident.WRITE))
        program = Program((Execute(2 * DATA),), CODE + 0x10000)
        vm.install(program)
        vcpu.load(program)
        with pytest.raises(GuestFailed) as undefined:
            port.proceed(vcpu)
        assert (undefined.value.elr, undefined.value.far) == (2 * DATA, DATA)


@pytest.mark.parametrize("advice", [Advice.DONTNEED, Advice.POPULATE_READ, Advice.POPULATE_WRITE])
def test_a_device_is_neither_dropped_nor_populated(advice: Advice) -> None:
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK, Backing.DEVICE))
        vm.create_vcpu().pre_fault_memory(DATA, BLOCK)
        before = vm.stage2()
        with pytest.raises(CapabilityMissing):
            vm.advise(DATA, 0x1000, advice)
        assert vm.stage2() == before


def test_populating_says_whether_the_range_or_the_right_is_missing() -> None:
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK))
        vm.unmap(DATA, 0x1000)
        vm.protect(DATA + 0x1000, 0x1000, Access.READ)
        vm.advise(DATA + 0x1000, 0x1000, Advice.POPULATE_READ)
        with pytest.raises(CapabilityMissing, match="Cannot allocate memory"):
            vm.advise(DATA, 0x1000, Advice.POPULATE_READ)
        with pytest.raises(CapabilityMissing, match="Invalid argument"):
            vm.advise(DATA + 0x1000, 0x1000, Advice.POPULATE_WRITE)


def test_no_hole_is_punched_beyond_the_end_of_a_slot() -> None:
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK, Backing.GUEST_MEMFD))
        vm.create_vcpu().pre_fault_memory(DATA, BLOCK)
        before = vm.stage2()
        with pytest.raises(UsageError):
            vm.advise(DATA + 0x1000, BLOCK, Advice.REMOVE)
        assert vm.stage2() == before


def test_a_mapping_without_room_for_a_huge_page_cannot_be_collapsed() -> None:
    region = MemoryRegion(1, DATA, BLOCK + 0x5000, Backing.THP, Resident.READ, hva_offset=0x1000)
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(region)
        with pytest.raises(CapabilityMissing, match="Invalid argument"):
            vm.advise(DATA, BLOCK, Advice.COLLAPSE)


def test_a_protection_that_fails_at_its_end_has_cut_the_mapping_at_its_start() -> None:
    region = MemoryRegion(1, DATA, BLOCK + 0x5000, Backing.HUGETLB, page_size=64 << 10)
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(region)
        count = len(kvm.host.mm.vmas)
        with pytest.raises(PrefaultError, match="Invalid argument"):
            vm.protect(DATA + 0x1F0000, 0x15000, Access.NONE)
        assert len(kvm.host.mm.vmas) == count + 1


def test_an_unmapping_that_fails_at_its_end_has_told_of_the_cut_at_its_start() -> None:
    region = MemoryRegion(1, DATA, BLOCK + 0x5000, Backing.HUGETLB, Resident.WRITE, page_size=64 << 10)
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(region)
        vm.create_vcpu().pre_fault_memory(DATA, 0x3000)
        with pytest.raises(PrefaultError, match="Invalid argument"):
            vm.unmap(DATA + 0x1F0000, 0x1000)
        assert vm.stage2() == []


def test_the_fault_address_before_the_first_abort_is_that_of_the_reset() -> None:
    with open_spec() as kvm, kvm.create_vm() as vm:
        assert vm.create_vcpu().get_register("far_el1") == 0x1DE7_EC7E_DBAD_C0DE


def young(vm: Vm) -> list[tuple[int, int]]:
    """Runs of pages after DATA that are young: (first, how many)."""
    return [((leaf.ipa - DATA) // 0x1000, leaf.size // 0x1000) for leaf in vm.stage2() if leaf.accessed]


def test_a_thp_is_aged_by_its_first_page_only() -> None:
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK, Backing.THP, Resident.WRITE))
        vm.create_vcpu().pre_fault_memory(DATA, BLOCK)
        vm.age(DATA + 0x1000, 0x1000)
        assert young(vm) == [(0, 512)]
        vm.age(DATA, 0x1000)
        assert young(vm) == []


def test_a_thp_that_is_mapped_by_pages_is_aged_as_a_whole() -> None:
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK, Backing.THP, Resident.WRITE))
        vm.protect(DATA + 0x5000, 0x1000, Access.READ)
        vm.create_vcpu().pre_fault_memory(DATA, 0x10000)
        vm.age(DATA + 0x1000, 0x1000)
        assert sum(count for _, count in young(vm)) == 16
        vm.age(DATA, 0x1000)
        assert young(vm) == []


def test_a_thp_is_split_when_a_page_of_it_migrates() -> None:
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK, Backing.THP, Resident.WRITE))
        vm.write_memory(DATA, b"x" * 0x8000)
        vcpu = vm.create_vcpu()
        vcpu.pre_fault_memory(DATA, BLOCK)
        vm.advise(DATA + 0x3000, 0x1000, Advice.SOFT_OFFLINE)
        assert vm.stage2() == []
        vcpu.pre_fault_memory(DATA, 0x8000)
        vm.age(DATA, 0x1000)
        assert young(vm) == [(1, 7)]


@pytest.mark.parametrize("page", [0x3000, 0x9000])
def test_what_is_all_zero_of_a_thp_that_is_split_is_the_zero_page(page: int) -> None:
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK, Backing.THP, Resident.WRITE))
        vm.write_memory(DATA, b"x" * 0x8000)
        vm.advise(DATA + page, 0x1000, Advice.SOFT_OFFLINE)
        vm.create_vcpu().pre_fault_memory(DATA, 0x10000)
        assert [(leaf.size, leaf.writable) for leaf in vm.stage2()] == [(0x8000, True), (0x8000, False)]


def test_a_page_of_hugetlb_migrates_as_a_whole() -> None:
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK, Backing.HUGETLB, Resident.WRITE))
        vm.write_memory(DATA + 0x7000, b"kept")
        vcpu = vm.create_vcpu()
        vcpu.pre_fault_memory(DATA, BLOCK)
        vm.advise(DATA + 0x3000, 0x1000, Advice.SOFT_OFFLINE)
        assert vm.stage2() == []
        vcpu.pre_fault_memory(DATA, BLOCK)
        assert young(vm) == [(0, 512)]
        assert vm.read_memory(DATA + 0x7000, 4) == b"kept"


@pytest.mark.parametrize(
    ("backing", "error"), [(Backing.PRIVATE, "State not recoverable"), (Backing.THP, "Input/output error")]
)
def test_the_zero_page_does_not_migrate(backing: Backing, error: str) -> None:
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK, backing))
        with pytest.raises(CapabilityMissing, match=error):
            vm.advise(DATA, 0x1000, Advice.SOFT_OFFLINE)


@pytest.mark.parametrize(
    ("backing", "written", "told"),
    [
        (Backing.FILE_PRIVATE, False, False),
        (Backing.FILE_PRIVATE, True, True),
        (Backing.PRIVATE, False, False),
        (Backing.PRIVATE, True, True),
        (Backing.THP, False, True),
        (Backing.SHARED, True, False),
    ],
)
def test_a_fork_tells_of_mappings_with_pages_of_their_own(
    backing: Backing, written: bool, told: bool
) -> None:
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK, backing))
        if written:
            vm.write_memory(DATA + 0x8000, b"own")
        vm.create_vcpu().pre_fault_memory(DATA, 0x4000)
        with vm.fork():
            assert bool(vm.stage2()) != told


def test_making_pages_mergeable_cuts_the_mapping() -> None:
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK, resident=Resident.WRITE))
        vcpu = vm.create_vcpu()
        vcpu.pre_fault_memory(DATA, BLOCK)
        vm.advise(DATA + 0x8000, 0x4000, Advice.MERGEABLE)
        assert vm.stage2() == []
        vcpu.pre_fault_memory(DATA, BLOCK)
        vm.advise(DATA + 0x9000, 0x1000, Advice.MERGEABLE)  # which it is
        assert young(vm) == [(0, 512)]


@pytest.mark.parametrize("advice", [Advice.SOFT_OFFLINE, Advice.HWPOISON])
def test_memory_that_is_not_there_neither_migrates_nor_is_poisoned(advice: Advice) -> None:
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK))
        vm.unmap(DATA, 0x1000)
        vm.protect(DATA + 0x1000, 0x1000, Access.NONE)
        for page in (DATA, DATA + 0x1000):
            with pytest.raises(CapabilityMissing, match="Bad address"):
                vm.advise(page, 0x1000, advice)
