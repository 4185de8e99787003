# SPDX-License-Identifier: Apache-2.0
"""What a plan comes to, in sentences with the numbers first."""

from __future__ import annotations

from collections.abc import Iterator

from prefault.faults.plan import Plan, Prediction
from prefault.faults.planning import USELESS
from prefault.report.units import format_duration, plural, round_size

_COSTS = {
    "recording": (
        "A fault's cost is the mean of those recorded; "
        "pre-faulting's is that, times a ratio measured in the lab."
    ),
    "given": "Costs are as given; what was not given is in proportion to that, by figures of the lab.",
    "estimate": (
        "The recording has no durations of these faults: costs are the lab's instructions, taken for 1 ns "
        "each. Record kvm_exit and kvm_entry as well, or give --fault-cost, for better ones."
    ),
}


_STATES = {
    "write": "memory that the host has populated for writing before, as by reading a snapshot into it",
    "read": "memory that the host has populated for reading before",
    "nothing": "memory that the host has not populated",
}


def number(value: float) -> str:
    """A mean of counts."""
    return f"{value:,.0f}"


def _faults(count: float) -> str:
    """One is singular, a mean of several runs is not."""
    return "1 stage-2 fault" if count == 1 else f"{number(count)} stage-2 faults"


def sentences(plan: Plan, seconds: float) -> Iterator[str]:
    """The plan in short.

    :param seconds: how long the recordings are, on average
    """
    told = plan.prediction
    run = "your guest" if plan.runs == 1 else f"your guest ({plan.runs} runs, on average)"
    yield (
        f"In {format_duration(seconds * 1e9)}, {run} took {_faults(told.faults)} on memory that was not "
        f"mapped yet, costing {format_duration(told.faults_ns)} of its vCPUs' time."
    )
    if not plan.ranges:
        yield "There is nothing to pre-fault."
        return
    unit = "2 MiB block" if told.memory.startswith(("thp", "hugetlb")) else "page"
    yield (
        f"Pre-faulting {round_size(plan.size)} in {plural(len(plan.ranges), 'range')} takes about "
        f"{format_duration(told.prefault_ns)} ({format_duration(told.prefault_page_ns)} a {unit}) and saves "
        f"{number(told.faults_saved)} of these faults: {format_duration(told.time_saved_ns)}."
    )
    if told.permission_ns:
        yield (
            f"Of memory in the state '{told.memory}', writes fault again afterwards: "
            f"{format_duration(told.permission_ns)}."
        )
    yield verdict(plan, told)
    state = _STATES[told.memory.partition("/")[2]]
    yield f"This is for {state} ({told.memory}); for other memory, give --memory."
    yield _COSTS[told.costs]


def verdict(plan: Plan, told: Prediction) -> str:
    """Whether it pays."""
    if any(one.kind in USELESS for one in plan.advice):
        return "As it is, this plan is of no use."
    if plan.pays:
        return f"It pays: {format_duration(told.net_ns)} of vCPU time is saved in each run."
    if told.net_ns > 0:
        return f"It does not pay: {format_duration(told.net_ns)} is too little to care about."
    return f"It does NOT pay: it costs {format_duration(abs(told.net_ns))} more than it saves."
