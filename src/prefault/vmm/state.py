# SPDX-License-Identifier: Apache-2.0
"""What a stopped VM is made of besides its memory: registers, GIC, counters.

All of it is read while no vCPU runs, and written to a VM that has not run yet.

Time: the guest's counters go on from the value at which they stood. What passes while a guest is
stopped, or lies in a snapshot, does not exist for it; its wall clock is late by as much until somebody
sets it.

Source: Documentation/virt/kvm/api.rst (KVM_GET_REG_LIST), devices/arm-vgic-v3.rst
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefault.abi import arm64, constants, structures
from prefault.errors import KvmError, PrefaultError
from prefault.faults.foreign import bytes_of, hexadecimal, items, whole
from prefault.kvm.device import Device
from prefault.kvm.vcpu import Vcpu
from prefault.vmm.config import IRQS

_LEVELS_PER_WORD = 32
_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1
_MP_STATES = (constants.KVM_MP_STATE_RUNNABLE, constants.KVM_MP_STATE_STOPPED)
_EVENTS_SIZE = ctypes.sizeof(structures.kvm_vcpu_events)


class Foreign(PrefaultError):
    """This host's KVM does not have, or does not take, what a state has."""


@dataclass(frozen=True)
class VcpuState:
    """A vCPU."""

    registers: Mapping[int, bytes]
    """By id, in the order of the kernel's list, without the counters."""
    mp_state: int
    events: bytes

    def to_json(self) -> dict[str, object]:
        """A form that ``from_json`` reads."""
        registers = {f"{register:#x}": value.hex() for register, value in self.registers.items()}
        return {"registers": registers, "mp_state": self.mp_state, "events": self.events.hex()}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> VcpuState:
        """Read what ``to_json`` gave.

        :raises ValueError, TypeError, LookupError: it did not give this
        """
        registers = {hexadecimal(name, _U64): bytes_of(value) for name, value in items(raw["registers"])}
        for register, value in registers.items():
            if len(value) != arm64.register_size(register):
                raise ValueError(f"register {register:#x} has {len(value)} bytes")
        mp_state, events = raw["mp_state"], bytes_of(raw["events"])
        if type(mp_state) is not int or mp_state not in _MP_STATES:
            raise ValueError(f"a vCPU's state is {mp_state!r}, neither runnable nor stopped")
        if len(events) != _EVENTS_SIZE:
            raise ValueError(f"a vCPU's events have {len(events)} bytes in place of {_EVENTS_SIZE}")
        return cls(registers, mp_state, events)


def save_vcpu(vcpu: Vcpu) -> VcpuState:
    """All of a vCPU that does not run."""
    ids = (register for register in vcpu.register_list() if register not in arm64.COUNTERS)
    return VcpuState(
        {register: vcpu.get_register_bytes(register) for register in ids},
        vcpu.get_mp_state(),
        vcpu.get_events(),
    )


def restore_vcpu(vcpu: Vcpu, state: VcpuState) -> None:
    """Make a vCPU that has not run what another one was.

    :raises Foreign: the kernel's list of registers is another one, or it does not take a value
    """
    _compare_lists(set(vcpu.register_list()) - set(arm64.COUNTERS), set(state.registers))
    refused = []
    for register, value in state.registers.items():
        try:
            vcpu.set_register_bytes(register, value)
        except KvmError:
            found = vcpu.get_register_bytes(register)
            if found != value:
                refused.append(
                    f"{arm64.register_name(register)} {_number(value)}, where it has {_number(found)}"
                )
    if refused:
        raise Foreign(f"this KVM does not take {_some(refused)}: is it another CPU, or another kernel?")
    try:
        vcpu.set_events(state.events)
        vcpu.set_mp_state(state.mp_state)
    except KvmError as error:
        raise Foreign(f"this KVM does not take what waits for a vCPU, or its state: {error}") from error


def _compare_lists(here: set[int], there: set[int]) -> None:
    lacking, unknown = sorted(there - here), sorted(here - there)
    if lacking:
        names = _some([arm64.register_name(register) for register in lacking])
        raise Foreign(f"this KVM's vCPUs lack registers that the guest's had: {names}")
    if unknown:
        names = _some([arm64.register_name(register) for register in unknown])
        raise Foreign(
            f"this KVM's vCPUs have registers of which the snapshot knows nothing: {names}; "
            "use the kernel that it was made on"
        )


def _number(value: bytes) -> str:
    return f"{int.from_bytes(value, 'little'):#x}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def save_counters(vcpu: Vcpu) -> dict[int, int]:
    """The VM's counters at this moment."""
    listed = vcpu.register_list()
    return {
        counter: int.from_bytes(vcpu.get_register_bytes(counter), "little")
        for counter in arm64.COUNTERS
        if counter in listed
    }


