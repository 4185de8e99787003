# SPDX-License-Identifier: Apache-2.0
"""What to do with a plan, step by step, with the commands for it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prefault.faults.costs import POPULATED
from prefault.faults.plan import Plan
from prefault.faults.planning import PlanConfig
from prefault.faults.recording import Recording
from prefault.report.plan import number


@dataclass(frozen=True)
class Files:
    """What things are called in commands.

    :ivar recordings: files that the plan is made from; if not known, words stand for them
    :ivar plan: the plan's file; None if it was not written
    :ivar options: of `prefault plan`, which a plan itself does not tell
    """

    recordings: tuple[str, ...] = ()
    plan: str | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """Something to do.

    :ivar command: for a shell; empty if there is none
    """

    text: str
    command: str = ""


POPULATE = Step(
    "Let your VMM populate the guest's memory for writing before it pre-faults: "
    "madvise(…, MADV_POPULATE_WRITE) on the ranges of the plan."
)
POPULATE_ALL = Step(
    "Pre-fault nothing. Let your VMM populate the guest's memory for writing before the guest runs: "
    "madvise(…, MADV_POPULATE_WRITE). And leave dirty logging off until it is needed."
)

RECORD_AGAIN = Step(
    "If the recording missed the moment that you care about, make another: start or restore the VM "
    "paused, run this, and let it go on. PID is the process id of its VMM (QEMU, Firecracker, …).",
    "prefault record --pid PID --seconds 10 -o again.parquet && prefault plan again.parquet",
)


def _lower(step: Step) -> str:
    return step.text[:1].lower() + step.text[1:]


def next_steps(plan: Plan, recordings: Sequence[Recording], files: Files) -> Iterator[Step]:
    """In order; the first says what is the matter, if there is anything."""
    kinds = {one.kind for one in plan.advice}
    if "no-guest-memory" in kinds:
        yield Step("Do nothing with this plan: it has no addresses of a guest's memory.")
    elif "several-vms" in kinds:
        yield from _one_vm(plan, recordings, files)
    elif plan.pays:
        if "nested-guests" in kinds:
            yield POPULATE
        elif "if-not-populated" in kinds:
            yield replace(
                POPULATE, text=f"If nobody has touched the guest's memory by then: {_lower(POPULATE)}"
            )
        yield from _apply(plan, files)
    elif "smaller-granule-pays" in kinds:
        yield Step(
            "Plan by single pages: what lies between the pages that the guest needs costs too much here.",
            _plan_command(replace(plan, granule=plan.page_size), files, "-o plan.json"),
        )
    elif plan.prediction.permission_ns and plan.ranges:
        yield from _populate(plan, files)
    elif not plan.ranges and "populate-for-writing" in kinds:
        yield POPULATE_ALL
        yield RECORD_AGAIN
    else:
        yield from _leave(plan)


def _one_vm(plan: Plan, recordings: Sequence[Recording], files: Files) -> Iterator[Step]:
    pids = np.concatenate([one.faults.pid for one in recordings])
    known, count = np.unique(pids[pids >= 0], return_counts=True)
    if len(known) < 2:
        yield Step(
            "Record one VM by itself. PID is the process id of its VMM (QEMU, Firecracker, …).",
            "prefault record --pid PID --seconds 10 -o one.parquet",
        )
        return
    most = int(known[np.argmax(count)])
    yield Step(
        f"Plan for one VM at a time, for instance for process {most}, which has most of the faults.",
        _plan_command(plan, files, f"--pid {most} -o plan.json"),
    )


def _apply(plan: Plan, files: Files) -> Iterator[Step]:
    name = shlex.quote(files.plan or "plan.json")
    if not files.plan:
        yield Step(
            "Write the plan to a file: give the recordings and options again that this page was made with.",
            _plan_command(plan, files, "-o plan.json"),
        )
    yield Step(
        "On the host, see whether its kernel can pre-fault: KVM_CAP_PRE_FAULT_MEMORY must not be “no”. If it "
        "is, the host needs another kernel (x86: Linux 6.11; arm64: the series that comes with prefault).",
        "prefault probe",
    )
    yield Step(
        "Start or restore the same VM again, paused if you can, with the same memory, and see what would be "
        "done. PID is the process id of its VMM (QEMU, Firecracker, …). This changes nothing.",
        f"prefault apply {name} --pid PID --dry-run",
    )
    yield Step(
        "Pre-fault, as root, as early as you can: best before the guest goes on.",
        f"prefault apply {name} --pid PID",
    )
    yield Step(
        f"Record, let the guest go on, and compare: of {number(plan.prediction.faults)} faults on memory, "
        f"about {number(plan.prediction.faults_saved)} should be gone.",
        "prefault record --pid PID --seconds 10 -o after.parquet && prefault plan after.parquet",
    )
    yield Step(
        "If it helps, let your VMM do it each time: call the ioctl for each range of the plan before the "
        "vCPUs run for the first time. prefault's docs/apply.md has the code, in Python and in C."
    )


def _populate(plan: Plan, files: Files) -> Iterator[Step]:
    yield POPULATE
    yield Step(
        "See what pre-faulting saves then.",
        _plan_command(plan, files, "", memory=plan.prediction.memory.partition("/")[0] + "/write"),
    )


def _leave(plan: Plan) -> Iterator[Step]:
    if plan.ranges:
        yield Step("Leave it as it is: for this guest, pre-faulting is not worth the trouble.")
    else:
        yield Step("Pre-fault nothing: no fault of this recording would be spared.")
    yield RECORD_AGAIN


def _plan_command(plan: Plan, files: Files, rest: str, memory: str | None = None) -> str:
    """``prefault plan`` as it was called, as far as a plan says."""
    memory = memory or plan.prediction.memory
    default = PlanConfig()
    unknown = ["RECORDING"] if plan.runs == 1 else [f"RECORDING{run + 1}" for run in range(plan.runs)]
    words = ["prefault plan", *map(shlex.quote, files.recordings or unknown)]
    if plan.granule != default.granule:
        words.append(f"--granule {plan.granule}")
    if plan.cap is not None:
        words.append(f"--cap {plan.cap}")
    if plan.over != default.over:
        words.append(f"--over {plan.over}")
    if memory != POPULATED:
        words.append(f"--memory {memory}")
    # A --pid that is asked for takes the place of others.
    words += [one for one in files.options if not (one.startswith("--pid") and "--pid" in rest)]
    return " ".join([*words, rest]).strip()
