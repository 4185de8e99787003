# SPDX-License-Identifier: Apache-2.0
"""What a walk is asked for and what it gives: plain values, to and from JSON."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field

from prefault.errors import UsageError
from prefault.machine import Backing, FaultCounts, Resident


class When(enum.Enum):
    """When memory is pre-faulted."""

    BEFORE = "before"
    """Before the guest runs at all."""
    WHILE_RUNNING = "while-running"
    """When the guest, or its L2, has walked one half and stands in an exit."""


@dataclass(frozen=True)
class WalkConfig:
    """What is walked, and how."""

    size: int = 32 << 20
    backing: Backing = Backing.PRIVATE
    resident: Resident = Resident.WRITE
    vcpus: int = 1
    nested: bool = False
    write_permille: int = 500
    prefault_permille: int = 1000
    when: When = When.BEFORE
    stride: int = 0
    """Bytes from one access to the next; 0 is the host's page size."""
    page_size: int = 0
    """Huge page size for Backing.HUGETLB; 0 is the host's default."""

    def to_json(self) -> dict[str, object]:
        """As JSON types."""
        values = dataclasses.asdict(self)
        return {
            name: value.value if isinstance(value, enum.Enum) else value for name, value in values.items()
        }

    @classmethod
    def from_json(cls, values: dict[str, object]) -> WalkConfig:
        """Back from ``to_json``; what is not there has its default.

        :raises UsageError: a name or value is unknown
        """
        kinds: dict[str, type[enum.Enum]] = {"backing": Backing, "resident": Resident, "when": When}
        try:
            converted = {
                name: kinds[name](value) if name in kinds else value for name, value in values.items()
            }
            return cls(**converted)  # type: ignore[arg-type]  # names and values come from outside
        except (TypeError, ValueError) as error:
            raise UsageError(f"not a walk: {error}; see WalkConfig for what there is") from error


@dataclass(frozen=True)
class Phase:
    """One leg of the walk, by all vCPUs together.

    :ivar name: ``first half``, ``second half``, or ``L1 after L2``
    :ivar ns: time on the monotonic clock; under icount, instructions
    :ivar exits: returns of KVM_RUN
    """

    name: str
    ns: int
    exits: int
    faults: FaultCounts = field(default_factory=FaultCounts)


@dataclass(frozen=True)
class WalkRun:
    """One walk. The faults come from a run of their own."""

    phases: tuple[Phase, ...]
    prefault_ns: int
    prefaulted_bytes: int
    leaves: dict[str, int]
    """Leaves of the canonical table in the walked range, by level."""
    shadow_leaves: dict[str, int]
    """The same of all shadow tables together."""
    bytes_checked: int

    @property
    def faults(self) -> FaultCounts:
        """Stage-2 faults of all phases, without their IPAs."""
        total = FaultCounts()
        for phase in self.phases:
            for kind in _KINDS:
                setattr(total, kind, getattr(total, kind) + getattr(phase.faults, kind))
        return total

    @property
    def exits(self) -> int:
        """Returns of KVM_RUN in all phases."""
        return sum(phase.exits for phase in self.phases)

    @property
    def walk_ns(self) -> int:
        """Time of all phases."""
        return sum(phase.ns for phase in self.phases)

    def to_json(self) -> dict[str, object]:
        """As JSON types, totals included."""
        return {
            "faults": _faults_json(self.faults),
            "exits": self.exits,
            "walk_ns": self.walk_ns,
            "prefault_ns": self.prefault_ns,
            "prefaulted_bytes": self.prefaulted_bytes,
            "leaves": self.leaves,
            "shadow_leaves": self.shadow_leaves,
            "bytes_checked": self.bytes_checked,
            "phases": [
                {"name": one.name, "ns": one.ns, "exits": one.exits, "faults": _faults_json(one.faults)}
                for one in self.phases
            ],
        }

    @classmethod
    def from_json(cls, values: dict[str, object]) -> WalkRun:
        """Back from ``to_json``."""
        names = [one.name for one in dataclasses.fields(cls) if one.name != "phases"]
        phases = values["phases"]
        assert isinstance(phases, list)
        legs = tuple(Phase(**{**one, "faults": FaultCounts(**one["faults"])}) for one in phases)
        rest = {name: values[name] for name in names}
        return cls(phases=legs, **rest)  # type: ignore[arg-type]  # to_json() wrote these types


_KINDS = ("read", "write", "execute", "permission", "mmio")


def _faults_json(faults: FaultCounts) -> dict[str, int]:
    return {kind: getattr(faults, kind) for kind in _KINDS}


@dataclass(frozen=True)
class WalkResult:
    """Both walks."""

    config: WalkConfig
    page_size: int
    without: WalkRun
    with_prefault: WalkRun

    def to_json(self) -> dict[str, object]:
        """As JSON types."""
        return {
            "config": self.config.to_json(),
            "page_size": self.page_size,
            "without": self.without.to_json(),
            "with_prefault": self.with_prefault.to_json(),
        }

    @classmethod
    def from_json(cls, values: dict[str, object]) -> WalkResult:
        """Back from ``to_json``."""
        config, size = values["config"], values["page_size"]
        without, with_prefault = values["without"], values["with_prefault"]
        assert isinstance(config, dict) and isinstance(size, int)
        assert isinstance(without, dict) and isinstance(with_prefault, dict)
        return cls(
            WalkConfig.from_json(config), size, WalkRun.from_json(without), WalkRun.from_json(with_prefault)
        )
