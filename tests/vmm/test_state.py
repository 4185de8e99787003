# SPDX-License-Identifier: Apache-2.0
"""Registers and the GIC, with a KVM that only remembers."""

from __future__ import annotations

import errno
from typing import cast

import pytest

from prefault.abi import arm64
from prefault.abi.arm64 import COUNTERS
from prefault.errors import KvmError
from prefault.kvm.vcpu import Vcpu
from prefault.vmm import state
from prefault.vmm.state import Foreign, VcpuState

from .samples import PC, SCTLR, V0, VCPU, Attributes


class Registers:
    """A vCPU as far as its state goes."""

    def __init__(self, fixed: dict[int, bytes] | None = None) -> None:
        self.values = {register: bytes(len(value)) for register, value in VCPU.registers.items()}
        self.values |= {counter: bytes(8) for counter in COUNTERS}
        self.fixed = fixed or {}
        self.values |= self.fixed
        self.written: list[int] = []
        self.mp_state, self.events = 5, b""

    def register_list(self) -> tuple[int, ...]:
        return tuple(self.values)

    def get_register_bytes(self, register: int) -> bytes:
        return self.values[register]

    def set_register_bytes(self, register: int, value: bytes) -> None:
        if register in self.fixed and value != self.fixed[register]:
            raise KvmError("KVM_SET_ONE_REG", errno.EINVAL)
        self.written.append(register)
        self.values[register] = value

    def get_mp_state(self) -> int:
        return self.mp_state

    def set_mp_state(self, value: int) -> None:
        self.mp_state = value

    def get_events(self) -> bytes:
        return self.events

    def set_events(self, value: bytes) -> None:
        self.events = value

    @property
    def vcpu(self) -> Vcpu:
        return cast(Vcpu, self)


def test_a_vcpu_becomes_what_another_was() -> None:
    made = Registers()
    state.restore_vcpu(made.vcpu, VCPU)
    assert state.save_vcpu(made.vcpu) == VCPU


def test_counters_are_left_for_later() -> None:
    made = Registers()
    state.restore_vcpu(made.vcpu, VCPU)
    assert not set(COUNTERS) & set(made.written)
    state.restore_counters(made.vcpu, dict.fromkeys(COUNTERS, 77))
    assert state.save_counters(made.vcpu) == dict.fromkeys(COUNTERS, 77)


def test_a_register_that_is_lacking_here_is_named() -> None:
    made = Registers()
    del made.values[SCTLR]
    with pytest.raises(Foreign, match="lack registers that the guest's had: sctlr_el1"):
        state.restore_vcpu(made.vcpu, VCPU)


def test_a_register_that_was_lacking_there_is_named() -> None:
    made = Registers()
    made.values[arm64.system_register_id(3, 0, 4, 6, 0)] = bytes(8)
    with pytest.raises(Foreign, match="knows nothing: S3_0_C4_C6_0"):
        state.restore_vcpu(made.vcpu, VCPU)


def test_a_value_that_this_cpu_does_not_take_is_named_with_its_own() -> None:
    made = Registers(fixed={SCTLR: (3).to_bytes(8, "little")})
    with pytest.raises(Foreign, match="does not take sctlr_el1 0x0, where it has 0x3"):
        state.restore_vcpu(made.vcpu, VCPU)


def test_what_waits_for_a_vcpu_and_is_not_taken_is_foreign() -> None:
    class Refusing(Registers):
        def set_events(self, value: bytes) -> None:
            raise KvmError("KVM_SET_VCPU_EVENTS", errno.EINVAL)

    with pytest.raises(Foreign, match="does not take what waits for a vCPU"):
        state.restore_vcpu(Refusing().vcpu, VCPU)


def test_other_counters_than_this_kernels_are_named() -> None:
    made = Registers()
    state.compare_counters(made.vcpu, dict.fromkeys(COUNTERS, 1))
    with pytest.raises(Foreign, match="the snapshot knows nothing"):
        state.compare_counters(made.vcpu, {COUNTERS[0]: 1})
    del made.values[COUNTERS[1]]
    with pytest.raises(Foreign, match="lack registers that the guest's had"):
        state.compare_counters(made.vcpu, dict.fromkeys(COUNTERS, 1))


def test_a_register_that_is_as_it_should_be_need_not_be_writable() -> None:
    made = Registers(fixed={PC: VCPU.registers[PC], V0: VCPU.registers[V0]})
    state.restore_vcpu(made.vcpu, VCPU)


def test_a_vcpus_state_survives_json() -> None:
    assert VcpuState.from_json(VCPU.to_json()) == VCPU


def test_a_gic_becomes_what_another_was() -> None:
    first, second = Attributes(), Attributes()
    first.values |= {
        (1, 0): 0x52,
        (1, 0x104): 2,
        (5, 0x1_0001_0100): 0x8000000,
        (7, 0): 1 << 27,
        (6, 0xC230): 0xF0,
    }
    state.restore_gic(second.gic, state.save_gic(first.gic, 2, el2=False))
    assert {name: value for name, value in first.values.items() if second.values[name] != value} == {}


def test_the_distributor_is_enabled_before_anything_becomes_pending() -> None:
    saved = state.save_gic(Attributes().gic, 2, el2=False)
    assert saved[0][:2] == (1, 0)


def test_what_is_disabled_by_the_guest_is_disabled_before_the_rest_is_enabled() -> None:
    written = [(group, attribute) for group, attribute, _ in state.save_gic(Attributes().gic, 1, el2=False)]
    assert written.index((5, 0x1_0180)) < written.index((5, 0x1_0100)) < written.index((5, 0x1_0200))
    assert written.index((1, 0x184)) < written.index((1, 0x104))


def test_registers_of_the_cpu_interface_that_a_host_lacks_are_left_out() -> None:
    saved = state.save_gic(Attributes().gic, 1, el2=True)
    assert not {attribute & 0xFFFF for group, attribute, _ in saved if group == 6} & Attributes.ABSENT


@pytest.mark.parametrize("vcpus", [1, 8])
@pytest.mark.parametrize("el2", [False, True])
def test_whatever_gic_is_saved_is_read_for_such_a_guest_and_no_other(vcpus: int, el2: bool) -> None:
    found = state.save_gic(Attributes().gic, vcpus, el2=el2)
    assert list(state.gic_from_json(found, vcpus, el2=el2)) == found
    with pytest.raises(ValueError, match="not that of its guest"):
        state.gic_from_json(found, vcpus + 1, el2=el2)


def test_a_gic_that_does_not_take_a_value_is_foreign() -> None:
    class Refusing(Attributes):
        def set_attribute(self, group: int, attribute: int, value: int) -> None:
            raise KvmError("KVM_SET_DEVICE_ATTR", errno.EINVAL)

    with pytest.raises(Foreign, match="GIC refuses 0x1 for attribute 0x8 of group 1"):
        state.restore_gic(Refusing().gic, [(1, 8, 1)])
