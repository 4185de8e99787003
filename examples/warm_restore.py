# SPDX-License-Identifier: Apache-2.0
"""A Linux guest that is restored from a snapshot: what it waits for, and what of it pre-faulting takes away.

    .venv/bin/python examples/warm_restore.py               a table, and what `prefault plan` says beforehand
    .venv/bin/python examples/warm_restore.py --task write  a guest that writes what it has
    .venv/bin/python examples/warm_restore.py --task hash   a guest that computes more than it touches
    .venv/bin/python examples/warm_restore.py --nested      the guest's own guest has to answer

The guest keeps a file of 24 MiB. It is stopped when it says that it is ready, and restored in several ways;
each time it has to read, overwrite or hash all of the file, and answer. First it is restored twice and its
stage-2 faults are recorded, of which plans are made. All others run on a machine whose clock counts
instructions, so the figures are the same each time; faults are counted in a run of their own, for counting
takes time. About five minutes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from prefault.errors import LabError
from prefault.faults.convert import convert_bytes
from prefault.faults.costs import Given
from prefault.faults.plan import Plan
from prefault.faults.planning import PlanConfig, make_plan
from prefault.lab import build, guestfs
from prefault.lab.job import Job, JobResult, run_job
from prefault.lab.machine import MachineOptions
from prefault.lab.quiet import quietly
from prefault.report.plan import sentences
from prefault.vmm.config import GuestConfig
from prefault.vmm.order import COMMAND_LINE, Boot, How, Restore, Watch, plain

READY, ANSWER = "ready to be stopped", "the answer is"
TASKS = {
    "read": "dd if=/tmp/file of=/dev/null bs=64k 2>&1",
    "write": "dd if=/dev/zero of=/tmp/file bs=64k count=384 conv=notrunc 2>&1",
    "hash": "sha256sum </tmp/file",
}
SCRIPT = f"""\
head -c 25165824 /dev/urandom >/tmp/file
echo {READY}
echo "{ANSWER} $(%s)"
poweroff -f
"""
L1_SCRIPT = "python3 -S -m prefault.vmm /l2/order /tmp/result; poweroff -f\n"
MEMORY = {"eager": "private/write", "map": "file-private/nothing"}
"""What is behind the guest's memory when it is pre-faulted, in the words of `prefault plan --memory`."""
INSIDE = "/root/example"
RECORDED = Path(__file__).with_name("inside") / "recorded.py"
TAKEN, PACKED, GIVEN = "/tmp/taken", "/tmp/taken.pack", "/tmp/given"
LAB_MIB = 4096


@dataclass(frozen=True)
class Case:
    """A way to restore. What is pre-faulted, and brought first, is the plan where ``planned`` says so."""

    how: How
    what: str
    populated: bool = False
    pre_fault_all: bool = False
    planned: bool = False

    def order(self, plan: Plan, count: bool) -> Restore:
        """What the VMM is asked to do."""
        ranges = tuple((one.ipa, one.size) for one in plan.ranges) if self.planned else ()
        return Restore(
            folder=GIVEN,
            how=self.how,
            check=False,
            guest={"resident": "write" if self.populated else "nothing"},
            first=ranges if self.how is How.USERFAULTFD else (),
            pre_fault=ranges,
            pre_fault_all=self.pre_fault_all,
            watch=Watch(stop=ANSWER, count_faults=count),
        )


NOTHING, POPULATED, ALL = "nothing", "populated (MADV_POPULATE_WRITE)", "all of it pre-faulted"
SET, BOTH = "the recorded working set pre-faulted", "populated, then all of it pre-faulted"
CASES = (
    Case(How.MAP, NOTHING),
    Case(How.MAP, POPULATED, populated=True),
    Case(How.MAP, ALL, pre_fault_all=True),
    Case(How.MAP, SET, planned=True),
    Case(How.MAP, BOTH, populated=True, pre_fault_all=True),
    Case(How.USERFAULTFD, NOTHING),
    Case(How.USERFAULTFD, ALL, pre_fault_all=True),
    Case(How.USERFAULTFD, SET, planned=True),
    Case(How.EAGER, NOTHING),
    Case(How.EAGER, POPULATED, populated=True),
    Case(How.EAGER, ALL, pre_fault_all=True),
    Case(How.EAGER, SET, planned=True),
    Case(How.EAGER, BOTH, populated=True, pre_fault_all=True),
)


@dataclass(frozen=True)
class Row:
    """What came of a case.

    :ivar faults: stage-2 faults until the answer
    :ivar restore: instructions until the guest could run, pre-faulting included
    :ivar pre_fault: those of pre-faulting
    :ivar run: instructions from there to the answer
    """

    case: Case
    faults: int
    restore: int
    pre_fault: int
    run: int


def _vmm(name: str) -> str:
    return f"python3 -m prefault.vmm {INSIDE}/{name} {INSIDE}/{name}.result"


def initrd(task: str, nested: bool) -> bytes:
    """The guest's root file system; of a hypervisor, with Python, the VMM, and a guest of its own."""
    plainly = guestfs.archive(SCRIPT % TASKS[task])
    if not nested:
        return plainly
    order = Boot("/l2/Image", "/l2/initrd", GuestConfig(memory=96 << 20), f"{COMMAND_LINE} quiet")
    added = {
        order.image: build.kernel_image().read_bytes(),
        order.initrd: plainly,
        "/l2/order": json.dumps(plain(order)).encode(),
    }
    return guestfs.archive(L1_SCRIPT, added, python=True)


