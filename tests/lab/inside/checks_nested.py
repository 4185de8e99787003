# SPDX-License-Identifier: Apache-2.0
"""What must hold of guests that run an L2, with HCR_EL2.E2H 0 and 1."""

from __future__ import annotations

import itertools

from prefault.errors import GuestFailed, UsageError
from prefault.guest import port
from prefault.guest.program import (
    PORT,
    DeviceRead,
    EnterL2,
    L2Mapping,
    Marker,
    Read,
    Report,
    Step,
    Walk,
    Write,
)
from prefault.machine import Leaf, MmioExit, Resident, VcpuConfig, VmConfig
from tests.lab.inside.checks import Checks, main
from tests.lab.inside.guests import DATA, DEVICE, MIB, PAGE, finish, kvm, make_vm, restart, start, until_exit

checks = Checks()
VHE = VcpuConfig(el2=True)
E2H0 = VcpuConfig(el2=True, e2h0=True)
KINDS = {"e2h1": VHE, "e2h0": E2H0}
L2_DATA = 0x20_0000_0000
VALUE = 0x1122_3344_5566_7788
EC_SHIFT = 26
EC_DATA_ABORT_LOWER_EL = 0x24
FSC_KIND, FSC_TRANSLATION, FSC_PERMISSION = 0x3C, 0x04, 0x0C


def mapped(size: int = 2 * MIB, level: int = 3, **permissions: bool) -> L2Mapping:
    """L2_DATA onto DATA."""
    return L2Mapping(L2_DATA, DATA, size, level, **permissions)


@checks.each(itertools.product(KINDS, (2, 3)))
def l2_runs_on_the_tables_of_l1(kind: str, level: int) -> None:
    with make_vm(2 * MIB) as vm:
        vm.write_memory(DATA + MIB, VALUE.to_bytes(8, "little"))
        l2 = (Read(L2_DATA + MIB), Report(), Write(L2_DATA + 8, 5))
        vcpu = start(vm, EnterL2(l2, (mapped(level=level),)), Read(DATA + 8), Report(), config=KINDS[kind])
        assert finish(vcpu) == [VALUE, 5]


@checks.each(KINDS)
def an_l1_has_the_e2h_that_it_was_made_with(kind: str) -> None:
    with make_vm(0) as vm:
        vcpu = start(vm, EnterL2((Marker(1),)), config=KINDS[kind])
        assert until_exit(vcpu) == port.AtMarker(1)
        assert vcpu.get_register("hcr_el2") >> 34 & 1 == (kind == "e2h1")


@checks.each(
    itertools.product(KINDS, ((1, True, 64), (2, True, 32), (4, False, 32), (4, True, 64), (8, False, 64)))
)
def an_l2_device_read_delivers_its_value(kind: str, read: tuple[int, bool, int]) -> None:
    width, signed, bits = read
    with make_vm(0) as vm:
        l2 = (DeviceRead(DEVICE + PAGE, width, signed, bits), Report())
        mapping = L2Mapping(DEVICE + PAGE, DEVICE, PAGE)
        vcpu = start(vm, EnterL2(l2, (mapping,)), config=KINDS[kind])
        assert until_exit(vcpu) == MmioExit(DEVICE, width, False)
        vcpu.complete_mmio((1 << 8 * width) - 2)
        assert finish(vcpu) == [(1 << bits) - 2 if signed else (1 << 8 * width) - 2]


@checks.each(KINDS)
def an_l2_fault_beyond_the_tables_of_l1_is_for_l1(kind: str) -> None:
    _l1_takes(KINDS[kind], FSC_TRANSLATION, EnterL2((Read(L2_DATA + 4 * MIB),), (mapped(),)))


@checks.each(KINDS)
def an_l2_write_that_l1_forbids_is_for_l1(kind: str) -> None:
    _l1_takes(KINDS[kind], FSC_PERMISSION, EnterL2((Write(L2_DATA, 1),), (mapped(writable=False),)))


