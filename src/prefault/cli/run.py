# SPDX-License-Identifier: Apache-2.0
"""``prefault run``: a guest walks its memory once without and once with pre-faulting."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, Unpack

import click
from click.core import ParameterSource

from prefault.cli import output
from prefault.cli.values import KernelImage, Percent, Size
from prefault.errors import CapabilityMissing, ExitCode, LabError, Mismatch, PrefaultError, UsageError
from prefault.kvm import open_kvm
from prefault.lab.frames import Kind
from prefault.lab.job import Job, JobResult, command_line, run_job
from prefault.lab.machine import MODES, MachineOptions
from prefault.machine import Backing, Resident
from prefault.report.estimate import estimate, load_figures
from prefault.report.units import format_size, plural
from prefault.report.walk import Clock, describe, sentence, walk_table
from prefault.scenarios.walk import CLOCK_STARTS, CLOCK_STOPS, WalkConfig, WalkResult, When, walk
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

HOST_PAGE = 4096
"""Page size of the spec and of the lab's kernel; on --machine kvm the walk itself asks for the host's."""

GUEST_SHARE = 4
"""The guest's memory may take the lab's memory divided by this: both runs' tables and pages need room."""


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


class _Options(TypedDict):
    size: int
    backing: str
    resident: str
    vcpus: int
    nested: bool
    writes: int
    prefault: int
    when: str
    machine: str
    memory: int
    mode: str
    icount: bool
    timeout: float
    kernel: Path | None
    dry_run: bool


@click.command(epilog=EPILOG)
@click.option("--size", type=Size(), default="32M", show_default=True, help="Memory that the guest walks.")
@click.option(
    "--backing",
    type=click.Choice([backing.value for backing in Backing]),
    default=Backing.PRIVATE.value,
    show_default=True,
    help="What is behind the memslot.",
)
@click.option(
    "--resident",
    type=click.Choice([resident.value for resident in Resident]),
    default=Resident.WRITE.value,
    show_default=True,
    help="What the host has populated before: nothing, for reading, or for writing.",
)
@click.option("--vcpus", type=click.IntRange(1, 8), default=1, show_default=True, help="Each walks its part.")
@click.option("--nested", is_flag=True, help="Let an L2 guest do the walk.")
@click.option("--writes", type=Percent(), default="50", show_default=True, help="Writes among the accesses.")
@click.option(
    "--prefault",
    type=Percent(),
    default="100",
    show_default=True,
    help="How much of the range is pre-faulted.",
)
@click.option(
    "--when",
    type=click.Choice([when.value for when in When]),
    default=When.BEFORE.value,
    show_default=True,
    help="Pre-fault before the guest runs, or while it is in the middle of an exit.",
)
@click.option(
    "--machine",
    type=click.Choice(["spec", "lab", "kvm"]),
    default="spec",
    show_default=True,
    help="On the executable specification, on the real kernel in the lab, or on this host's own KVM.",
)
@click.option("--memory", type=Size(), default="2G", show_default=True, help="Lab: memory of the machine.")
@click.option(
    "--mode", type=click.Choice(MODES), default="nested", show_default=True, help="Lab: KVM's mode."
)
@click.option(
    "--icount/--no-icount",
    default=True,
    show_default=True,
    help="Lab: count instructions (one CPU), or run on as many CPUs as there are vCPUs.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=300,
    show_default=True,
    help="Lab: seconds for both walks.",
)
@click.option(
    "--kernel",
    type=KernelImage(),
    help="Lab: boot this arm64 Image in place of the one that was built.",
)
@click.option("--dry-run", is_flag=True, help="Lab: print QEMU's command line and do nothing.")
@output.json_option
def run(**options: Unpack[_Options]) -> None:
    """Let a guest walk its memory without and with pre-faulting, and print what that changed.

    Both walks start from the same state: a new VM, new memory. Printed are the stage-2 faults, the exits to
    user space, the leaves of the stage-2 table by level, and the cost of pre-faulting and of the walk: on the
    specification as estimates from figures that were measured in the lab, in the lab as instructions that
    were executed, on this host's KVM as time.
    """
    _refuse_lab_options(options["machine"])
    config = walk_config(options)
    play = {"spec": _on_spec, "lab": _in_lab, "kvm": _here}[options["machine"]]
    outcome = play(config, options)
    if outcome is not None:
        _print(outcome, options["machine"])


