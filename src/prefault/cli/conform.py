# SPDX-License-Identifier: Apache-2.0
"""``prefault conform``: the same scenarios on the specification and on a kernel in the lab."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

import click
from rich.table import Table

from prefault.cli import output
from prefault.cli.interrupt import results_kept
from prefault.cli.kernels import (
    ArchOptions,
    KernelOptions,
    arch_of,
    arch_option,
    cpu_option,
    image_of,
    kernel_options,
    refuse_arm64_kernels,
    variant_of,
)
from prefault.cli.progress import drawn
from prefault.cli.values import Real, Size
from prefault.conform import in_lab, on_spec, peers
from prefault.conform.compare import BAD, Comparison, Verdict
from prefault.conform.session import SHRINKABLE, Session
from prefault.conform.strategies import generate
from prefault.conform.suite import Suite, choose
from prefault.errors import ExitCode, UsageError
from prefault.lab.machine import MODES, MachineOptions
from prefault.report import conform as report
from prefault.scenarios import SCENARIOS
from prefault.scenarios.program import VmmProgram, from_json, to_json

EPILOG = """\b
Examples:
  prefault conform                                  all listed scenarios
  prefault conform 'nested_*' --requirement M3      some of them
  prefault conform --kernel arch/arm64/boot/Image   judge another kernel
  prefault conform --mode nvhe                      KVM in another mode
  prefault conform --random 40 --seed 1             random programs; one that differs is made small
  prefault conform --program program-1-7.json       one of these again
  prefault conform --arch x86_64                    what Debian's x86 kernel answers, beside what ours does
  prefault conform --list                           names and requirements