def snapshot_and_recordings(task: str, nested: bool) -> JobResult:
    """Boot the guest, stop it, and restore it with its faults recorded."""
    boot = Boot(
        f"{INSIDE}/Image",
        f"{INSIDE}/initrd",
        GuestConfig(memory=512 << 20, el2=True) if nested else GuestConfig(memory=256 << 20),
        f"{COMMAND_LINE} quiet",
        Watch(snapshot=READY, snapshot_to=TAKEN, stop_after_snapshot=True),
    )
    files: dict[str, Any] = {
        boot.image: build.kernel_image().read_bytes(),
        boot.initrd: initrd(task, nested),
        f"{INSIDE}/recorded.py": RECORDED.read_bytes(),
        f"{INSIDE}/boot": json.dumps({**plain(boot), "pack": PACKED}).encode(),
    }
    steps = [_vmm("boot")]
    for how in recorded_ways(nested):
        restore = Restore(folder=TAKEN, how=how, watch=Watch(stop=ANSWER))
        files[f"{INSIDE}/{how.value}"] = json.dumps(plain(restore)).encode()
        steps.append(f"python3 {INSIDE}/recorded.py /tmp/{how.value} {_vmm(how.value)}")
    argv = ("sh", "-ec", "\n".join(steps))
    job = Job(quietly(argv), files, collect=(PACKED, "/tmp/eager", "/tmp/map"), timeout=900)
    return _good(run_job(job, MachineOptions(memory_mib=LAB_MIB)))


def recorded_ways(nested: bool) -> tuple[How, ...]:
    """A hypervisor wants memory of its own: a page that KVM gives back costs its guest all shadow tables."""
    return (How.EAGER,) if nested else (How.EAGER, How.MAP)


def _good(done: JobResult) -> JobResult:
    if done.status:
        raise LabError(f"a step ended with status {done.status}; see {done.run_dir}\n{done.stderr.decode()}")
    return done


def plan_from(capture: bytes, memory: str) -> tuple[Plan, float]:
    """What `prefault record --from` and `prefault plan --memory` make of a capture; and its seconds."""
    recording = convert_bytes(capture, "capture").recording
    return make_plan([recording], PlanConfig(given=Given(memory))).plan, recording.metadata.seconds


def measured(packed: bytes, cases: Sequence[Case], plan: Plan) -> Iterator[Row]:
    """Each case, once with its faults counted and once with its instructions."""
    files: dict[str, Any] = {f"{INSIDE}/given.pack": packed}
    steps, names = [], []
    unpack: dict[str, object] = {"unpack": f"{INSIDE}/given.pack"}
    for index, case in enumerate(cases):
        for count in (True, False):
            name = f"{index}-{'faults' if count else 'instructions'}"
            files[f"{INSIDE}/{name}"] = json.dumps({**plain(case.order(plan, count)), **unpack}).encode()
            steps.append(_vmm(name))
            names.append(f"{INSIDE}/{name}.result")
            unpack = {}  # it is there from the first one on
    job = Job(quietly(("sh", "-ec", "\n".join(steps))), files, collect=tuple(names), timeout=3600)
    done = _good(run_job(job, MachineOptions(memory_mib=LAB_MIB, icount=True)))
    outcomes = [json.loads(done.files[name]) for name in names]
    for case, counted, timed in zip(cases, outcomes[::2], outcomes[1::2], strict=True):
        yield _row(case, counted["faults"], timed)


def _row(case: Case, faults: Mapping[str, int], timed: Mapping[str, Any]) -> Row:
    total = sum(faults[kind] for kind in ("read", "write", "execute"))
    # A nanosecond of that machine's clock is an instruction.
    restore, before, run = (
        round(1e9 * timed[name]) for name in ("restore_seconds", "pre_fault_seconds", "ready_seconds")
    )
    return Row(case, total, restore, before, run)


def _table(rows: list[Row]) -> Table:
    table = Table(title="A Linux guest restored, until it answers: millions of instructions", box=None)
    for heading in ("memory", "beforehand"):
        table.add_column(heading)
    for heading in ("stage-2 faults", "restore", "of that pre-fault", "then run", "together"):
        table.add_column(heading, justify="right")
    for row in rows:
        costs = (row.restore, row.pre_fault, row.run, row.restore + row.run)
        table.add_row(
            row.case.how.value, row.case.what, f"{row.faults:,}", *(f"{n / 1e6:,.1f}" for n in costs)
        )
    return table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of a table.")
@click.option("--task", type=click.Choice(list(TASKS)), default="read", show_default=True)
@click.option("--nested", is_flag=True)
def main(as_json: bool, task: str, nested: bool) -> None:
    """Restore a Linux guest from a snapshot in several ways, and count."""
    console, progress = Console(width=130), Console(stderr=True)
    progress.print("booting the guest, taking the snapshot, recording its faults")
    done = snapshot_and_recordings(task, nested)
    ways = [how.value for how in recorded_ways(nested)]
    plans = {how: plan_from(done.files[f"/tmp/{how}"], MEMORY[how]) for how in ways}
    cases = [case for case in CASES if case.how is How.EAGER or not nested]
    progress.print(f"restoring in {len(cases)} ways, each of them twice")
    rows = list(measured(done.files[PACKED], cases, plans["eager"][0]))
    if as_json:
        values = [
            dataclasses.asdict(row) | {"case": row.case.what, "how": row.case.how.value} for row in rows
        ]
        click.echo(
            json.dumps({"rows": values, "plans": {how: one.to_json() for how, (one, _) in plans.items()}})
        )
        return
    console.print(_table(rows))
    for how, (plan, seconds) in plans.items():
        console.print(f"\n`prefault plan --memory {MEMORY[how]}` on the recording of {how}:")
        for sentence in sentences(plan, seconds):
            console.print(sentence, markup=False)
        for advice in plan.advice:
            console.print(f"- {advice.text}.", markup=False)


if __name__ == "__main__":
    main()
