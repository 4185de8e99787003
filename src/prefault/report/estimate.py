# SPDX-License-Identifier: Apache-2.0
"""What a walk would cost on a real kernel: faults that the spec counted, times figures from the lab.

``figures.json`` holds the figures: instructions, measured by ``benchmarks/figures.py`` on the lab's kernel.
A walk's cost is linear in them: a guest's accesses, exits to user space, and stage-2 faults by kind.
A permission fault is counted together with the write fault that follows it, because breaking
copy-on-write invalidates the leaf and so makes the guest fault once more.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from prefault.machine import FaultCounts
from prefault.scenarios.walk_result import Phase, WalkConfig, WalkResult, WalkRun

Costs = Mapping[str, float]
"""Instructions by kind of fault: ``read``, ``write``, ``permission``."""

WITHOUT, PREFAULTED = "without", "prefaulted"


@dataclass(frozen=True)
class Figures:
    """Instructions, from the lab.

    :ivar measured: what they were measured on
    :ivar access: one access of the guest to mapped memory
    :ivar exit: one exit to user space and back
    :ivar call: one KVM_PRE_FAULT_MEMORY call by the library, without what it does for each leaf
    :ivar prefault: one leaf, by ``key()``
    :ivar faults: one fault; by who takes it, ``key()``, and whether the memory was pre-faulted
    """

    measured: str
    access: float
    exit: float
    call: float
    prefault: Mapping[str, float]
    faults: Mapping[str, Mapping[str, Mapping[str, Costs]]]


def key(config: WalkConfig) -> str:
    """What the figures of a walk are filed under."""
    return f"{config.backing.value}/{config.resident.value}"


def who(config: WalkConfig, phase: Phase) -> str:
    """Who walks in a phase: ``guest``, or in a nested walk ``l2`` or ``l1``."""
    if not config.nested:
        return "guest"
    return "l1" if phase.name.startswith("L1") else "l2"


def split(faults: FaultCounts) -> dict[str, int]:
    """Faults by the kinds that have figures."""
    pairs = faults.permission
    return {"read": faults.read, "write": max(faults.write - 2 * pairs, 0), "permission": pairs}


def accesses(config: WalkConfig, page_size: int, phase: Phase) -> int:
    """Accesses of all vCPUs in a phase."""
    whole = config.size // (config.stride or page_size)
    return whole if phase.name.startswith("L1") else whole // 2


def load_figures() -> Figures:
    """The figures that this version of the project was measured with."""
    values = json.loads(files("prefault.report").joinpath("figures.json").read_text())
    return Figures(**values)


def estimate(result: WalkResult, figures: Figures) -> WalkResult:
    """The same walk with instructions in place of the time that it took. The figures are for 4 KiB pages."""
    share = result.config.prefault_permille / 1000
    return dataclasses.replace(
        result,
        without=_estimate(result.without, result, figures, 0),
        with_prefault=_estimate(result.with_prefault, result, figures, share),
    )


def _estimate(run: WalkRun, result: WalkResult, figures: Figures, share: float) -> WalkRun:
    config = result.config
    phases = tuple(
        dataclasses.replace(one, ns=round(_phase(one, result, figures, share))) for one in run.phases
    )
    leaves = sum(run.leaves.values()) * run.prefaulted_bytes / config.size
    calls = config.vcpus if run.prefaulted_bytes else 0
    cost = calls * figures.call + leaves * figures.prefault[key(config)]
    return dataclasses.replace(run, phases=phases, prefault_ns=round(cost))


def _phase(phase: Phase, result: WalkResult, figures: Figures, share: float) -> float:
    config = result.config
    filed = figures.faults[who(config, phase)][key(config)]
    faults = sum(
        number * _fault(filed, kind, share) for kind, number in split(phase.faults).items() if number
    )
    return accesses(config, result.page_size, phase) * figures.access + phase.exits * figures.exit + faults


def _fault(filed: Mapping[str, Costs], kind: str, share: float) -> float:
    """One fault where ``share`` of the memory was pre-faulted; a figure of one side only counts alone."""
    without, prefaulted = filed[WITHOUT].get(kind), filed[PREFAULTED].get(kind)
    if without is None or prefaulted is None:
        return without or prefaulted or 0.0
    return without * (1 - share) + prefaulted * share
