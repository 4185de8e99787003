# SPDX-License-Identifier: Apache-2.0
"""A snapshot as a guest with two vCPUs leaves it, made without KVM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prefault.abi import arm64
from prefault.abi.arm64 import COUNTERS
from prefault.kvm.vm import host_page_size
from prefault.vmm import snapshot
from prefault.vmm.config import MIB, GuestConfig
from prefault.vmm.saved import Saved
from prefault.vmm.state import VcpuState
from prefault.vmm.uart import Pl011

MEMORY = bytearray(16 * MIB)
MEMORY[5 * MIB : 5 * MIB + 4] = b"here"

PC = arm64.core_register_id(256)
V0 = 0x6040_0000_0010_0054
SCTLR = arm64.system_register_id(3, 0, 1, 0, 0)
REGISTERS = {PC: (0x4000_0000).to_bytes(8, "little"), V0: bytes(range(16)), SCTLR: bytes(8)}
VCPU = VcpuState(REGISTERS, 0, bytes(64))

SAVED = Saved(
    guest=GuestConfig(memory=len(MEMORY), vcpus=2),
    page_size=host_page_size(),
    kernel="7.3.4",
    vcpus=(VCPU, VCPU),
    gic_identity=((1, 8, 0x4B00143B),),
    gic=((1, 0, 0x52), (7, 0x1_0000_0000, 0x800_0000)),
    counters=dict.fromkeys(COUNTERS, 1000),
    uart=Pl011(lambda byte: None, lambda level: None).save(),
)


def written(folder: Path, changes: Mapping[str, object] | None = None) -> Path:
    """The snapshot on disk, parts of its state replaced."""
    snapshot.write(folder, {**SAVED.to_json(), **(changes or {})}, memoryview(MEMORY))
    return folder
