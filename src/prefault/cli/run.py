# SPDX-License-Identifier: Apache-2.0
"""``prefault run``: a guest walks its memory once without and once with pre-faulting."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Unpack

import click

from prefault.cli import output
from prefault.cli.kernels import image_of, variant_of
from prefault.cli.walks import (
    WalkOptions,
    print_command,
    printed_by,
    refuse_lab_options,
    same_in_lab,
    walk_config,
    walk_options,
)
from prefault.kvm import open_kvm
from prefault.lab.frames import Kind
from prefault.lab.job import Job, command_line, run_job
from prefault.lab.machine import MachineOptions
from prefault.report.estimate import estimate, load_figures
from prefault.report.walk import Clock, describe, sentence, walk_table
from prefault.scenarios.walk import CLOCK_STARTS, CLOCK_STOPS, WalkConfig, WalkResult, walk
from prefault.spec import open_spec

EPILOG = """\b
Examples:
  prefault run                                     32 MiB, half of them writes, all pre-faulted
  prefault run --machine lab                       the same on the real kernel, in the lab
  prefault run --size 256M --backing shared        more, and shmem
  prefault run --nested --when while-running       an L2 walks; pre-faulted while it is stopped in L2
  prefault run --prefault 50 --writes 0            half of the range pre-faulted, only reads
  prefault run --machine kvm --vcpus 4             on this arm64 host's own KVM

\b
Exit codes: 0 done, 1 the guest saw wrong bytes or the kernel log has a splat, 2 usage,
3 operating error, 77 no capability or no lab, 124 timed out, 125 the lab was lost."""


class StopWatch:
    """Takes the wall time between the walk's notes as they come out of the lab."""

    def __init__(self) -> None:
        self._text = b""
        self._times: list[float] = []

    def __call__(self, kind: Kind, piece: bytes) -> None:
        """Look for notes in what the job writes to standard error."""
        if kind is not Kind.STDERR:
            return
        *lines, self._text = (self._text + piece).split(b"\n")
        notes = (CLOCK_STARTS.encode(), CLOCK_STOPS.encode())
        self._times += [time.monotonic()] * sum(line in notes for line in lines)

    def seconds(self) -> tuple[float, float] | None:
        """Of the walk without and the walk with pre-faulting; None if they were not seen whole."""
        if len(self._times) != 4:
            return None
        begin, end, begin_with, end_with = self._times
        return end - begin, end_with - begin_with


class _Options(WalkOptions):
    icount: bool


@click.command(epilog=EPILOG)
@walk_options(size="32M")
@click.option(
    "--icount/--no-icount",
    default=True,
    show_default=True,
    help="Lab: count instructions (one CPU), or run on as many CPUs as there are vCPUs.",
)
@output.json_option
def run(**options: Unpack[_Options]) -> None:
    """Let a guest walk its memory without and with pre-faulting, and print what that changed.

    Both walks start from the same state: a new VM, new memory. Printed are the stage-2 faults, the exits to
    user space, the leaves of the stage-2 table by level, and the cost of pre-faulting and of the walk: on the
    specification as estimates from figures that were measured in the lab, in the lab as instructions that
    were executed, on this host's KVM as time.
    """
    refuse_lab_options(options["machine"])
    config = walk_config(options)
    play = {"spec": _on_spec, "lab": _in_lab, "kvm": _here}[options["machine"]]
    outcome = play(config, options)
    if outcome is not None:
        _print(outcome, options["machine"])


@dataclass(frozen=True)
class _Outcome:
    """What came of the walk, and how to tell it.

    :ivar clock: what its nanoseconds are
    :ivar wall: seconds that each walk took outside of the lab's machine
    :ivar facts: more for ``--json``
    :ivar remarks: lines below the table
    """

    result: WalkResult
    clock: Clock
    wall: tuple[float, float] | None = None
    facts: Mapping[str, object] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def _on_spec(config: WalkConfig, options: _Options) -> _Outcome:
    with output.stderr().status("the guest walks its memory on the specification"), open_spec() as kvm:
        result = walk(kvm, config)
    figures = load_figures()
    source = f"figures measured in the lab on {figures.measured}"
    return _Outcome(
        estimate(result, figures),
        Clock(icount=True, estimated=True),
        facts={"costs": {"unit": "instructions", "estimated_from": source}},
        remarks=(
            f"The specification counted faults, exits and leaves; instructions are estimated, from {source}.",
            f"On the real kernel: {same_in_lab()}",
        ),
    )


def _here(config: WalkConfig, options: _Options) -> _Outcome:
    with open_kvm() as kvm:
        return _Outcome(walk(kvm, config), Clock(icount=False))


def _in_lab(config: WalkConfig, options: _Options) -> _Outcome | None:
    job = Job(
        ("python3", "-m", "prefault.scenarios.walk", "--json", json.dumps(config.to_json())),
        timeout=options["timeout"],
    )
    machine = MachineOptions(
        memory_mib=options["memory"] >> 20,
        cpus=options["vcpus"],
        mode=options["mode"],
        icount=options["icount"],
        append=variant_of(options).arguments,
    )
    kernel = image_of(options)
    if options["dry_run"]:
        print_command(command_line(job, machine, kernel=kernel))
        return None
    watch = StopWatch()
    with output.stderr().status("the guest walks its memory in the lab"):
        done = run_job(job, machine, kernel=kernel, on_output=watch)
    wall = watch.seconds()
    facts = {
        "icount": options["icount"],
        "wall_seconds": dict(zip(("without", "with_prefault"), wall or (None, None), strict=True)),
        "seconds": done.seconds,
        "run_dir": done.run_dir,
    }
    clock = Clock(icount=options["icount"])
    result = WalkResult.from_json(printed_by(done))
    return _Outcome(result, clock, wall if clock.icount else None, {"lab": facts})


def _print(outcome: _Outcome, machine: str) -> None:
    if output.wants_json():
        output.emit("run", {"machine": machine, **outcome.result.to_json(), **outcome.facts})
        return
    console = output.stdout()
    console.print(describe(outcome.result.config))
    console.print(walk_table(outcome.result, outcome.clock, outcome.wall))
    console.print(sentence(outcome.result, outcome.clock))
    for remark in outcome.remarks:
        console.print(remark, soft_wrap=True)