def _l1_takes(config: VcpuConfig, kind: int, step: Step) -> None:
    with make_vm(2 * MIB) as vm:
        vcpu = start(vm, step, config=config)
        try:
            until_exit(vcpu)
        except GuestFailed as error:
            assert error.esr is not None and error.esr >> EC_SHIFT == EC_DATA_ABORT_LOWER_EL, error
            assert error.esr & FSC_KIND == kind, error
            return
        raise AssertionError("L1 saw nothing")


def _data_leaves(leaves: list[Leaf], start: int) -> list[tuple[int, int, int]]:
    return [(leaf.ipa, leaf.size, leaf.level) for leaf in leaves if start <= leaf.ipa < start + 64 * MIB]


@checks
def the_shadow_table_has_what_l2_touched() -> None:
    with make_vm(2 * MIB, resident=Resident.WRITE) as vm:
        l2 = (Walk(L2_DATA, MIB, PAGE, 500), Marker(1))
        vcpu = start(vm, EnterL2(l2, (mapped(),)), config=VHE)
        assert until_exit(vcpu) == port.AtMarker(1)
        tables = vm.nested_stage2()
        assert [_data_leaves(table, L2_DATA) for table in tables] == [[(L2_DATA, MIB, 3)]], tables
        assert _data_leaves(vm.stage2(), DATA) == []


@checks
def l2_faults_are_counted_at_their_l2_ipa() -> None:
    with make_vm(2 * MIB, resident=Resident.WRITE) as vm:
        l2 = (Marker(0), Walk(L2_DATA, MIB, PAGE), Marker(1))
        vcpu = start(vm, EnterL2(l2, (mapped(),)), config=VHE)
        assert until_exit(vcpu) == port.AtMarker(0)
        with vm.count_faults() as faults:
            assert until_exit(vcpu) == port.AtMarker(1)
        assert faults.ipas == [L2_DATA + index * PAGE for index in range(256)]
        assert (faults.read, faults.mmio) == (256, 1), faults


@checks.each(KINDS)
def a_vcpu_in_nested_context_pre_faults_the_canonical_table(kind: str) -> None:
    with make_vm(2 * MIB, resident=Resident.WRITE) as vm:
        l2 = (Read(L2_DATA), DeviceRead(PORT + 0x800, 2, True, 64), Report(), Walk(L2_DATA, MIB, PAGE))
        vcpu = start(
            vm,
            EnterL2(l2, (mapped(),)),
            Marker(1),
            Walk(DATA, 2 * MIB, PAGE, 500),
            Marker(2),
            config=KINDS[kind],
        )
        assert until_exit(vcpu) == MmioExit(PORT + 0x800, 2, False)
        shadow = vm.nested_stage2()
        vcpu.pre_fault_memory(DATA, 2 * MIB)
        assert vm.nested_stage2() == shadow
        assert _data_leaves(vm.stage2(), DATA) == [(DATA, 2 * MIB, 3)]
        vcpu.complete_mmio(0x8001)
        assert until_exit(vcpu) == port.Reported(0xFFFF_FFFF_FFFF_8001)
        assert until_exit(vcpu) == port.AtMarker(1)
        with vm.count_faults() as faults:
            assert until_exit(vcpu) == port.AtMarker(2)
        assert faults.total == 0, faults


@checks
def an_l1_can_be_given_another_program() -> None:
    with make_vm(2 * MIB) as vm:
        vcpu = start(vm, EnterL2((Marker(1),)), config=VHE)
        assert until_exit(vcpu) == port.AtMarker(1)
        restart(vm, vcpu, EnterL2((Write(L2_DATA, VALUE),), (mapped(),)), Read(DATA), Report())
        assert finish(vcpu) == [VALUE]


@checks
def el2_without_a_gic_is_refused() -> None:
    with kvm().create_vm(VmConfig(gic=False)) as vm:
        try:
            vm.create_vcpu(VHE)
        except UsageError as error:
            assert "gic=True" in str(error), error
            return
        raise AssertionError("accepted")


if __name__ == "__main__":
    main(checks)
