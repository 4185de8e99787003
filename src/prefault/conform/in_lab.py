# SPDX-License-Identifier: Apache-2.0
"""The side of the kernel: a suite played in the lab, in one boot if the kernel stands it.

Failure modes: a machine that is lost, or a scenario that takes too long, costs that scenario, which is named,
and another boot for those after it. After MAX_BOOTS boots the rest is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefault.conform.suite import Play, Suite
from prefault.errors import JobTimeout, LabError, LabLost
from prefault.lab.arch import ARM64, X86_64
from prefault.lab.frames import Kind
from prefault.lab.job import Job, JobSplat, run_job
from prefault.lab.machine import MachineOptions
from prefault.lab.quiet import quietly

MAX_BOOTS = 5
LIMIT_SECONDS = 60.0
"""What one scenario may take; the slowest takes 3 s."""
_PROGRAMS = "/programs.json"
_STARTING_SECONDS = 30
HUGE_PAGES = ("hugepages=4", "hugepagesz=32M", "hugepages=1", "hugepagesz=1G", "hugepages=1")
"""Kernel arguments that set pages of every size aside, as only a booting kernel can."""


@dataclass(frozen=True)
class Needs:
    """What playing on a kernel takes that its variant says nothing about.

    :ivar memory_mib: of the machine, at least
    """

    limit: float = LIMIT_SECONDS
    memory_mib: int = 0
    huge_pages: tuple[str, ...] = HUGE_PAGES


NEEDS = {
    ARM64.name: Needs(),
    # One scenario is known to hang; the slowest other takes 4 s. There is a hole below 4 GiB of memory, and a
    # huge page of 1 GiB must have room beside it.
    X86_64.name: Needs(20.0, 4096, ("hugepages=4", "hugepagesz=1G", "hugepages=1")),
}


@dataclass
class LabPlays:
    """What came of a suite.

    :ivar facts: what ``prefault.kvm.probe`` found inside
    :ivar boots: how often the machine was started
    :ivar folders: of each boot, where its console and kernel log are
    """

    facts: Mapping[str, object] = field(default_factory=dict)
    plays: dict[str, Play] = field(default_factory=dict)
    boots: int = 0
    seconds: float = 0
    folders: list[Path] = field(default_factory=list)


class _Enough(Exception):
    """What was to be found out is found out."""


class _Lines:
    """Takes the lines of a job as they come."""

    def __init__(
        self, into: LabPlays, done: Callable[[str], None], enough: Callable[[LabPlays], bool]
    ) -> None:
        self._into = into
        self._done = done
        self._enough = enough
        self._rest = b""

    def __call__(self, kind: Kind, piece: bytes) -> None:
        if kind is not Kind.STDOUT:
            return
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            raw = json.loads(line)
            if "facts" in raw:
                self._into.facts = raw["facts"]
                continue
            play = Play.from_json(raw)
            self._into.plays[play.name] = play
            self._done(play.name)
            if self._enough(self._into):
                raise _Enough


def play(
    suite: Suite,
    options: MachineOptions,
    kernel: Path | None = None,
    limit: float = LIMIT_SECONDS,
    done: Callable[[str], None] = lambda name: None,
    enough: Callable[[LabPlays], bool] = lambda plays: False,
) -> LabPlays:
    """Play all of a suite on a kernel in the lab.

    :param limit: seconds for one scenario
    :param done: told each name
    :param enough: asked after each scenario that was played to its end, the last of ``plays``; if so, the
        machine is switched off and the rest is left out
    :raises ToolMissing: QEMU, the kernel or the root file system is not here
    :raises LabLost: it does not come up
    :raises LabError: it came up and played nothing
    """
    found, order = LabPlays(), suite.order()
    while left := [name for name in order if name not in found.plays]:
        if found.boots == MAX_BOOTS:
            for name in left:
                text = f"not played: {MAX_BOOTS} machines were lost before"
                found.plays[name] = Play(name, "lost", text)
            break
        found.boots += 1
        try:
            _boot(suite.only(left), options, kernel, limit, found, _Lines(found, done, enough))
        except _Enough:
            break
    return found


def _boot(
    suite: Suite, options: MachineOptions, kernel: Path | None, limit: float, found: LabPlays, lines: _Lines
) -> None:
    """One boot; whatever happens, at least one more scenario has been played after it."""
    # No specification can know when THPs are made and pages move; with an L2, each page costs half a second.
    argv = ["python3", "-m", "prefault.scenarios", "--facts", "--limit", f"{limit:g}", *suite.names]
    files = {_PROGRAMS: suite.programs_json()} if suite.programs else {}
    argv += ["--programs", _PROGRAMS] if suite.programs else []
    count, order = len(found.plays), suite.order()
    # The limit inside is what ends a scenario; this is for when that is not enough.
    job = Job(quietly(argv), files, timeout=_STARTING_SECONDS + limit * (len(order) + 1))
    try:
        result = run_job(job, options, kernel=kernel, on_output=lines)
    except JobSplat as splat:
        result = splat.result  # what was logged during each scenario is with that scenario
    except (LabLost, JobTimeout) as error:
        if not found.facts:
            raise  # it never came as far as a scenario
        culprit = next(name for name in order if name not in found.plays)
        found.plays[culprit] = Play(culprit, "lost", str(error))
        return
    found.seconds += result.seconds
    found.folders.append(result.run_dir)
    if len(found.plays) == count and found.facts:
        # Whoever played was killed by the first one, as by an oops.
        culprit = next(name for name in order if name not in found.plays)
        found.plays[culprit] = Play(culprit, "lost", f"status {result.status}; see {result.run_dir}")
    elif len(found.plays) == count:
        last = "\n".join(result.stderr.decode(errors="replace").strip().splitlines()[-8:])
        raise LabError(f"the lab played nothing (status {result.status}); see {result.run_dir}\n{last}")
