# SPDX-License-Identifier: Apache-2.0
"""How fast traces become recordings: one table.

    python benchmarks/recording.py [--events N]

A trace of N events, a third of them faults, is made up in each format and read, Parquet included. CPU time of
one core is what counts; what else the machine does is in the wall time beside it.
"""

from __future__ import annotations

import argparse
import os
import random
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from prefault.faults import captured, recording
from prefault.faults.captured import Head, Kind, Tail
from prefault.faults.convert import convert

GOAL = 1.0
TIMES = 3
EVENTS = ("kvm_exit", "kvm_guest_fault", "kvm_entry")
HEADER_PAGE = (
    "\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n"
    "\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;\n"
    "\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;\n"
)
COMMON = (
    "\tfield:unsigned short common_type;\toffset:0;\tsize:2;\n\tfield:int common_pid;\toffset:4;\tsize:4;\n"
)
FAULT_FIELDS = (
    "\tfield:unsigned long hsr;\toffset:16;\tsize:8;\n\tfield:unsigned long long ipa;\toffset:32;\tsize:8;\n"
)


def payloads(chance: random.Random, x86: bool) -> tuple[str, str, str]:
    """Of an exit, a fault and an entry."""
    address, rip = chance.randrange(1 << 20) << 12, chance.getrandbits(47)
    if x86:
        exit_ = (
            f"vcpu 1 reason npf rip {rip:#x} info1 0x0000000100000006 info2 0x{address:016x} intr_info 0x0"
        )
        fault = f"vcpu 1 rip {rip:#x} address 0x{address:016x} error_code 0x100000006"
        return exit_, fault, f"vcpu 1, rip {rip:#x} intr_info 0x00000000 error_code 0x00000000"
    exit_ = f"TRAP: HSR_EC: 0x0024 (DABT_LOW), PC: 0x{rip:016x}"
    fault = f"ipa {address:#x}, hsr 0x92000047, hxfar {address:#010x}, pc 0x{rip:014x}"
    return exit_, fault, f"PC: 0x{rip:016x}"


def lines(form: str, events: int) -> Iterator[str]:
    """A trace as text."""
    chance = random.Random(1)
    x86 = "x86" in form
    names = ("kvm_exit", "kvm_page_fault", "kvm_entry") if x86 else EVENTS
    now = 100.0
    for _ in range(events // 3):
        now += chance.randint(3, 9) * 1e-6
        cpu = chance.randrange(4)
        comm = f"CPU {cpu}/KVM"
        for name, payload in zip(names, payloads(chance, x86), strict=True):
            if form.startswith("perf"):
                yield f"{comm:>16} {1234 + cpu:7d} [{cpu:03d}] {now:12.6f}: {f'kvm:{name}':>27}: {payload}\n"
            elif form.startswith("trace-cmd"):
                yield f"{comm:>16}-{1234 + cpu:<5d} [{cpu:03d}] {now:12.6f}: {name + ':':<21} {payload}\n"
            else:
                task = f"{comm:>16}-{1234 + cpu:<7d} (   1200)"
                yield f"{task} [{cpu:03d}] d..1. {now:12.6f}: {name}: {payload}\n"


def make_capture(path: Path, events: int) -> None:
    """A capture."""
    chance = random.Random(1)
    formats = {name: f"ID: {number}\n{COMMON}" for number, name in enumerate(EVENTS)}
    formats["kvm_guest_fault"] += FAULT_FIELDS
    head = Head("aarch64", "7.3.4", 4096, "mono", "", 1200, formats, HEADER_PAGE)
    with path.open("wb") as file:
        file.write(captured.MAGIC + captured.head_frame(head))
        page, now, made = b"", 0, 0
        while made < events:
            for number in range(3):
                data = struct.pack("<HHi", number, 0, 1234) + struct.pack("<Q", 0x4000_0000)
                if number == 1:
                    data += struct.pack("<QQQ", 0x9200_0047, 0, chance.randrange(1 << 20) << 12)
                page += struct.pack("<I", len(data) // 4 | 1000 << 5) + data
                made += 1
            if len(page) > 3900:
                frame = struct.pack("<QQ", now, len(page)) + page
                file.write(captured.frame(Kind.PAGE, frame, chance.randrange(4)))
                page, now = b"", now + 200_000
        file.write(captured.tail_frame(Tail(0, now / 1e9)))


def measure(path: Path, target: Path) -> tuple[int, float, float]:
    """Events, and the least CPU and wall time of some runs."""
    best = []
    for _ in range(TIMES):
        cpu, wall = time.process_time(), time.perf_counter()
        found = convert(path)
        recording.write(found.recording, target)
        best.append((time.process_time() - cpu, time.perf_counter() - wall))
    return found.events, min(one[0] for one in best), min(one[1] for one in best)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_500_000)
    events = parser.parse_args().events
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)
    table = Table(title="Traces into recordings, on one core", title_justify="left")
    for name in ("source", "MB", "events", "million events/s (CPU)", "(wall)", f"goal {GOAL:g}"):
        table.add_column(name, justify="left" if name == "source" else "right")
    with tempfile.TemporaryDirectory() as folder:
        for form in ("tracefs", "trace-cmd", "perf", "tracefs, x86", "perf, x86", "capture"):
            path = Path(folder) / "trace"
            if form == "capture":
                make_capture(path, events)
            else:
                with path.open("w") as file:
                    file.writelines(lines(form, events))
            count, cpu, wall = measure(path, Path(folder) / "x.parquet")
            rate = count / cpu / 1e6
            size = f"{path.stat().st_size / 1e6:.0f}"
            reached = "reached" if rate >= GOAL else "MISSED"
            table.add_row(form, size, f"{count:,}", f"{rate:.2f}", f"{count / wall / 1e6:.2f}", reached)
    Console().print(table)


if __name__ == "__main__":
    main()
