# SPDX-License-Identifier: Apache-2.0
"""The stage-2 tables of a guest that walks its memory: before, pre-faulted, and after the walk.

``python3 -m prefault.scenarios.tables --json CONFIG`` prints them as one line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from prefault.errors import PrefaultError, UsageError
from prefault.machine import Kvm
from prefault.scenarios.walk import prepare, read_config
from prefault.scenarios.walk_result import WalkConfig
from prefault.scenarios.walker import Walker


@dataclass(frozen=True)
class Stage:
    """A moment of the walk.

    :ivar tables: the canonical table, then shadow tables, as ``Vm.ptdump`` gives them
    """

    name: str
    tables: tuple[str, ...]


@dataclass(frozen=True)
class TablesResult:
    """A walk and its tables.

    :ivar slots: gpa and size of each memslot
    """

    config: WalkConfig
    page_size: int
    slots: dict[str, tuple[int, int]]
    stages: tuple[Stage, ...]

    def to_json(self) -> dict[str, object]:
        """As JSON types."""
        return {**dataclasses.asdict(self), "config": self.config.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, object]) -> TablesResult:
        """Back from ``to_json``."""
        config, page_size, slots, stages = (values[one.name] for one in dataclasses.fields(cls))
        assert isinstance(config, dict) and isinstance(page_size, int)
        assert isinstance(slots, dict) and isinstance(stages, list)
        return cls(
            WalkConfig.from_json(config),
            page_size,
            {name: (int(gpa), int(size)) for name, (gpa, size) in slots.items()},
            tuple(Stage(one["name"], tuple(one["tables"])) for one in stages),
        )


def tables(kvm: Kvm, config: WalkConfig) -> TablesResult:
    """Walk with pre-faulting, and look at the tables on the way.

    :raises CapabilityMissing: this KVM cannot pre-fault, has no such backing, or does not show its tables
    """
    config = prepare(kvm, config)
    with Walker(kvm, config, config.prefault_permille) as walker:
        stages = tuple(Stage(name, tuple(walker.vm.ptdump())) for name in walker.stages())
        return TablesResult(config, kvm.page_size, walker.slots, stages)


def main(argv: Sequence[str] | None = None) -> int:
    """Show the tables on this host's KVM; print them, or the error, as JSON."""
    from prefault.kvm import open_kvm  # the one place that says which back end it is

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if len(arguments) != 2 or arguments[0] != "--json":
            raise UsageError("usage: python3 -m prefault.scenarios.tables --json CONFIG")
        with open_kvm() as kvm:
            print(json.dumps(tables(kvm, read_config(arguments[1])).to_json()))
    except PrefaultError as error:
        print(json.dumps({"error": {"message": str(error), "exit_code": int(error.exit_code)}}))
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
