# SPDX-License-Identifier: Apache-2.0
"""Debian's own QEMU, a Linux guest restored in it, and a plan applied from outside: `prefault apply --pid`.

    .venv/bin/python examples/qemu.py           a table
    .venv/bin/python examples/qemu.py --json    and all that is behind it

QEMU runs in the lab, on its kernel with the series; it is Debian's arm64 package as it is, and knows nothing
of prefault. The guest has two vCPUs and keeps a file of 24 MiB. It is put into a file with QEMU's own
migration and restored; the stage-2 faults of its work are recorded, and a plan is made of them. Then it is
restored again: with nothing pre-faulted, with the plan applied while it is paused, and with the plan applied
while it works. Each time it must come to the same result. About two minutes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from prefault.errors import LabError
from prefault.faults.convert import convert_bytes
from prefault.faults.plan import Plan, dumps
from prefault.faults.planning import PlanConfig, make_plan
from prefault.faults.working_set import Memslot
from prefault.lab import build, guestfs, programs
from prefault.lab.job import Job, JobResult, run_job
from prefault.lab.machine import MachineOptions

FILE_MIB = 24
SCRIPT = f"""\
head -c {FILE_MIB << 20} /dev/urandom >/tmp/file
sha256sum </tmp/file | cut -c1-64 >/tmp/is
complaints() {{ dmesg | grep -ciE 'stall|lockup|bug|warn|oops'; }}
before=$(complaints)
echo ready
read x
counts() {{ i=0; while [ $i -lt $2 ]; do i=$((i+1)); echo "$1 $i"; done >/tmp/$1; wc -l </tmp/$1; }}
counts a 20000 >/tmp/na & counts b 20000 >/tmp/nb &
dd if=/tmp/file of=/dev/null bs=64k 2>/dev/null
echo "hash $(sha256sum </tmp/file | cut -c1-64)"
wait
echo "was $(cat /tmp/is)"
echo "counts $(cat /tmp/na /tmp/nb | tr '\\n' ' ')"
echo "complaints $(($(complaints) - before))"
echo the end
sleep 1000
"""
INSIDE = "/root/example"
GUEST = Path(__file__).with_name("inside") / "qemu_guest.py"
TAKEN, CAPTURE = "/tmp/state", "/tmp/capture"
RAM, RAM_SIZE = 0x4000_0000, 256 << 20
LAB_MIB = 2048
WAYS = {
    "nothing": "nothing pre-faulted",
    "paused": "the plan applied while it is paused",
    "running": "the plan applied while it works",
}


def _job(words: tuple[str, ...], more: Mapping[str, bytes], collect: tuple[str, ...] = ()) -> JobResult:
    """Run the inside part in the lab.

    :raises LabError: it failed
    """
    files: dict[str, Any] = {
        **programs.files(programs.QEMU),
        f"{INSIDE}/Image": build.kernel_image().read_bytes(),
        f"{INSIDE}/initrd": guestfs.archive(SCRIPT),
        f"{INSIDE}/qemu_guest.py": GUEST.read_bytes(),
        **more,
    }
    job = Job(("python3", f"{INSIDE}/qemu_guest.py", *words), files, collect, timeout=600)
    done = run_job(job, MachineOptions(memory_mib=LAB_MIB))
    if done.status:
        raise LabError(f"status {done.status}; see {done.run_dir}\n{done.stderr.decode()}")
    return done


def told(done: JobResult) -> dict[str, Any]:
    """What the inside part told, by name."""
    return {one["name"]: one for one in map(json.loads, done.stdout.splitlines())}


def fields(said: str) -> dict[str, str]:
    """What the guest said at its end, by the first word of each line."""
    return dict(line.partition(" ")[::2] for line in said.splitlines() if " " in line)


def plan_from(capture: bytes) -> Plan:
    """What `prefault record --from` and `prefault plan --memslot` make of a capture."""
    config = PlanConfig(memslots=(Memslot(RAM, RAM_SIZE),))
    return make_plan([convert_bytes(capture, "capture").recording], config).plan


def run() -> tuple[Plan, dict[str, Any]]:
    """All of it: the plan, and what came of each way."""
    taken = _job(("take",), {}, (TAKEN, CAPTURE))
    plan = plan_from(taken.files[CAPTURE])
    more = {f"{INSIDE}/state": taken.files[TAKEN], f"{INSIDE}/plan.json": dumps(plan).encode()}
    return plan, told(_job(("restore", f"{INSIDE}/plan.json"), more))


def _table(rows: Mapping[str, Any]) -> Table:
    table = Table(title="A guest of Debian's QEMU, restored, until it has done its work", box=None)
    table.add_column("")
    for heading in ("stage-2 faults", "pre-faulted", "stops", "longest stop", "seconds", "result"):
        table.add_column(heading, justify="right")
    for name, what in WAYS.items():
        row = rows[name]
        done = row["before"] or row["during"]
        total = sum(row["faults"][kind] for kind in ("read", "write", "execute"))
        said = fields(row["said"])
        table.add_row(
            what,
            f"{total:,}",
            f"{done['bytes'] / (1 << 20):.1f} MiB" if done else "",
            f"{done['calls']}" if done else "",
            f"{1000 * done['longest_stop_s']:.1f} ms" if done else "",
            f"{row['seconds']:.1f}",
            "as before" if said["hash"] == said["was"] else "DIFFERS",
        )
    return table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of a table.")
def main(as_json: bool) -> None:
    """Apply a plan to a guest of QEMU's, which knows nothing of it."""
    console, progress = Console(width=130), Console(stderr=True)
    progress.print(
        "QEMU in the lab: a guest is booted, put into a file, recorded, and restored in three ways"
    )
    plan, rows = run()
    if as_json:
        click.echo(json.dumps({"plan": plan.to_json(), "rows": rows}))
        return
    console.print(_table(rows))


if __name__ == "__main__":
    main()
