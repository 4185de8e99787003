# SPDX-License-Identifier: Apache-2.0
"""What a guest is made of, and where it has what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from prefault.errors import UsageError
from prefault.faults.foreign import known
from prefault.kvm.device import GIC_REDISTRIBUTORS
from prefault.machine import GUEST_MEMORY, Backing, Resident

RAM_BASE = 0x4000_0000
UART_BASE = 0x0900_0000
UART_SIZE = 0x1000
UART_SPI = 1
MAX_VCPUS = 8
IRQS = 64
"""Of the GIC: 32 private ones of each vCPU, and 32 shared ones."""

MIB = 1 << 20
MIN_MEMORY = 16 * MIB
MAX_MEMORY = (1 << 40) - RAM_BASE
"""Guests have 40 bits of address."""
_REDISTRIBUTOR_SIZE = 0x2_0000

assert GIC_REDISTRIBUTORS + MAX_VCPUS * _REDISTRIBUTOR_SIZE <= UART_BASE


@dataclass(frozen=True)
class GuestConfig:
    """A guest's hardware."""

    memory: int = 256 * MIB
    """Bytes of RAM, from RAM_BASE on."""
    vcpus: int = 1
    backing: Backing = Backing.PRIVATE
    huge_page_size: int = 0
    """For Backing.HUGETLB; 0 is the host's default."""
    resident: Resident = Resident.NOTHING
    """What the host populates before the guest runs."""
    el2: bool = False
    """vCPUs boot at virtual EL2, and the guest can have guests."""

    def __post_init__(self) -> None:
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise UsageError(f"{self.vcpus} vCPUs: a guest has 1 to {MAX_VCPUS}")
        if self.memory < MIN_MEMORY or self.memory % (2 * MIB):
            raise UsageError(
                f"{self.memory:#x} bytes of memory: a guest has at least {MIN_MEMORY // MIB} MiB, "
                "in multiples of 2 MiB"
            )
        if self.memory > MAX_MEMORY:
            raise UsageError(f"{self.memory:#x} bytes of memory: a guest has at most {MAX_MEMORY:#x}")
        if not 0 <= self.huge_page_size <= MAX_MEMORY or self.huge_page_size.bit_count() > 1:
            raise UsageError(f"{self.huge_page_size} bytes: the size of a page is a power of two")
        if self.backing not in GUEST_MEMORY:
            raise UsageError(f"a guest's memory cannot be on backing {self.backing.value}")

    def to_json(self) -> dict[str, object]:
        """A form that ``from_json`` reads."""
        return {**asdict(self), "backing": self.backing.value, "resident": self.resident.value}

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> GuestConfig:
        """Read what ``to_json`` gave.

        :raises TypeError, ValueError: a value cannot be, or it has something that guests here have not
        :raises UsageError: it has too much or too little of something
        """
        found: dict[str, Any] = known(cls, raw)
        unknown = sorted(set(raw) - {one.name for one in fields(cls)})
        if unknown:  # hardware that it would miss
            raise ValueError(f"guests here have no {unknown[0]!r}")
        for name, kind in (("backing", Backing), ("resident", Resident)):
            if name in found:
                found[name] = kind(found[name])
        return cls(**found)