def counters_from_json(raw: Any) -> dict[int, int]:
    """What ``save_counters`` gave, by hexadecimal ids.

    :raises ValueError: it did not give this
    """
    found = {hexadecimal(name, _U64): whole(value, _U64) for name, value in items(raw)}
    for register in found:
        if register not in arm64.COUNTERS:
            raise ValueError(f"register {register:#x} is no counter")
    return found


def compare_counters(vcpu: Vcpu, counters: Mapping[int, int]) -> None:
    """Whether ``restore_counters`` can do its work.

    :raises Foreign: the kernel has other counters
    """
    _compare_lists(set(vcpu.register_list()) & set(arm64.COUNTERS), set(counters))


def restore_counters(vcpu: Vcpu, counters: Mapping[int, int]) -> None:
    """Let the VM's counters go on from where they were. The last thing to do before the vCPUs run."""
    for counter, value in counters.items():
        vcpu.set_register_bytes(counter, value.to_bytes(8, "little"))


# The GIC. Its state is a list of attributes in the order in which they must be written.

Attribute = tuple[int, int, int]
"""(group, attribute, value)"""

_DIST = arm64.KVM_DEV_ARM_VGIC_GRP_DIST_REGS
_REDIST = arm64.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS
_SYSREGS = arm64.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS
_LEVELS = arm64.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO

_GICD_CTLR, _GICD_TYPER, _GICD_IIDR, _GICD_TYPER2 = 0x0, 0x4, 0x8, 0xC
_GICD_IROUTER = 0x6000
_IDENTITY = ((_DIST, _GICD_IIDR), (_DIST, _GICD_TYPER2))
_ALL = 0xFFFF_FFFF
_SGI_FRAME = 0x1_0000

_BITMAPS = {
    "group": 0x80,
    "set-enable": 0x100,
    "clear-enable": 0x180,
    "set-pending": 0x200,
    "set-active": 0x300,
}
_PRIORITY, _CONFIG = 0x400, 0xC00
_IRQS_PER_WORD = {"bitmap": 32, "priority": 4, "config": 16}


