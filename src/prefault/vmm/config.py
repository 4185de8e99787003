# SPDX-License-Identifier: Apache-2.0
"""What a guest is made of, and where it has what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from prefault.errors import UsageError
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
        if self.backing not in GUEST_MEMORY:
            raise UsageError(f"a guest's memory cannot be on backing {self.backing.value}")

    def to_json(self) -> dict[str, object]:
        """A form that ``from_json`` reads."""
        return {**asdict(self), "backing": self.backing.value, "resident": self.resident.value}

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> GuestConfig:
        """Read what ``to_json`` gave.

        :raises ValueError: a value cannot be
        """
        kinds = {"backing": Backing, "resident": Resident}
        return cls(**{name: kinds[name](value) if name in kinds else value for name, value in raw.items()})  # type: ignore[arg-type]