\b
Exit codes: 0 all that was compared is equal and holds, 1 a difference, a law that does not hold, a splat
or a lost kernel, 2 usage, 3 operating error, 77 no lab, or the kernel lacks the capability."""


class _Options(KernelOptions, ArchOptions):
    names: tuple[str, ...]
    requirement: tuple[str, ...]
    list_only: bool
    program: Path | None
    random: int
    seed: int
    steps: int
    output_folder: Path
    mode: str
    cpu: str
    lpa2: bool
    mte: bool
    memory: int | None
    limit: float | None


@click.command(epilog=EPILOG)
@click.option("--requirement", multiple=True, metavar="M4", help="Only scenarios about it; repeatable.")
@click.option("--list", "list_only", is_flag=True, help="Print names and requirements, and play nothing.")
@click.option(
    "--program",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Play a program from a file in place of scenarios.",
)
@click.option(
    "--random",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Play N random programs in place of scenarios.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which programs.")
@click.option(
    "--steps", type=click.IntRange(1, 60), default=25, show_default=True, help="Actions of each of them."
)
@click.option(
    "--output",
    "output_folder",
    type=click.Path(file_okay=False, path_type=Path),
    default="conform-output",
    show_default=True,
    help="Where programs that differ go.",
)
@click.option(
    "--mode", type=click.Choice(MODES), default="nested", show_default=True, help="KVM's mode in the lab."
)
@kernel_options
@arch_option
@cpu_option
@click.option("--lpa2", is_flag=True, help="52-bit addresses; nested VMs are slow then.")
@click.option("--mte", is_flag=True, help="Memory tags; everything is slower then.")
@click.option(
    "--memory", type=Size(), help="Memory of the lab's machine; 3G, or what the kernel needs, if not given."
)
@click.option(
    "--limit",
    type=Real(min=1),
    help=f"Seconds that one scenario may take on the kernel; {in_lab.LIMIT_SECONDS:g}, more for a slow "
    f"variant and {in_lab.NEEDS['x86_64'].limit:g} on x86, if not given.",
)
@output.json_option
@click.argument("names", nargs=-1)
def conform(**options: Unpack[_Options]) -> None:
    """Play the same scenarios on the executable specification and on a real kernel, and compare.

    NAMES are scenarios, without the case in brackets all cases, or patterns with * and ?. Compared is all
    that a scenario sees: errno and progress of each call, exits, what the guest reads, dirty logs, faults,
    and the leaves of the stage-2 tables. The specification is given the page size, the IPA limit and the
    mode that the kernel reports. A kernel that hangs or panics costs the scenario that it was at; the
    others are played in another boot.

    With --arch x86_64 the kernel is Debian's own, and what it answers is compared with ours, where the law
    is no matter of arm64; its tables are not shown. Where the two are known to differ, the reason is told.
    """
    _refuse_what_x86_lacks(options)
    if options["list_only"]:
        _list(choose(options["names"], options["requirement"]))
        return
    with drawn() as progress:
        session = Session(machine_options(options), image_of(options), _limit(options), progress)
        run = _Run(options, session)
        with results_kept(lambda: run.comparisons) as interruption:
            run.play()
    _print(run)
    if run.nothing_compared:
        click.echo(f"prefault: {run.nothing_compared}", err=True)
    click.get_current_context().exit(interruption.status(run.exit_code))


def _refuse_what_x86_lacks(options: _Options) -> None:
    """Refuse options that mean nothing on another architecture.

    :raises UsageError: one was given
    """
    arch = arch_of(options)
    refuse_arm64_kernels(options, arch)
    if arch.stock and (options["program"] or options["random"]):
        raise UsageError("--program and --random compare stage-2 tables, which x86 does not show")


def _list(names: Sequence[str]) -> None:
    if output.wants_json():
        listed = [{"name": name, "requirements": SCENARIOS[name].requirements} for name in names]
        output.emit("conform", {"scenarios": listed})
        return
    table = Table("scenario", "requirements", box=None)
    for name in names:
        table.add_row(name.replace("[", r"\["), report.requirements_of(name))
    output.stdout().print(table)


@dataclass
class _Run:
    """What the options ask for, played.

    :ivar programs: those that are not listed, by name
    :ivar files: where those that differ are kept
    """

    options: _Options
    session: Session
    comparisons: list[Comparison] = field(default_factory=list)
    programs: dict[str, VmmProgram] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    def play(self) -> None:
        """Play listed scenarios, a program from a file, or random programs.

        :raises UsageError: the options contradict each other
        """
        options, file = self.options, self.options["program"]
        listed = bool(options["names"] or options["requirement"])
        if sum((listed, file is not None, bool(options["random"]))) > 1:
            raise UsageError("scenarios, --program or --random: choose one of them")
        if file:
            self.programs[file.stem] = _read(file)
            self.files[file.stem] = file
            self.comparisons = self.session.compare(Suite(programs=self.programs))
        elif options["random"]:
            self._search()
        else:
            names = choose(options["names"], options["requirement"])
            self.comparisons = self.session.compare(Suite(peers.in_order(options["arch"], names)))

    def _search(self) -> None:
        """Play random programs, and make those that differ as small as they go."""
        options = self.options
        nested = options["mode"] == "nested"
        drawn_programs = generate(options["random"], options["seed"], options["steps"], nested=nested)
        self.programs = {f"{options['seed']}-{index}": one for index, one in enumerate(drawn_programs)}
        try:
            for comparisons in self.session.search(self.programs):
                self.comparisons += comparisons
            for index, one in enumerate(self.comparisons):
                if one.verdict in BAD:
                    self.comparisons[index] = self._minimal(one)
        finally:  # as large as they are, if it was interrupted
            for one in self.bad:
                self._keep(one.name)

    def _minimal(self, one: Comparison) -> Comparison:
        program = self.programs[one.name]
        if one.verdict in SHRINKABLE:
            program, one = self.session.minimal(program, one)
        self.programs[one.name] = program
        return one

    def _keep(self, name: str) -> None:
        file = self.options["output_folder"] / f"program-{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(to_json(self.programs[name]), indent=1) + "\n")
        self.files[name] = file

    @property
    def bad(self) -> list[Comparison]:
        """What does not hold."""
        return [one for one in self.comparisons if one.verdict in BAD]

    @property
    def capability(self) -> bool:
        """Whether the kernel claims to pre-fault."""
        return on_spec.can_pre_fault(self.session.facts)

    @property
    def nothing_compared(self) -> str:
        """Why a run without a difference says nothing, if so."""
        if not self.capability:
            return (
                "the kernel does not report KVM_CAP_PRE_FAULT_MEMORY (236), so that its pre-faulting was not "
                "compared: boot one with the series, or another --mode"
            )
        if all(one.verdict is Verdict.SKIPPED for one in self.comparisons):
            return "everything was skipped: nothing was compared"
        return ""

    @property
    def exit_code(self) -> ExitCode:
        """How the command ends."""
        if self.bad:
            return ExitCode.DOES_NOT_HOLD
        return ExitCode.MISSING if self.nothing_compared else ExitCode.DONE

    def again(self, name: str) -> str:
        """The command that plays just one scenario or program in the same way."""
        options, file = self.options, self.files.get(name)
        words = ["prefault", "conform", *(["--program", str(file)] if file else [name])]
        words += ["--arch", options["arch"]] if arch_of(options).stock else []
        words += ["--mode", options["mode"]] if options["mode"] != "nested" else []
        words += ["--kernel", str(options["kernel"])] if options["kernel"] else []
        words += ["--variant", options["variant"]] if options["variant"] else []
        words += [
            f"--{flag}" for flag, given in (("lpa2", options["lpa2"]), ("mte", options["mte"])) if given
        ]
        words += ["--cpu", options["cpu"]] if options["cpu"] != "max" else []
        words += ["--memory", f"{options['memory'] >> 20}M"] if options["memory"] else []
        words += ["--limit", f"{options['limit']:g}"] if options["limit"] else []
        return shlex.join(words)


def _read(file: Path) -> VmmProgram:
    """A program out of a file.

    :raises UsageError: there is none in it
    """
    try:
        return from_json(json.loads(file.read_text()))
    except ValueError as error:
        raise UsageError(f"{file} is not JSON: {error}") from error


def _limit(options: _Options) -> float:
    return options["limit"] or in_lab.NEEDS[options["arch"]].limit * variant_of(options).slow


def machine_options(options: _Options) -> MachineOptions:
    """The lab's machine that the options ask for."""
    memory, needs, variant = options["memory"], in_lab.NEEDS[options["arch"]], variant_of(options)
    return MachineOptions(
        arch=arch_of(options),
        memory_mib=memory >> 20 if memory else max(variant.memory_mib, needs.memory_mib),
        mode=options["mode"],
        cpu=options["cpu"],
        lpa2=options["lpa2"],
        mte=options["mte"],
        append=(*needs.huge_pages, *variant.arguments),
    )


