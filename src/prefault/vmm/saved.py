# SPDX-License-Identifier: Apache-2.0
"""A machine as a snapshot, and a snapshot as a machine."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from prefault.errors import BadSnapshot, UsageError
from prefault.faults import foreign
from prefault.faults.foreign import check_page_size
from prefault.kvm.vm import host_page_size
from prefault.vmm import snapshot, state, uart
from prefault.vmm.config import MAX_MEMORY, RAM_BASE, GuestConfig
from prefault.vmm.machine import Machine
from prefault.vmm.snapshot import Snapshot, Written
from prefault.vmm.state import Attribute, VcpuState

ARCHITECTURE = "arm64"
_MOST_PAGE = 1 << 30
_LONGEST_NAME = 64
"""Of a kernel: what uname has room for."""


@dataclass(frozen=True)
class Saved:
    """All of a machine but its memory."""

    guest: GuestConfig
    page_size: int
    kernel: str
    """The host's, for messages."""
    vcpus: tuple[VcpuState, ...]
    gic_identity: tuple[Attribute, ...]
    gic: tuple[Attribute, ...]
    counters: Mapping[int, int]
    uart: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        """A form that ``from_json`` reads."""
        return {
            "architecture": ARCHITECTURE,
            "page_size": self.page_size,
            "kernel": self.kernel,
            "ram_base": RAM_BASE,
            "guest": self.guest.to_json(),
            "vcpus": [vcpu.to_json() for vcpu in self.vcpus],
            "gic_identity": self.gic_identity,
            "gic": self.gic,
            "counters": {f"{register:#x}": value for register, value in self.counters.items()},
            "uart": self.uart,
        }

    @classmethod
    def from_snapshot(cls, source: Snapshot, changes: Mapping[str, object] | None = None) -> Saved:
        """Read what ``save`` wrote.

        :param changes: to the guest's configuration: what is behind its memory
        :raises BadSnapshot: it is of another kind of machine, or something is missing
        :raises UsageError: the changes cannot be
        """
        with snapshot.foreign_refused(source.folder):
            made = cls._read(source)
        return replace(made, guest=_changed(made.guest, changes or {}))

    @classmethod
    def _read(cls, source: Snapshot) -> Saved:
        raw = source.state
        architecture = foreign.line(raw["architecture"], _LONGEST_NAME)
        ram_base = foreign.whole(raw["ram_base"], MAX_MEMORY)
        if architecture != ARCHITECTURE or ram_base != RAM_BASE:
            raise BadSnapshot(source.folder, f"it is of another kind of machine: {architecture}")
        check_page_size(page_size := foreign.whole(raw["page_size"], _MOST_PAGE))
        guest = GuestConfig.from_json(raw["guest"])
        if set(raw["guest"]) != set(guest.to_json()):  # an order may leave something out
            raise ValueError("it does not say all of its guest's hardware")
        vcpus = tuple(VcpuState.from_json(one) for one in raw["vcpus"])
        if len(vcpus) != guest.vcpus or guest.memory != source.size:
            raise BadSnapshot(source.folder, "its vCPUs and its memory are not those of its guest")
        return cls(
            guest=guest,
            page_size=page_size,
            kernel=foreign.line(raw["kernel"], _LONGEST_NAME),
            vcpus=vcpus,
            gic_identity=state.gic_identity_from_json(raw["gic_identity"]),
            gic=state.gic_from_json(raw["gic"], guest.vcpus, el2=guest.el2),
            counters=state.counters_from_json(raw["counters"]),
            uart=uart.checked(raw["uart"]),
        )


def _changed(guest: GuestConfig, changes: Mapping[str, object]) -> GuestConfig:
    """A guest with something else behind its memory.

    :raises UsageError: that cannot be
    """
    try:
        return GuestConfig.from_json({**guest.to_json(), **changes})
    except (TypeError, ValueError) as error:
        raise UsageError(f"the guest cannot be changed so: {error}") from error


def save(machine: Machine, folder: Path, counters: Mapping[int, int]) -> Written:
    """Write a snapshot of a machine whose vCPUs are stopped.

    :param counters: the guest's counters when they were
    """
    guest = machine.guest
    whole = Saved(
        guest=guest,
        page_size=host_page_size(),
        kernel=platform.release(),
        vcpus=tuple(state.save_vcpu(vcpu) for vcpu in machine.vcpus),
        gic_identity=tuple(state.save_gic_identity(machine.vm.gic)),
        gic=tuple(state.save_gic(machine.vm.gic, guest.vcpus, el2=guest.el2)),
        counters=counters,
        uart=machine.uart.save(),
    )
    return snapshot.write(folder, whole.to_json(), machine.memory)


def check_host(source: Snapshot, whole: Saved) -> None:
    """Compare what can be compared without a VM.

    :raises BadSnapshot: this host's pages are of another size
    """
    here = host_page_size()
    if whole.page_size != here:
        raise BadSnapshot(
            source.folder,
            f"it was made on a host with {whole.page_size >> 10} KiB pages, this one's have {here >> 10} KiB",
        )


def restore(machine: Machine, source: Snapshot, whole: Saved) -> None:
    """Make a new machine what the saved one was, but for its memory and its counters.

    :raises BadSnapshot: this KVM does not take it
    """
    try:
        state.restore_gic(machine.vm.gic, whole.gic_identity)
        machine.vm.initialise_gic()
        for vcpu, saved in zip(machine.vcpus, whole.vcpus, strict=True):
            state.restore_vcpu(vcpu, saved)
        state.compare_counters(machine.vcpus[0], whole.counters)
        state.restore_gic(machine.vm.gic, whole.gic)
        machine.uart.restore(whole.uart)
    except state.Foreign as error:
        raise BadSnapshot(source.folder, f"{error} (it was made on Linux {whole.kernel})") from error
