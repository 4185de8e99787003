# SPDX-License-Identifier: Apache-2.0
"""Applies a plan to VMMs at work, in several ways; prints a line of JSON for each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO

from prefault.errors import CapabilityMissing, ProcessLost
from prefault.inject.apply import Applied, Process

DATA = 0x1_0000_0000
MIB = 1 << 20
PIECE = MIB // 2
SLICE_S = 0.1


def start(mib: int, *words: str) -> subprocess.Popen[str]:
    """A VMM whose guests run."""
    argv = [sys.executable, "/busy_vmm.py", str(mib), *words]
    vmm = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert pipe(vmm.stdout).readline() == "ready\n"
    time.sleep(0.2)
    return vmm


def pipe(one: IO[str] | None) -> IO[str]:
    """A pipe that is there."""
    assert one is not None
    return one


def finish(vmm: subprocess.Popen[str]) -> object:
    """What its guests took."""
    pipe(vmm.stdin).write("go\n")
    pipe(vmm.stdin).flush()
    told = json.loads(pipe(vmm.stdout).readline())
    vmm.wait()
    return told


def tell(name: str, **facts: object) -> None:
    """A line for the test."""
    print(json.dumps({"name": name, **facts}), flush=True)


def facts(done: Applied) -> dict[str, object]:
    """A result as JSON types."""
    return {**asdict(done), "longest_stop_s": done.longest_stop_s}


def traced(pid: int) -> list[str]:
    """Tracers that its threads have."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    lines = [line for task in tasks for line in (task / "status").read_text().splitlines()]
    return [line.split()[1] for line in lines if line.startswith("TracerPid:") and line.split()[1] != "0"]


def whole(name: str, *words: str) -> None:
    """All memory that the guests will need, in many pieces so that there are many stops, and a hole."""
    vmm = start(16, *words)
    with Process(vmm.pid) as process:
        found = process.find()
        plan = [(DATA + start, PIECE) for start in range(0, 32 * MIB, PIECE)]
        plan.insert(40, (DATA + 64 * MIB, 4 * MIB))
        done = process.apply(found, plan, slice_s=SLICE_S)
    threads = [[one.index, one.fd, one.certain] for one in found.threads]
    tell(name, applied=facts(done), traced=traced(vmm.pid), vmm=finish(vmm), threads=threads)


def nothing() -> None:
    """The same guests without a plan."""
    tell("nothing", vmm=finish(start(16)))


def killed() -> None:
    """The VMM dies in the middle."""
    vmm = start(16)
    with Process(vmm.pid) as process:
        found = process.find()
        threading.Timer(0.2, os.kill, (vmm.pid, signal.SIGKILL)).start()
        try:
            process.apply(found, [(DATA, 32 * MIB)] * 100, slice_s=0.002)
            said = ""
        except ProcessLost as error:
            said = str(error)
    vmm.wait()
    tell("killed", said=said)


def interrupted(name: str, number: signal.Signals) -> None:
    """A signal ends this in the middle."""
    vmm = start(16)
    with Process(vmm.pid) as process:
        found = process.find()
        threading.Timer(0.3, signal.raise_signal, (number,)).start()
        began = time.monotonic()
        done = process.apply(found, [(DATA, 32 * MIB)] * 1000, slice_s=0.005)
    tell(name, applied=facts(done), seconds=time.monotonic() - began, traced=traced(vmm.pid), vmm=finish(vmm))


def unsupported() -> None:
    """A kernel that cannot: the library asks first, and touches nothing."""
    vmm = start(1)
    with Process(vmm.pid) as process:
        found = process.find()
        process.check_extension = lambda *_: 0  # type: ignore[method-assign]
        try:
            process.apply(found, [(DATA, MIB)])
            said = ""
        except CapabilityMissing as error:
            said = str(error)
    tell("unsupported", said=said, vmm=finish(vmm))


def main() -> None:
    """All of them."""
    whole("whole")
    nothing()
    whole("kicked", "kick")
    killed()
    interrupted("interrupted", signal.SIGINT)
    unsupported()


if __name__ == "__main__":
    main()
