# SPDX-License-Identifier: Apache-2.0
"""Measuring cases in the lab: one boot for each kernel and mode, results as they come.

Failure modes: a case that cannot be measured says why and costs nothing else; a machine that is lost, or
runs over its time, ends the measuring, and what was measured before has been handed out by then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prefault.bench.cases import MIB, Case
from prefault.bench.measure import Measured
from prefault.bench.pairs import WAYS, Pair, PairAsk
from prefault.bench.waits import KINDS, Ask, Waits
from prefault.errors import LabError
from prefault.lab.arch import ARM64, Architecture
from prefault.lab.frames import Kind
from prefault.lab.job import Job, JobResult, command_line, run_job
from prefault.lab.machine import MachineOptions
from prefault.lab.quiet import quietly
from prefault.machine import Backing

_FILE = "/cases.json"
_SYSTEM_MIB = 1024
"""What the kernel and Python need, and stage-2 tables, and pages that lie on lists for later."""
_USUAL_MIB = 3072
WAIT_CPUS = 3
"""One for who pre-faults, one for who waits, one for everybody else."""


@dataclass(frozen=True)
class Boot:
    """What is measured in one go.

    :ivar kernel: the Image; None is the lab's own
    :ivar ioctl_only: measure only what tells two versions of the ioctl apart
    :ivar arch: of the machine, and of its guests
    """

    mode: str
    cases: tuple[Case, ...]
    kernel: Path | None = None
    ioctl_only: bool = False
    arch: Architecture = ARM64

    @property
    def where(self) -> str:
        """The mode of KVM, or the architecture if that is not ours."""
        return self.mode if self.arch is ARM64 else self.arch.name


@dataclass(frozen=True)
class Settings:
    """What holds for all boots.

    :ivar repeat: how often each figure is taken
    :ivar timeout: seconds for each boot
    :ivar memory_mib: of the machine; 0 is what the cases need
    :ivar cpu: QEMU's model of arm64's CPU
    :ivar append: more arguments for arm64's kernel
    """

    repeat: int = 3
    timeout: float = 3600
    memory_mib: int = 0
    cpu: str = "max"
    append: tuple[str, ...] = ()


def memory_mib(cases: Sequence[Case]) -> int:
    """What the machine needs for the largest case, huge pages that are set aside included."""
    largest = max(case.size for case in cases) // MIB
    aside = sum(size * count for size, count in _set_aside(cases).items()) // MIB
    # A file's pages are there besides the private copies of them.
    return max(_USUAL_MIB, 2 * largest if largest <= 512 else largest + largest // 4) + aside + _SYSTEM_MIB


def _set_aside(cases: Sequence[Case]) -> dict[int, int]:
    """Huge pages that only a booting kernel is sure to find: how many, by size."""
    found: dict[int, int] = {}
    for case in cases:
        if case.backing is Backing.HUGETLB and case.page_size > 2 * MIB:
            found[case.page_size] = max(found.get(case.page_size, 0), case.size // case.page_size)
    return found


def machine_of(boot: Boot, settings: Settings, *, qemu: tuple[str, ...] = ()) -> MachineOptions:
    """The machine for a boot.

    :param qemu: more arguments for QEMU
    """
    huge = [
        word
        for size, count in _set_aside(boot.cases).items()
        for word in (f"hugepagesz={size // MIB}M", f"hugepages={count}")
    ]
    options = MachineOptions(
        memory_mib=settings.memory_mib or memory_mib(boot.cases),
        mode=boot.mode,
        icount=True,
        append=tuple(huge),
        qemu=qemu,
        arch=boot.arch,
    )
    if boot.arch is not ARM64:
        return options
    return replace(options, cpu=settings.cpu, append=(*options.append, *settings.append))


def _job(boot: Boot, settings: Settings) -> Job:
    lines = [
        json.dumps({"case": case.to_json(), "repeat": settings.repeat, "ioctl_only": boot.ioctl_only})
        for case in boot.cases
    ]
    argv = ("python3", "-m", "prefault.bench.measure", _FILE, str(len(lines)))
    return Job(quietly(argv), {_FILE: "\n".join(lines).encode()}, timeout=settings.timeout)


class _Lines:
    """Takes the lines of a job as they come."""

    def __init__(self, tell: Callable[[Measured], None]) -> None:
        self._tell = tell
        self._rest = b""
        self.count = 0

    def __call__(self, kind: Kind, piece: bytes) -> None:
        if kind is not Kind.STDOUT:
            return
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self.count += 1
            self._tell(Measured(**json.loads(line)))


def measure(boot: Boot, settings: Settings, tell: Callable[[Measured], None]) -> Path:
    """Boot and measure.

    :param tell: given each result as it comes, in the order of the cases
    :returns: the folder with what the machine has written
    :raises LabError: the machine was lost, ran over its time, or ended without all results
    """
    lines = _Lines(tell)
    done = run_job(_job(boot, settings), machine_of(boot, settings), kernel=boot.kernel, on_output=lines)
    if lines.count < len(boot.cases):
        last = "\n".join(done.stderr.decode(errors="replace").strip().splitlines()[-8:])
        raise LabError(
            f"measuring ended with status {done.status} after {lines.count} of {len(boot.cases)} cases, at "
            f"{boot.cases[lines.count].name}; see {done.run_dir}\n{last}"
        )
    return done.run_dir


def command(boot: Boot, settings: Settings) -> tuple[str, ...]:
    """QEMU's command line."""
    return command_line(_job(boot, settings), machine_of(boot, settings), kernel=boot.kernel)


def waits(boot: Boot, settings: Settings, ask: Ask) -> list[Waits]:
    """Boot a machine with several CPUs, and see how long others wait for a pre-fault.

    :raises LabError: the machine was lost, ran over its time, or ended without all results
    """
    found = _timed("prefault.bench.waits", boot, settings, ask)
    return [Waits(**one) for one in _all_of(found, 2 * len(KINDS))]


def pairs(boot: Boot, settings: Settings, ask: PairAsk, *, icount: bool = False) -> list[Pair]:
    """Boot a machine with several CPUs, and see what two vCPUs do together.

    :param icount: on one CPU, with instructions for nanoseconds
    :raises LabError: the machine was lost, ran over its time, or ended without all results
    """
    found = _timed("prefault.bench.pairs", boot, settings, ask, icount=icount)
    return [Pair(**one) for one in _all_of(found, ask.rounds * len(WAYS))]


def _timed(
    module: str, boot: Boot, settings: Settings, ask: Ask | PairAsk, *, icount: bool = False
) -> JobResult:
    argv = ("python3", "-m", module, json.dumps(asdict(ask)))
    memory = settings.memory_mib or 2 * (ask.size // MIB) + 2 * _SYSTEM_MIB
    options = MachineOptions(
        memory_mib=memory,
        cpus=WAIT_CPUS,
        mode=boot.mode,
        cpu=settings.cpu,
        append=settings.append,
        icount=icount,
    )
    return run_job(Job(quietly(argv), timeout=settings.timeout), options, kernel=boot.kernel)


def _all_of(done: JobResult, count: int) -> list[dict[str, Any]]:
    """What a job has found, a line each.

    :raises LabError: it did not find so much
    """
    lines = done.stdout.splitlines()
    if done.status or len(lines) != count:
        last = "\n".join(done.stderr.decode(errors="replace").strip().splitlines()[-8:])
        raise LabError(f"measuring ended with status {done.status}; see {done.run_dir}\n{last}")
    return [json.loads(line) for line in lines]
