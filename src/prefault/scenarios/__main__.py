# SPDX-License-Identifier: Apache-2.0
"""``python3 -m prefault.scenarios [NAME…]``: play scenarios on this host's KVM, a JSON line for each.

A line has the outcome and what the kernel logged meanwhile. It is written when a scenario is done, so that
of a machine that was lost it is known which one it was at: the first that is missing.

``--facts`` puts what ``prefault.kvm.probe`` finds on a line before. ``--programs FILE`` plays programs, too.
``--limit SECONDS`` gives up on a scenario that takes longer, and on all after it: a process that hangs in
the kernel cannot be ended, only left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import select
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from prefault.kvm import open_host, probe
from prefault.kvm.tracefs import TRACEFS
from prefault.scenarios import SCENARIOS, Scenario, perform
from prefault.scenarios.program import read_programs, scenario
from prefault.scenarios.scenario import Outcome

KMSG = "/dev/kmsg"
_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 5.0
_GIVEN_BACK = {
    "SecPageTables": "stage-2 tables",
    "Unevictable": "memory that cannot be reclaimed, as guest_memfd's",
}


class KernelLog:
    """What the kernel logs from now on."""

    def __init__(self) -> None:
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK)
            os.lseek(self._fd, 0, os.SEEK_END)

    def read(self) -> list[str]:
        """Messages since the last call; none where they may not be read."""
        found: list[str] = []
        while self._fd >= 0:
            try:
                record = os.read(self._fd, 8192).decode(errors="replace")
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue  # records were overwritten; the next read goes on behind them
            found.append(record.partition(";")[2].partition("\n")[0])
        return found


def play(wanted: list[Scenario], facts: bool) -> int:
    """Play scenarios in this process; 1 if one failed."""
    if facts:
        print(json.dumps({"facts": dataclasses.asdict(probe.facts())}), flush=True)
    failed, log = 0, KernelLog()
    with open_host() as kvm:
        for one in wanted:
            before = _taken()
            outcome = perform(kvm, one)
            leaked = _leaked(before)
            if leaked and outcome.outcome == "passed":
                outcome = dataclasses.replace(outcome, outcome="failed", text=f"{leaked} were not given back")
            failed += outcome.outcome == "failed"
            _report(outcome, log.read())
    return int(failed > 0)


def _taken() -> dict[str, int]:
    """KiB taken for what VMs give back when they are gone; nothing where the kernel does not say."""
    found = re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {what: int(kib) for name, kib in found if (what := _GIVEN_BACK.get(name))}


def _leaked(before: dict[str, int]) -> str:
    """What is not given back. Tables that walks may still be in, and pages, go a little later."""
    until = time.monotonic() + _GRACE_SECONDS
    while True:
        left = {what: kib - before[what] for what, kib in _taken().items() if kib > before[what]}
        if not left or time.monotonic() > until:
            return ", ".join(f"{kib} KiB of {what}" for what, kib in left.items())
        time.sleep(0.01)


def _report(outcome: Outcome, log: list[str]) -> None:
    print(json.dumps({**dataclasses.asdict(outcome), "kernel_log": log}), flush=True)


def play_watched(wanted: list[Scenario], facts: bool, limit: float) -> int:
    """Play scenarios in a child, which is left behind if one of them takes longer than ``limit`` seconds."""
    log, (reader, writer) = KernelLog(), os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, sys.stdout.fileno())
        os.close(writer)
        os.close(reader)
        status = 1
        with contextlib.suppress(BrokenPipeError):
            status = play(wanted, facts)
        os._exit(status)
    os.close(writer)
    done = -facts  # the line of facts is none of a scenario
    for piece in _until_silent(reader, limit):
        done += piece.count(b"\n")
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        if not piece:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = f"not done after {limit:g} s{_where(child)}{_meanwhile()}"
    name = wanted[max(0, done)].name
    _report(Outcome(name, "lost", text, limit), log.read())
    return 1


def _until_silent(reader: int, limit: float) -> Iterator[bytes]:
    """What comes through a pipe, empty at its end; stops without that if nothing comes for a while."""
    while select.select([reader], [], [], limit)[0]:
        yield os.read(reader, 1 << 16)


def _where(child: int) -> str:
    """Where in the kernel a process is, as far as the kernel tells."""
    threads = sorted(Path(f"/proc/{child}/task").iterdir())
    for thread in threads:
        with contextlib.suppress(OSError):
            stack = (thread / "stack").read_text().split("\n")
            calls = [line.split(" ", 1)[1].split("+")[0] for line in stack if " " in line]
            if calls:
                return f"; in the kernel at {' < '.join(calls[:6])}"
    return ""


def _meanwhile() -> str:
    """What KVM does, by its tracepoints: what is only slow can be told from what hangs."""
    folder = TRACEFS / "instances" / f"prefault-late-{os.getpid()}"
    trace = ""
    with contextlib.suppress(OSError):
        folder.mkdir()
        with contextlib.ExitStack() as last:
            last.callback(folder.rmdir)
            (folder / "events/kvm/enable").write_text("1")
            time.sleep(_LOOK_SECONDS)
            (folder / "events/kvm/enable").write_text("0")
            trace = (folder / "trace").read_text()
    events = Counter(re.findall(r": (\w+): ", trace)).most_common(4)
    listed = ", ".join(f"{count} {name}" for name, count in events)
    return f"; in {_LOOK_SECONDS:g} s more: {listed or 'no event of KVM'}"


def main() -> int:
    """Play the named scenarios and programs, or all scenarios if none is named; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python3 -m prefault.scenarios", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--facts", action="store_true")
    parser.add_argument("--programs", type=Path, metavar="FILE")
    parser.add_argument("--limit", type=float, default=0, metavar="SECONDS")
    given = parser.parse_args()
    programs = read_programs(given.programs.read_text()) if given.programs else {}
    names = given.names or ([] if programs else list(SCENARIOS))
    wanted = [SCENARIOS[name] for name in names]
    wanted += [scenario(name, program) for name, program in programs.items()]
    if given.limit:
        return play_watched(wanted, given.facts, given.limit)
    return play(wanted, given.facts)


if __name__ == "__main__":
    sys.exit(main())
