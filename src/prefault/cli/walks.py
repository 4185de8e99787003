# SPDX-License-Identifier: Apache-2.0
"""What the commands that let a guest walk have in common: options, the walk, and what came out of the lab."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from typing import TypeVar

import click
from click.core import ParameterSource

from prefault.cli import output
from prefault.cli.kernels import KernelOptions, lab_options
from prefault.cli.values import Percent, Size
from prefault.errors import CapabilityMissing, ExitCode, LabError, Mismatch, PrefaultError, UsageError
from prefault.lab.job import JobResult
from prefault.machine import GUEST_MEMORY, Backing, Resident
from prefault.report.units import format_size, plural
from prefault.scenarios.walk import WalkConfig, When

HOST_PAGE = 4096
"""Page size of the spec and of the lab's kernel; on --machine kvm the walk itself asks for the host's."""

GUEST_SHARE = 4
"""The guest's memory may take the lab's memory divided by this: both runs' tables and pages need room."""

_Command = TypeVar("_Command", bound=Callable[..., object])


class WalkOptions(KernelOptions):
    """What the options give."""

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
    timeout: float
    dry_run: bool


def walk_options(size: str) -> Callable[[_Command], _Command]:
    """Give a command the options of a walk, and of the machine that it is done on.

    :param size: how much is walked unless told otherwise
    """
    options = (
        click.option(
            "--size", type=Size(), default=size, show_default=True, help="Memory that the guest walks."
        ),
        click.option(
            "--backing",
            type=click.Choice([backing.value for backing in GUEST_MEMORY]),
            default=Backing.PRIVATE.value,
            show_default=True,
            help="What is behind the memslot.",
        ),
        click.option(
            "--resident",
            type=click.Choice([resident.value for resident in Resident]),
            default=Resident.WRITE.value,
            show_default=True,
            help="What the host has populated before: nothing, for reading, or for writing.",
        ),
        click.option(
            "--vcpus", type=click.IntRange(1, 8), default=1, show_default=True, help="Each walks its part."
        ),
        click.option("--nested", is_flag=True, help="Let an L2 guest do the walk."),
        click.option(
            "--writes", type=Percent(), default="50", show_default=True, help="Writes among the accesses."
        ),
        click.option(
            "--prefault",
            type=Percent(),
            default="100",
            show_default=True,
            help="How much of the range is pre-faulted.",
        ),
        click.option(
            "--when",
            type=click.Choice([when.value for when in When]),
            default=When.BEFORE.value,
            show_default=True,
            help="Pre-fault before the guest runs, or while it is in the middle of an exit.",
        ),
        click.option(
            "--machine",
            type=click.Choice(["spec", "lab", "kvm"]),
            default="spec",
            show_default=True,
            help="On the executable specification, on the real kernel in the lab, or on this host's own KVM.",
        ),
        click.option(
            "--memory", type=Size(), default="2G", show_default=True, help="Lab: memory of the machine."
        ),
        lab_options,
    )

    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


LAB_OPTIONS = ("memory", "mode", "icount", "timeout", "kernel", "variant", "dry_run")


def given(names: Sequence[str]) -> list[str]:
    """Those options among ``names`` that were on the command line."""
    context = click.get_current_context()
    return [
        "--" + name.replace("_", "-")
        for name in names
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]


def refuse_lab_options(machine: str) -> None:
    """An option that would have no effect is a mistake of whoever gave it.

    :raises UsageError: one was given, and the machine is not the lab
    """
    named = given(LAB_OPTIONS)
    if named and machine != "lab":
        raise UsageError(f"{', '.join(named)}: about the lab; add --machine lab")


def walk_config(options: WalkOptions) -> WalkConfig:
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


def same_in_lab() -> str:
    """The command line that was given, for the lab."""
    words = click.get_current_context().find_root().obj or (click.get_current_context().info_name,)
    kept = [
        word
        for before, word in zip(("", *words), words, strict=False)
        if word not in ("--machine", "--machine=spec") and before != "--machine"
    ]
    return shlex.join(("prefault", *kept, "--machine", "lab"))


def print_command(argv: Sequence[str]) -> None:
    """What a dry run prints."""
    if output.wants_json():
        output.emit(str(click.get_current_context().info_name), {"dry_run": True, "command_line": argv})
    else:
        click.echo(shlex.join(argv))


def printed_by(done: JobResult) -> dict[str, object]:
    """The JSON object that the job printed.

    :raises PrefaultError: the walk ended with an error of its own, raised here again by its exit code
    """
    try:
        printed = json.loads(done.stdout)
    except ValueError:
        last = "\n".join(done.stderr.decode(errors="replace").strip().splitlines()[-8:])
        raise LabError(
            f"the walk ended with status {done.status} and no result; see {done.run_dir}\n{last}"
        ) from None
    assert isinstance(printed, dict)
    if "error" in printed:
        raise _again(int(printed["error"]["exit_code"]), str(printed["error"]["message"]))
    return printed


def _again(exit_code: int, message: str) -> PrefaultError:
    """An error that came out of the lab, as one that ends this command in the same way."""
    kinds: dict[int, type[PrefaultError]] = {
        ExitCode.DOES_NOT_HOLD: Mismatch,
        ExitCode.USAGE: UsageError,
        ExitCode.MISSING: CapabilityMissing,
    }
    return kinds.get(exit_code, LabError)(message)