def _sysreg(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    return op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


_ALWAYS_THERE = (
    *(_sysreg(3, 0, 12, 12, op2) for op2 in (5, 4, 6, 7)),  # SRE, CTLR, IGRPEN0, IGRPEN1
    _sysreg(3, 0, 4, 6, 0),  # PMR
    _sysreg(3, 0, 12, 8, 3),  # BPR0
    _sysreg(3, 0, 12, 12, 3),  # BPR1
)
_CPU_INTERFACE = (
    *_ALWAYS_THERE,
    *(_sysreg(3, 0, 12, 8, op2) for op2 in (4, 5, 6, 7)),  # AP0R
    *(_sysreg(3, 0, 12, 9, op2) for op2 in (0, 1, 2, 3)),  # AP1R
)
_CPU_INTERFACE_EL2 = (
    _sysreg(3, 4, 12, 9, 5),  # ICC_SRE_EL2
    _sysreg(3, 4, 12, 11, 1),  # VTR
    _sysreg(3, 4, 12, 11, 7),  # VMCR
    *(_sysreg(3, 4, 12, 8, op2) for op2 in range(4)),  # AP0R
    *(_sysreg(3, 4, 12, 9, op2) for op2 in range(4)),  # AP1R
    *(_sysreg(3, 4, 12, crm, op2) for crm in (12, 13) for op2 in range(8)),  # LR
    _sysreg(3, 4, 12, 11, 0),  # HCR
)


def _irq_registers(base: int, first: int, count: int) -> Iterator[tuple[int, bool]]:
    """Offsets of what ``count`` interrupts from ``first`` on have, and whether to write all ones."""

    def words(start: int, kind: str) -> Iterator[int]:
        per_word = _IRQS_PER_WORD[kind]
        return (base + start + 4 * (irq // per_word) for irq in range(first, first + count, per_word))

    for kind, start in (("bitmap", _BITMAPS["group"]), ("priority", _PRIORITY), ("config", _CONFIG)):
        for offset in words(start, kind):
            yield offset, False
    # What is enabled at reset need not be enabled in the guest.
    for offset in words(_BITMAPS["clear-enable"], "bitmap"):
        yield offset, True
    for name in ("set-enable", "set-pending", "set-active"):
        for offset in words(_BITMAPS[name], "bitmap"):
            yield offset, False


def _mpidr(number: int) -> int:
    """The affinity that KVM gives to a vCPU, in the place that attributes have for it."""
    return number << arm64.KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT


def _of_irqs(group: int, mpidr: int, base: int, first: int, count: int) -> Iterator[tuple[int, int, bool]]:
    return ((group, mpidr | offset, ones) for offset, ones in _irq_registers(base, first, count))


def _levels(mpidr: int, first: int) -> tuple[int, int, bool]:
    info = arm64.VGIC_LEVEL_INFO_LINE_LEVEL << arm64.KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT
    return _LEVELS, mpidr | info | first, False


def _layout(vcpus: int, irqs: int) -> Iterator[tuple[int, int, bool]]:
    """Group and attribute of all that is not the CPU interface, and whether to write all ones."""
    # First of all: while the distributor is disabled, KVM does not queue what becomes pending.
    yield _DIST, _GICD_CTLR, False
    for number in range(vcpus):
        mpidr = _mpidr(number)
        yield from _of_irqs(_REDIST, mpidr, _SGI_FRAME, 0, 32)
        yield _levels(mpidr, 0)
    for irq in range(32, irqs):
        for half in (0, 4):
            yield _DIST, _GICD_IROUTER + 8 * irq + half, False
    yield from _of_irqs(_DIST, 0, 0, 32, irqs - 32)
    for first in range(32, irqs, _LEVELS_PER_WORD):
        yield _levels(0, first)


def _cpu_interface(vcpus: int, *, el2: bool) -> Iterator[tuple[int, int]]:
    """Group and attribute of all that CPU interfaces may have."""
    for number in range(vcpus):
        for register in _CPU_INTERFACE + (_CPU_INTERFACE_EL2 if el2 else ()):
            yield _SYSREGS, _mpidr(number) | register


def _irqs(gic: Device) -> int:
    return 32 * ((gic.get_attribute(_DIST, _GICD_TYPER) & 0x1F) + 1)


def save_gic(gic: Device, vcpus: int, *, el2: bool) -> list[Attribute]:
    """All of a GIC without ITS, whose vCPUs do not run."""
    found: list[Attribute] = [
        (group, attribute, _ALL if all_ones else gic.get_attribute(group, attribute))
        for group, attribute, all_ones in _layout(vcpus, _irqs(gic))
    ]
    for group, attribute in _cpu_interface(vcpus, el2=el2):
        value, error = gic.try_get_attribute(group, attribute)
        if not error:  # priorities need fewer registers on some hosts
            found.append((group, attribute, value))
    return found


def gic_from_json(raw: Any, vcpus: int, *, el2: bool) -> tuple[Attribute, ...]:
    """What ``save_gic`` gave.

    :raises ValueError, TypeError: it did not give this for such a guest
    """
    found = _attributes(raw)
    named = [(group, attribute) for group, attribute, _ in found]
    layout = [(group, attribute) for group, attribute, _ in _layout(vcpus, IRQS)]
    rest = named[len(layout) :]
    there = set(rest)
    lacking = {
        (_SYSREGS, _mpidr(number) | register) for number in range(vcpus) for register in _ALWAYS_THERE
    } - there
    in_order = [one for one in _cpu_interface(vcpus, el2=el2) if one in there]
    if named[: len(layout)] != layout or rest != in_order or lacking:
        raise ValueError("its GIC is not that of its guest: attributes are missing, or others")
    return found


def gic_identity_from_json(raw: Any) -> tuple[Attribute, ...]:
    """What ``save_gic_identity`` gave.

    :raises ValueError, TypeError: it did not give this
    """
    found = _attributes(raw)
    if tuple((group, attribute) for group, attribute, _ in found) != _IDENTITY:
        raise ValueError("its GIC's identity is not where it should be")
    return found


def _attributes(raw: Any) -> tuple[Attribute, ...]:
    found = tuple((whole(group, _U32), whole(attribute, _U64), value) for group, attribute, value in raw)
    return tuple(
        (group, attribute, whole(value, _U64 if group == _SYSREGS else _U32))
        for group, attribute, value in found
    )


def save_gic_identity(gic: Device) -> list[Attribute]:
    """What must be written before the GIC is initialised: which revision of KVM's GIC the guest has."""
    return [(group, offset, gic.get_attribute(group, offset)) for group, offset in _IDENTITY]


def restore_gic(gic: Device, attributes: Sequence[Attribute]) -> None:
    """Write what was saved.

    :raises Foreign: this host's GIC does not take it
    """
    for group, attribute, value in attributes:
        try:
            gic.set_attribute(group, attribute, value)
        except KvmError as error:
            raise Foreign(
                f"this KVM's GIC refuses {value:#x} for attribute {attribute:#x} of group {group}: {error}"
            ) from error
