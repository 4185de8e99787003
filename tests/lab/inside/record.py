# SPDX-License-Identifier: Apache-2.0
"""Records the faults of a small VMM in every way, while a second trace instance notes the same as text.

What came of each way goes to /tmp/out: a capture, and a line of JSON on standard output. With ``--usual`` it
is one way, that of a process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from prefault.errors import UsageError
from prefault.faults.capture import check_process
from prefault.kvm import tracefs

OUT = Path("/tmp/out")
PAGES = 60
INSTANCES = tracefs.TRACEFS / "instances"


def start_vmm() -> subprocess.Popen[str]:
    """A VMM that is ready to run its guests."""
    argv = [sys.executable, "/traced_vmm.py", str(PAGES)]
    vmm = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert pipe(vmm.stdout).readline() == "ready\n"
    return vmm


def pipe(one: IO[str] | None) -> IO[str]:
    """A pipe that is there."""
    assert one is not None
    return one


def run_guests(vmm: subprocess.Popen[str]) -> None:
    """Let the guests run to their end."""
    pipe(vmm.stdin).write("go\n")
    pipe(vmm.stdin).flush()
    assert json.loads(pipe(vmm.stdout).readline())["failures"] == []


def start_capture(name: str, *words: str) -> subprocess.Popen[str]:
    """A capture that has begun."""
    argv = [sys.executable, "-m", "prefault.faults.capture", "--output", str(OUT / name), *words]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    assert "0 lost" in pipe(process.stderr).readline()
    return process


def finish(name: str, process: subprocess.Popen[str], **more: object) -> None:
    """Wait for a capture's end, and say how it was."""
    said = pipe(process.stderr).read()
    process.wait(20)
    left = sorted(one.name for one in INSTANCES.iterdir() if one.name != "witness")
    print(
        json.dumps({"name": name, "status": process.returncode, "said": said, "left": left, **more}),
        flush=True,
    )


class Witness:
    """The same faults as text, by other means."""

    def __init__(self, pid: int) -> None:
        self._folder = INSTANCES / "witness"
        self._folder.mkdir()
        for name in ("options/event-fork", "options/record-tgid"):
            (self._folder / name).write_text("1")
        (self._folder / "trace_clock").write_text("mono")
        (self._folder / "set_event_pid").write_text(" ".join(os.listdir(f"/proc/{pid}/task")))  # noqa: PTH208
        (self._folder / "events/kvm/enable").write_text("1")

    def save(self, name: str) -> None:
        """Keep the text, and end."""
        (self._folder / "events/kvm/enable").write_text("0")
        (OUT / name).write_text((self._folder / "trace").read_text())
        self._folder.rmdir()


def of_one_process() -> None:
    """The usual way."""
    OUT.mkdir()
    vmm = start_vmm()
    witness = Witness(vmm.pid)
    process = start_capture("pid", "--pid", str(vmm.pid))
    run_guests(vmm)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    finish("pid", process, pid=vmm.pid)
    witness.save("pid.trace")
    vmm.kill()
    vmm.wait()


def in_other_ways() -> None:
    """All others, and what must not be left behind."""
    one, other = start_vmm(), start_vmm()
    process = start_capture("all", "--seconds", "3", "--no-durations")
    run_guests(one)
    run_guests(other)
    finish("all", process, pids=[one.pid, other.pid])

    process = start_capture("other", "--seconds", "0.5", "--pid", str(one.pid))  # whose guests are at rest
    finish("other", process)
    process = start_capture("killed", "--pid", str(one.pid))
    one.kill()
    one.wait()
    finish("killed", process)
    other.kill()
    other.wait()

    vmm = start_vmm()
    process = start_capture("small", "--pid", str(vmm.pid), "--buffer-kib", "4")
    process.send_signal(signal.SIGSTOP)  # a reader that is too slow
    run_guests(vmm)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    finish("small", process)

    process = start_capture("orphan", "--pid", str(vmm.pid))
    process.kill()
    finish("orphan", process)
    process = start_capture("heir", "--pid", str(vmm.pid), "--seconds", "0.2")
    finish("heir", process)
    try:
        check_process(os.getpid())
    except UsageError as error:
        print(json.dumps({"name": "refused", "said": str(error), "pid": vmm.pid}))
    vmm.kill()
    vmm.wait()


if __name__ == "__main__":
    of_one_process()
    if "--usual" not in sys.argv:
        in_other_ways()
