# SPDX-License-Identifier: Apache-2.0
"""Applies a plan to VMMs at work, in several ways; prints a line of JSON for each."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO

from prefault.errors import CapabilityMissing, ProcessLost
from prefault.inject.apply import Applied, Process

DATA = 0x1_0000_0000
MIB = 1 << 20
PIECE = MIB // 2
SLICE_S = 0.1
WAY_S = 90
"""What takes so long hangs: it takes a tenth of that."""
KILLED = 20


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


def rounds(vmm: subprocess.Popen[str]) -> list[int]:
    """How many rounds each guest has done until now."""
    pipe(vmm.stdin).write("rounds\n")
    pipe(vmm.stdin).flush()
    done: list[int] = json.loads(pipe(vmm.stdout).readline())
    return done


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
        before = rounds(vmm)
        done = process.apply(found, plan, slice_s=SLICE_S)
        during = [last - first for first, last in zip(before, rounds(vmm), strict=True)]
    threads = [[one.index, one.fd, one.certain] for one in found.threads]
    tell(
        name,
        applied=facts(done),
        traced=traced(vmm.pid),
        during=during,
        vmm=finish(vmm),
        threads=threads,
    )


class Soon:
    """Something that happens while the call after the first runs, however slow the machine is."""

    def __init__(self, do: Callable[[], object]) -> None:
        self._do = do
        self._timer = threading.Timer(0.05, self._happen)
        self._begun = False
        self.at = 0.0
        """When it did."""

    def on_bytes(self, _size: int) -> None:
        """Told of each call's end."""
        if not self._begun:
            self._begun = True
            self._timer.start()

    def _happen(self) -> None:
        self.at = time.monotonic()
        self._do()


def nothing(name: str) -> None:
    """The same guests without a plan."""
    tell(name, vmm=finish(start(16)))


def killed(name: str) -> None:
    """The VMM dies in the middle."""
    vmm = start(16)
    with Process(vmm.pid) as process:
        found = process.find()
        death = Soon(lambda: os.kill(vmm.pid, signal.SIGKILL))
        try:
            process.apply(found, [(DATA, 32 * MIB)] * 1000, slice_s=0.002, on_bytes=death.on_bytes)
            said = ""
        except ProcessLost as error:
            said = str(error)
    vmm.wait()
    tell(name, said=said)


def interrupted(name: str, number: signal.Signals) -> None:
    """A signal ends this in the middle."""
    vmm = start(16)
    with Process(vmm.pid) as process:
        found = process.find()
        end = Soon(lambda: signal.raise_signal(number))
        done = process.apply(found, [(DATA, 32 * MIB)] * 1000, slice_s=0.005, on_bytes=end.on_bytes)
        seconds = time.monotonic() - end.at
    tell(name, applied=facts(done), seconds=seconds, traced=traced(vmm.pid), vmm=finish(vmm))


def killers(name: str) -> None:
    """Who applies is killed in the middle, again and again."""
    vmm = start(16)
    chances = random.Random(16)
    with Process(vmm.pid) as process:
        found = process.find()
        for _ in range(KILLED):
            child = os.fork()
            if not child:
                process.apply(found, [(DATA, 32 * MIB)] * 1000, slice_s=0.02)
                os._exit(0)
            time.sleep(0.05 + chances.uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        done = process.apply(found, [(DATA, 32 * MIB)], slice_s=SLICE_S)
    tell(name, applied=facts(done), traced=traced(vmm.pid), vmm=finish(vmm))


def unsupported(name: str) -> None:
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
    tell(name, said=said, vmm=finish(vmm))


WAYS: dict[str, Callable[[str], None]] = {
    "whole": whole,
    "nothing": nothing,
    "kicked": lambda name: whole(name, "kick"),
    "killed": killed,
    "interrupted": lambda name: interrupted(name, signal.SIGINT),
    "killers": killers,
    "unsupported": unsupported,
}


def main() -> None:
    """All of them. One that hangs is ended with its name and where it stands."""
    for name, way in WAYS.items():
        print(f"{time.monotonic():.1f} s: {name}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(WAY_S, exit=True)
        way(name)


if __name__ == "__main__":
    main()