def _print(run: _Run) -> None:
    if output.wants_json():
        output.emit("conform", _json(run))
        return
    console, session = output.stdout(), run.session
    for one, alike in report.grouped(run.bad):
        lines = report.details(one, run.again(one.name), run.programs.get(one.name))
        lines += [f"  the same: {other.name}" for other in alike]
        if run.options["random"]:
            lines.append(
                "  If it teaches something, make a scenario of it: docs/conform.md, Random programs."
            )
        console.print("\n".join(lines), markup=False, soft_wrap=True)
        console.print()
    console.print(report.summary(run.comparisons))
    for line in (*report.skips(run.comparisons), *report.cuts(run.comparisons), *_of_peer(run)):
        console.print(line, markup=False, soft_wrap=True)
    noun = "program" if run.programs else "scenario"
    console.print(report.sentence(run.comparisons, noun, session.seconds, session.boots), soft_wrap=True)


def _of_peer(run: _Run) -> list[str]:
    arch = run.options["arch"]
    return [*report.known(arch, run.comparisons), *report.gone(arch, run.comparisons)]


def _json(run: _Run) -> dict[str, object]:
    counts = Counter(one.verdict.value for one in run.comparisons)
    session = run.session
    return {
        "mode": run.options["mode"],
        "arch": run.options["arch"],
        "kernel": image_of(run.options),
        "facts": session.facts,
        "boots": session.boots,
        "run_dirs": session.folders,
        "seconds": {side: round(spent, 3) for side, spent in session.seconds.items()},
        "nothing_compared": run.nothing_compared,
        "counts": {verdict.value: counts[verdict.value] for verdict in Verdict},
        "scenarios": [_comparison_json(one, run) for one in run.comparisons],
    }


def _comparison_json(one: Comparison, run: _Run) -> dict[str, object]:
    listed = SCENARIOS.get(one.name)
    known = peers.known(run.options["arch"], one)
    facts: dict[str, object] = {
        "name": one.name,
        "requirements": listed.requirements if listed else (),
        "verdict": one.verdict,
        "observations": one.compared,
        "seconds": round(one.kernel.seconds, 3),
        "cut": one.cut,
    }
    if one.verdict is not Verdict.EQUAL:
        facts["spec"] = {"outcome": one.spec.outcome, "text": one.spec.text}
        facts["kernel"] = {"outcome": one.kernel.outcome, "text": one.kernel.text}
        facts |= {"difference": one.difference, "splats": one.splats, "again": run.again(one.name)}
    if one.verdict is Verdict.KNOWN and known is not None:
        facts |= {"peer": known.peer, "reason": known.reason}
    if one.verdict in BAD and one.name in run.programs:
        facts["file"] = run.files.get(one.name)
        facts["program"] = to_json(run.programs[one.name])
    return facts
