# SPDX-License-Identifier: Apache-2.0
"""Recordings as a trace for the Perfetto viewer (ui.perfetto.dev) and for chrome://tracing.

Each run is a process there, each vCPU a thread with a slice for each fault, as long as the guest waited; the
working set and what the plan covers of it are counters. Times are µs from the run's first fault.

Source: Trace Event Format (JSON): ph X complete, i instant, C counter, M metadata
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from prefault.faults.plan import Plan
from prefault.faults.planning import Made, covered
from prefault.faults.recording import Recording
from prefault.faults.syndrome import ACCESSES, KINDS
from prefault.faults.working_set import WorkingSet
from prefault.report.heat import label_of

_BATCH = 50_000
_POINTS = 2000
"""Of a counter, at most."""

_MIB = 1 << 20

Int64 = npt.NDArray[np.int64]


def trace(made: Made, recordings: Sequence[Recording]) -> Iterator[str]:
    """The trace, in pieces."""
    yield '{"displayTimeUnit":"ns","traceEvents":[\n'
    lines = _lines(made, recordings)
    yield next(lines)
    for line in lines:
        yield f",\n{line}"
    yield "\n]}\n"


def _lines(made: Made, recordings: Sequence[Recording]) -> Iterator[str]:
    for number, (recording, needed) in enumerate(zip(recordings, made.sets, strict=True), 1):
        name = f"run {number}: {recording.metadata.source or 'recording'}"
        yield json.dumps({"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}})
        names, thread = _tracks(recording)
        for tid, name in enumerate(names, 1):
            args = {"name": name}
            yield json.dumps({"ph": "M", "name": "thread_name", "pid": number, "tid": tid, "args": args})
        yield from _slices(number, recording, made.plan, thread)
        yield from _counters(number, needed, made.plan)


def _tracks(recording: Recording) -> tuple[list[str], Int64]:
    """Names of the vCPUs, and the number of each fault's, from 1; those of two VMs are two."""
    pid, label = recording.faults.pid.astype(np.int64), recording.vcpu_labels()
    _, first, index = np.unique(pid * (1 << 32) + label, return_index=True, return_inverse=True)
    several = len(np.unique(pid)) > 1
    names = [
        label_of(int(label[at]), recording) + (f" of process {pid[at]}" if several and pid[at] >= 0 else "")
        for at in first
    ]
    return names, index + 1


def _slices(number: int, recording: Recording, plan: Plan, thread: Int64) -> Iterator[str]:
    faults, size = recording.faults, recording.metadata.page_size
    start = int(faults.time_ns[0]) if len(faults) else 0
    planned = covered(faults.ipa // np.uint64(size), size, plan.ranges)
    duration = _within(faults.time_ns, faults.duration_ns, thread)
    for begin in range(0, len(faults), _BATCH):
        part = slice(begin, begin + _BATCH)
        columns = (
            (faults.time_ns[part] - start).tolist(),
            duration[part].tolist(),
            thread[part].tolist(),
            faults.ipa[part].tolist(),
            faults.kind[part].tolist(),
            faults.access[part].tolist(),
            planned[part].tolist(),
        )
        for since, spent, tid, ipa, kind, access, is_planned in zip(*columns, strict=True):
            how = f'"ph":"X","dur":{spent / 1000:.3f}' if spent >= 0 else '"ph":"i","s":"t"'
            yield (
                f'{{"name":"{KINDS[kind]} {ACCESSES[access]}","cat":"fault",{how},"ts":{since / 1000:.3f},'
                f'"pid":{number},"tid":{tid},'
                f'"args":{{"ipa":"{ipa:#x}","in the plan":{"true" if is_planned else "false"}}}}}'
            )


def _within(time: Int64, duration: Int64, thread: Int64) -> Int64:
    """Durations that end before the thread's next fault: slices of a track may not overlap.

    A duration counts from the exit, which is a moment before the fault.
    """
    order = np.argsort(thread, kind="stable")
    gap = np.full(len(time), np.iinfo(np.int64).max)
    same = thread[order][1:] == thread[order][:-1]
    gap[order[:-1]] = np.where(same, np.diff(time[order]), gap[order[:-1]])
    within: Int64 = np.minimum(duration, gap)
    return within


def _counters(number: int, needed: WorkingSet, plan: Plan) -> Iterator[str]:
    order = np.argsort(needed.first_ns, kind="stable")
    in_plan = np.cumsum(covered(needed.page, needed.page_size, plan.ranges)[order])
    count = len(order)
    for at in np.unique(np.linspace(0, count - 1, min(count, _POINTS)).astype(np.int64)) if count else ():
        touched, planned = (int(at) + 1) * needed.page_size, int(in_plan[at]) * needed.page_size
        args = {"needed": touched / _MIB, "of that in the plan": planned / _MIB}
        when = int(needed.first_ns[order[at]]) / 1000
        yield json.dumps({"ph": "C", "name": "working set (MiB)", "pid": number, "ts": when, "args": args})
