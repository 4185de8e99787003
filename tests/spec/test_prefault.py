# SPDX-License-Identifier: Apache-2.0
"""Laws of KVM_PRE_FAULT_MEMORY on the spec that no scenario over both back ends can state."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefault.abi.constants import KVM_CAP_PRE_FAULT_MEMORY
from prefault.errors import CapabilityMissing
from prefault.guest import port
from prefault.guest.program import EnterL2, L2Mapping, Marker, Program, Read, Walk, Write
from prefault.machine import (
    GUEST_MEMORY,
    Backing,
    Leaf,
    MemoryRegion,
    Resident,
    SlotFlags,
    VcpuConfig,
    VmConfig,
)
from prefault.scenarios.walk import walk
from prefault.scenarios.walk_result import WalkConfig
from prefault.spec import HostConfig, SpecKvm, open_spec, steps
from prefault.spec.state import INVALID

CODE, DATA, PAGE, BLOCK = 0x4000_0000, 0x1_0000_0000, 0x1000, 2 << 20


class EveryStep:
    """A scheduler that lets the only actor go on, so that nothing is left out for speed."""

    actor = 0

    def step(self, name: str) -> None:
        pass

    def mark(self, name: str) -> None:
        pass

    def wait(self, name: str, ready: Callable[[], bool]) -> None:
        assert ready()


@pytest.fixture
def spec() -> SpecKvm:
    return open_spec()


def outcome(
    region: MemoryRegion, ranges: list[tuple[int, int]], *, each_step: bool
) -> tuple[list[object], list[Leaf]]:
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(region)
        vcpu = vm.create_vcpu()
        vm.write_memory(DATA + 3 * PAGE, b"x")
        steps.install(EveryStep() if each_step else None)
        try:
            progress: list[object] = [
                vcpu.pre_fault_memory_once(DATA + at * PAGE, n * PAGE) for at, n in ranges
            ]
        finally:
            steps.install(None)
        vm.check()
        return progress, vm.stage2()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(GUEST_MEMORY),
    st.sampled_from(list(Resident)),
    st.sampled_from([SlotFlags.NONE, SlotFlags.READONLY, SlotFlags.LOG_DIRTY_PAGES]),
    st.lists(st.tuples(st.integers(0, 600), st.integers(1, 700)), min_size=1, max_size=4),
)
def test_pages_in_a_row_come_out_as_one_by_one(
    backing: Backing, resident: Resident, flags: SlotFlags, ranges: list[tuple[int, int]]
) -> None:
    if backing is Backing.GUEST_MEMFD:
        flags = SlotFlags.NONE
    region = MemoryRegion(1, DATA, 2 * BLOCK + 5 * PAGE, backing, resident, flags)
    assert outcome(region, ranges, each_step=False) == outcome(region, ranges, each_step=True)


def test_a_slot_that_is_going_away_is_eagain(spec: SpecKvm) -> None:
    vm = spec.create_vm()
    vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK))
    vm.kvm.slots[0].flags |= INVALID
    assert vm.create_vcpu().pre_fault_memory_once(DATA, PAGE).errno == errno.EAGAIN


def test_a_signal_before_the_first_page_is_eintr_and_nothing_is_mapped(spec: SpecKvm) -> None:
    vm = spec.create_vm()
    vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK))
    spec.host.signal_pending = True
    progress = vm.create_vcpu().pre_fault_memory_once(DATA, BLOCK)
    assert (progress.errno, progress.size) == (errno.EINTR, BLOCK)
    assert vm.stage2() == []


def test_no_page_is_dirty_and_none_writable_after_pre_faulting_a_logged_slot(spec: SpecKvm) -> None:
    vm = spec.create_vm()
    region = MemoryRegion(1, DATA, BLOCK, Backing.SHARED, Resident.WRITE, SlotFlags.LOG_DIRTY_PAGES)
    vm.set_user_memory_region(region)
    vm.create_vcpu().pre_fault_memory(DATA, BLOCK)
    assert vm.get_dirty_log(1) == []
    assert not any(leaf.writable for leaf in vm.stage2())


def test_pre_faulting_in_a_nested_context_leaves_shadow_and_vcpu_as_they_are(spec: SpecKvm) -> None:
    vm = spec.create_vm()
    vm.set_user_memory_region(MemoryRegion(0, CODE, BLOCK, resident=Resident.WRITE))
    vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK, resident=Resident.WRITE))
    vcpu = vm.create_vcpu(VcpuConfig(el2=True))
    program = Program((EnterL2((Read(DATA), Marker(1)), (L2Mapping(DATA, DATA, BLOCK, 3),)),))
    vm.install(program)
    vcpu.load(program)
    assert port.proceed(vcpu) == port.AtMarker(1)
    assert vcpu.in_nested_context
    before = vm.nested_stage2(), vcpu.cpu.x[:], vcpu.cpu.pc, dict(vcpu.cpu.system), vcpu.aborts.pending
    vcpu.pre_fault_memory(DATA, BLOCK)
    assert before == (vm.nested_stage2(), vcpu.cpu.x, vcpu.cpu.pc, vcpu.cpu.system, vcpu.aborts.pending)
    assert sum(leaf.size for leaf in vm.stage2() if leaf.ipa >= DATA) == BLOCK


def test_a_third_l2_takes_the_shadow_of_the_first(spec: SpecKvm) -> None:
    vm = spec.create_vm()
    vm.set_user_memory_region(MemoryRegion(0, CODE, BLOCK, resident=Resident.WRITE))
    vm.set_user_memory_region(MemoryRegion(1, DATA, BLOCK, resident=Resident.WRITE))
    vcpu = vm.create_vcpu(VcpuConfig(el2=True))
    mapping = L2Mapping(DATA, DATA, BLOCK, 3)
    l2s = tuple(EnterL2((Write(DATA + number * PAGE, 1), Marker(number)), (mapping,)) for number in range(3))
    program = Program(l2s)
    vm.install(program)
    vcpu.load(program)
    seen = []
    for _ in range(3):
        port.proceed(vcpu)
        seen.append([[leaf.ipa for leaf in table if leaf.ipa >= DATA] for table in vm.nested_stage2()])
    assert seen == [[[DATA]], [[DATA], [DATA + PAGE]], [[DATA + 2 * PAGE], [DATA + PAGE]]]
    vm.check()


@pytest.mark.parametrize("page_size", [0x4000, 0x1_0000])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("backing", [Backing.PRIVATE, Backing.THP])
def test_larger_pages_walk_as_well(page_size: int, nested: bool, backing: Backing) -> None:
    block = {0x4000: 32 << 20, 0x1_0000: 512 << 20}[page_size]
    size = block if backing is Backing.THP else 64 * page_size
    config = WalkConfig(size=2 * size, backing=backing, nested=nested)
    if backing is Backing.THP:
        config = WalkConfig(
            2 * size, backing, Resident.NOTHING, nested=nested, write_permille=0, stride=size // 8
        )
    with open_spec(HostConfig(page_size=page_size, hugetlb=(block,))) as kvm:
        result = walk(kvm, config)
    level = "2" if backing is Backing.THP else "3"
    assert list(result.with_prefault.leaves) == [level]
    assert result.with_prefault.faults.total == (result.without.faults.total // 2 if nested else 0)


@pytest.mark.parametrize(("page_size", "lpa2"), [(0x1000, True), (0x4000, True), (0x1_0000, False)])
def test_an_ipa_space_of_52_bits_is_pre_faulted_to_its_top(page_size: int, lpa2: bool) -> None:
    with open_spec(HostConfig(page_size=page_size, ipa_limit=52, lpa2=lpa2)) as kvm:
        vm = kvm.create_vm(VmConfig(ipa_bits=52))
        top = (1 << 52) - 4 * page_size
        vm.set_user_memory_region(MemoryRegion(1, top, 4 * page_size, Backing.SHARED))
        vm.create_vcpu().pre_fault_memory(top, 4 * page_size)
        assert [(leaf.ipa, leaf.size) for leaf in vm.stage2()] == [(top, 4 * page_size)]


def test_without_dic_only_a_fetch_makes_a_page_executable() -> None:
    with open_spec(HostConfig(dic=False)) as kvm:
        vm = kvm.create_vm()
        vm.set_user_memory_region(MemoryRegion(0, CODE, BLOCK, resident=Resident.WRITE))
        vcpu = vm.create_vcpu()
        program = Program((Marker(1),))
        vm.install(program)
        vcpu.load(program)
        vcpu.pre_fault_memory(CODE, 2 * PAGE)
        assert not vm.stage2()[0].px
        with vm.count_faults() as faults:
            vcpu.run()
        assert (faults.execute, faults.permission) == (1, 1)
        assert [leaf.px for leaf in vm.stage2()] == [True, False]


@pytest.mark.parametrize(("protected", "pre_faults"), [(False, False), (True, True)])
def test_without_the_capability_the_ioctl_is_refused(protected: bool, pre_faults: bool) -> None:
    with open_spec(HostConfig(protected=True, pkvm_pre_faults=pre_faults)) as kvm:
        vm = kvm.create_vm(VmConfig(protected=protected))
        vm.set_user_memory_region(MemoryRegion(0, CODE, BLOCK, resident=Resident.WRITE))
        vcpu = vm.create_vcpu()
        assert vcpu.pre_fault_memory_once(CODE, PAGE).errno == errno.EOPNOTSUPP
        with pytest.raises(CapabilityMissing):
            vcpu.pre_fault_memory(CODE, PAGE)
        with pytest.raises(CapabilityMissing):
            vm.stage2()
        program = Program((Marker(1),))
        vm.install(program)
        vcpu.load(program)
        assert port.proceed(vcpu) == port.AtMarker(1)


def test_a_series_that_knows_pkvm_pre_faults_vms_that_are_not_protected() -> None:
    with open_spec(HostConfig(protected=True, pkvm_pre_faults=True)) as kvm:
        vm, protected = kvm.create_vm(), kvm.create_vm(VmConfig(protected=True))
        for one in (vm, protected):
            one.set_user_memory_region(MemoryRegion(0, CODE, BLOCK, resident=Resident.WRITE))
        assert vm.check_extension(KVM_CAP_PRE_FAULT_MEMORY)
        assert not protected.check_extension(KVM_CAP_PRE_FAULT_MEMORY)
        vcpu = vm.create_vcpu()
        program = Program((Walk(CODE + BLOCK // 2, BLOCK // 2, PAGE, 500), Marker(1)))
        vm.install(program)
        vcpu.load(program)
        vcpu.pre_fault_memory(CODE, BLOCK)
        with vm.count_faults() as faults:
            assert port.proceed(vcpu) == port.AtMarker(1)
        assert faults.total == 0
        assert protected.create_vcpu().pre_fault_memory_once(CODE, PAGE).errno == errno.EOPNOTSUPP


def test_the_pages_of_a_protected_guest_are_not_the_hosts_until_it_is_gone() -> None:
    with open_spec(HostConfig(protected=True)) as kvm:
        vm = kvm.create_vm(VmConfig(protected=True))
        vm.set_user_memory_region(MemoryRegion(0, CODE, BLOCK, resident=Resident.WRITE))
        vcpu = vm.create_vcpu()
        program = Program((Marker(1),))
        vm.install(program)
        vcpu.load(program)
        port.proceed(vcpu)
        with pytest.raises(OSError, match="protected guest"):
            vm.read_memory(CODE, 4)
        vm.close()
        assert not kvm.host.mm.donated
        assert not kvm.host.mm.pins