LAB_OPTIONS = ("memory", "mode", "icount", "timeout", "kernel", "dry_run")


def _refuse_lab_options(machine: str) -> None:
    """An option that would have no effect is a mistake of whoever gave it.

    :raises UsageError: one was given, and the machine is not the lab
    """
    context = click.get_current_context()
    given = [
        "--" + name.replace("_", "-")
        for name in LAB_OPTIONS
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if given and machine != "lab":
        raise UsageError(f"{', '.join(given)}: about the lab; add --machine lab")


def walk_config(options: _Options) -> WalkConfig:
    """The walk that the options ask for.

    :raises UsageError: they contradict each other
    """
    size = options["size"]
    step = 2 * options["vcpus"] * HOST_PAGE
    if size % step:
        raise UsageError(
            f"--size {format_size(size)} is not a multiple of {format_size(step)}: "
            f"each of {plural(options['vcpus'], 'vCPU')} walks two halves of whole pages"
        )
    if options["machine"] == "lab":
        if options["nested"] and options["mode"] != "nested":
            raise UsageError(
                f"--nested needs --mode nested: a KVM in mode {options['mode']} has no nested guests"
            )
        if size > options["memory"] // GUEST_SHARE:
            memory = format_size(options["memory"])
            enough = format_size(size * GUEST_SHARE).replace(" ", "")
            raise UsageError(
                f"--size {format_size(size)} is over a quarter of the lab's {memory}: use --memory {enough}"
            )
    return WalkConfig(
        size=size,
        backing=Backing(options["backing"]),
        resident=Resident(options["resident"]),
        vcpus=options["vcpus"],
        nested=options["nested"],
        write_permille=options["writes"],
        prefault_permille=options["prefault"],
        when=When(options["when"]),
    )


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
            f"On the real kernel: {_same_in_lab()}",
        ),
    )


def _same_in_lab() -> str:
    """The command line that was given, for the lab."""
    given = click.get_current_context().find_root().obj or ("run",)
    kept = [
        word
        for before, word in zip(("", *given), given, strict=False)
        if word not in ("--machine", "--machine=spec") and before != "--machine"
    ]
    return shlex.join(("prefault", *kept, "--machine", "lab"))


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
    )
    if options["dry_run"]:
        _print_command(command_line(job, machine, kernel=options["kernel"]))
        return None
    watch = StopWatch()
    with output.stderr().status("the guest walks its memory in the lab"):
        done = run_job(job, machine, kernel=options["kernel"], on_output=watch)
    wall = watch.seconds()
    facts = {
        "icount": options["icount"],
        "wall_seconds": dict(zip(("without", "with_prefault"), wall or (None, None), strict=True)),
        "seconds": done.seconds,
        "run_dir": done.run_dir,
    }
    clock = Clock(icount=options["icount"])
    return _Outcome(read_result(done), clock, wall if clock.icount else None, {"lab": facts})


def _print_command(argv: Sequence[str]) -> None:
    if output.wants_json():
        output.emit("run", {"dry_run": True, "command_line": argv})
    else:
        click.echo(shlex.join(argv))


def read_result(done: JobResult) -> WalkResult:
    """The walk's result out of what the job printed.

    :raises PrefaultError: the walk ended with an error of its own, raised here again by its exit code
    """
    try:
        printed = json.loads(done.stdout)
    except ValueError:
        last = "\n".join(done.stderr.decode(errors="replace").strip().splitlines()[-8:])
        raise LabError(
            f"the walk ended with status {done.status} and no result; see {done.run_dir}\n{last}"
        ) from None
    if "error" in printed:
        raise _again(int(printed["error"]["exit_code"]), str(printed["error"]["message"]))
    return WalkResult.from_json(printed)


def _again(exit_code: int, message: str) -> PrefaultError:
    """An error that came out of the lab, as one that ends this command in the same way."""
    kinds: dict[int, type[PrefaultError]] = {
        ExitCode.DOES_NOT_HOLD: Mismatch,
        ExitCode.USAGE: UsageError,
        ExitCode.MISSING: CapabilityMissing,
    }
    return kinds.get(exit_code, LabError)(message)


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
