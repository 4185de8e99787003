# SPDX-License-Identifier: Apache-2.0
"""A machine as a snapshot, and a snapshot as a machine."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefault.errors import BadSnapshot
from prefault.kvm.vm import host_page_size
from prefault.vmm import snapshot, state
from prefault.vmm.config import RAM_BASE, GuestConfig
from prefault.vmm.machine import Machine
from prefault.vmm.snapshot import Snapshot, Written
from prefault.vmm.state import Attribute, VcpuState

ARCHITECTURE = "arm64"


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
        """
        raw = source.state
        try:
            if raw["architecture"] != ARCHITECTURE or raw["ram_base"] != RAM_BASE:
                raise BadSnapshot(
                    source.folder,
                    f"it is of another kind of machine: {raw['architecture']}",
                )
            made = cls(
                guest=GuestConfig.from_json({**raw["guest"], **(changes or {})}),
                page_size=int(raw["page_size"]),
                kernel=str(raw["kernel"]),
                vcpus=tuple(VcpuState.from_json(one) for one in raw["vcpus"]),
                gic_identity=_attributes(raw["gic_identity"]),
                gic=_attributes(raw["gic"]),
                counters={int(name, 16): int(value) for name, value in raw["counters"].items()},
                uart=raw["uart"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadSnapshot(source.folder, f"its state is not what it should be ({error!r})") from error
        if len(made.vcpus) != made.guest.vcpus or made.guest.memory != source.size:
            raise BadSnapshot(source.folder, "its vCPUs and its memory are not those of its guest")
        return made


def _attributes(raw: Any) -> tuple[Attribute, ...]:
    return tuple((int(group), int(attribute), int(value)) for group, attribute, value in raw)


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
        state.restore_gic(machine.vm.gic, whole.gic)
        machine.uart.restore(whole.uart)
    except state.Foreign as error:
        raise BadSnapshot(source.folder, f"{error} (it was made on Linux {whole.kernel})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise BadSnapshot(source.folder, f"its console is not what it should be ({error!r})") from error
