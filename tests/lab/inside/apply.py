# SPDX-License-Identifier: Apache-2.0
"""Applies a plan to VMMs at work, in several ways; prints a line of JSON for each."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from typing import IO

from prefault.inject.apply import Applied, Process

DATA = 0x1_0000_0000
MIB = 1 << 20


def start(mib: int) -> subprocess.Popen[str]:
    """A VMM whose guests run."""
    argv = [sys.executable, "/busy_vmm.py", str(mib)]
    vmm = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert pipe(vmm.stdout).readline() == "ready\n"
    time.sleep(0.3)
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


def whole() -> None:
    """All memory that the guests will need, and a hole."""
    vmm = start(16)
    with Process(vmm.pid) as process:
        found = process.find()
        hole = (DATA + 64 * MIB, 4 * MIB)
        done = process.apply(found, [(DATA, 24 * MIB), hole, (DATA + 24 * MIB, 8 * MIB)], slice_s=0.05)
    tell(
        "whole",
        applied=facts(done),
        vmm=finish(vmm),
        threads=[[one.index, one.fd] for one in found.threads],
        unknown=found.unknown,
    )


def nothing() -> None:
    """The same guests without a plan."""
    vmm = start(16)
    tell("nothing", vmm=finish(vmm))


def main() -> None:
    """All of them."""
    whole()
    nothing()


if __name__ == "__main__":
    main()
