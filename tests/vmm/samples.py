# SPDX-License-Identifier: Apache-2.0
"""A snapshot as a guest with two vCPUs leaves it, made without KVM."""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from hypothesis import strategies as st

from prefault.abi import arm64
from prefault.abi.arm64 import COUNTERS
from prefault.kvm.device import Device
from prefault.kvm.vm import host_page_size
from prefault.vmm import snapshot, state
from prefault.vmm.config import MIB, GuestConfig
from prefault.vmm.saved import Saved
from prefault.vmm.snapshot import CHUNK
from prefault.vmm.state import VcpuState
from prefault.vmm.uart import Pl011

MEMORY = bytearray(16 * MIB)
MEMORY[5 * MIB : 5 * MIB + 4] = b"here"

PC = arm64.core_register_id(256)
V0 = 0x6040_0000_0010_0054
SCTLR = arm64.system_register_id(3, 0, 1, 0, 0)
REGISTERS = {PC: (0x4000_0000).to_bytes(8, "little"), V0: bytes(range(16)), SCTLR: bytes(8)}


class Attributes:
    """A GIC as far as its state goes: 64 interrupts, and less in the CPU interface than there could be."""

    ABSENT = frozenset({0xC645, 0xC646, 0xC647})  # ICC_AP0R1_EL1 to ICC_AP0R3_EL1

    def __init__(self) -> None:
        self.values: dict[tuple[int, int], int] = {(1, 4): 1}  # GICD_TYPER: 64 interrupts
        self.order: list[tuple[int, int]] = []

    def try_get_attribute(self, group: int, attribute: int) -> tuple[int, int]:
        if group == 6 and attribute & 0xFFFF in self.ABSENT:
            return 0, errno.ENXIO
        return self.values.get((group, attribute), 0), 0

    def get_attribute(self, group: int, attribute: int) -> int:
        return self.try_get_attribute(group, attribute)[0]

    def set_attribute(self, group: int, attribute: int, value: int) -> None:
        self.order.append((group, attribute))
        self.values[group, attribute] = value

    @property
    def gic(self) -> Device:
        return cast(Device, self)


VCPU = VcpuState(REGISTERS, 0, bytes(64))
GIC = Attributes()
GIC.values |= {(1, 0): 0x52, (1, 8): 0x4B00143B, (7, 0x1_0000_0000): 0x800_0000}

SAVED = Saved(
    guest=GuestConfig(memory=len(MEMORY), vcpus=2),
    page_size=host_page_size(),
    kernel="7.3.4",
    vcpus=(VCPU, VCPU),
    gic_identity=tuple(state.save_gic_identity(GIC.gic)),
    gic=tuple(state.save_gic(GIC.gic, 2, el2=False)),
    counters=dict.fromkeys(COUNTERS, 1000),
    uart=Pl011(lambda byte: None, lambda level: None).save(),
)


def written(folder: Path, changes: Mapping[str, object] | None = None) -> Path:
    """The snapshot on disk, parts of its state replaced."""
    snapshot.write(folder, {**SAVED.to_json(), **(changes or {})}, memoryview(MEMORY))
    return folder


# States that somebody else may have made.

_NUMBERS = (0, 1, -1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 64, 1 << 200, 1e300, float("inf"), float("nan"))
_TEXTS = ("", "0x0", "0x40000000", "00", "arm64", "private", "hugetlb", "\ud800", "\x1b[2J", "9" * 5000)
_SCALARS = st.none() | st.booleans() | st.sampled_from(_NUMBERS) | st.sampled_from(_TEXTS)
_JSON = st.recursive(
    _SCALARS | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_ALIKE: tuple[Callable[[Any], object], ...] = (
    lambda value: [value],
    lambda value: {str(value): value},
    str,
    lambda value: float(value) if isinstance(value, int) else f" {value}",
    lambda value: -value - 1 if isinstance(value, int) else f"{value}0",
)


def whole_state() -> dict[str, Any]:
    """The state as it is in a file, of a guest whose memory is all zeroes."""
    sums = [None] * (len(MEMORY) // CHUNK)
    memory = {"size": len(MEMORY), "chunk": CHUNK, "crc32": sums}
    return dict(json.loads(json.dumps({**SAVED.to_json(), "memory": memory})))


@st.composite
def changed_states(draw: st.DrawFn) -> dict[str, Any]:
    """The state with another value in one place, with one value less, or with one that has another name."""
    state = whole_state()
    where: Any = state
    name: Any = draw(st.sampled_from(sorted(state)))
    while isinstance(where[name], dict | list) and draw(st.integers(0, 7)):
        where = where[name]
        name = draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
    how = draw(st.sampled_from(["put", "put", "alike", "remove", "rename"]))
    before = where[name]
    if how in ("remove", "rename"):
        del where[name]
        if how == "rename" and isinstance(where, dict):
            where[draw(st.sampled_from(_TEXTS) | st.text(max_size=20))] = before
    else:
        where[name] = draw(_SCALARS | _JSON) if how == "put" else draw(st.sampled_from(_ALIKE))(before)
    return state


def with_empty_memory(folder: Path) -> Path:
    """A folder for a snapshot, with memory that is all zeroes, and no state yet."""
    folder.mkdir()
    (folder / snapshot.MEMORY).touch()
    os.truncate(folder / snapshot.MEMORY, len(MEMORY))
    return folder


def with_state(folder: Path, state: object) -> Path:
    """The snapshot with another state, whose sum is right."""
    body = json.dumps(state).encode()
    head = f"prefault-snapshot 1 {len(body)} {zlib.crc32(body):08x}\n".encode()
    (folder / snapshot.STATE).write_bytes(head + body)
    return folder
