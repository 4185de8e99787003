# SPDX-License-Identifier: Apache-2.0
"""``prefault conform``: the same scenarios on the specification and on a kernel in the lab."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, Unpack

import click
from rich.table import Table

from prefault.cli import output
from prefault.cli.progress import drawn
from prefault.cli.values import KernelImage, Size
from prefault.conform import in_lab, on_spec
from prefault.conform.compare import BAD, Comparison, Verdict, compare_all
from prefault.conform.in_lab import LabPlays
from prefault.conform.suite import Suite, choose
from prefault.errors import CapabilityMissing, ExitCode, UsageError
from prefault.lab.machine import MODES, MachineOptions
from prefault.lab.progress import Progress
from prefault.report import conform as report
from prefault.scenarios import SCENARIOS
from prefault.scenarios.program import from_json

EPILOG = """\b
Examples:
  prefault conform                                  all listed scenarios
  prefault conform 'nested_*' --requirement M3      some of them
  prefault conform --kernel arch/arm64/boot/Image   judge another kernel
  prefault conform --mode nvhe                      KVM in another mode
  prefault conform --list                           names and requirements

\b
Exit codes: 0 all that was compared is equal and holds, 1 a difference, a law that does not hold, a splat
or a lost kernel, 2 usage, 3 operating error, 77 no lab, or the kernel lacks the capability."""


class _Options(TypedDict):
    names: tuple[str, ...]
    requirement: tuple[str, ...]
    list_only: bool
    program: Path | None
    mode: str
    kernel: Path | None
    memory: int
    limit: float


@click.command(epilog=EPILOG)
@click.option("--requirement", multiple=True, metavar="M4", help="Only scenarios about it; repeatable.")
@click.option("--list", "list_only", is_flag=True, help="Print names and requirements, and play nothing.")
@click.option(
    "--program",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Play a program from a file in place of scenarios.",
)
@click.option(
    "--mode", type=click.Choice(MODES), default="nested", show_default=True, help="KVM's mode in the lab."
)
@click.option(
    "--kernel", type=KernelImage(), help="Boot this arm64 Image in place of the one that was built."
)
@click.option("--memory", type=Size(), default="3G", show_default=True, help="Memory of the lab's machine.")
@click.option(
    "--limit",
    type=click.FloatRange(min=1),
    default=in_lab.LIMIT_SECONDS,
    show_default=True,
    help="Seconds that one scenario may take on the kernel.",
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
    """
    if options["list_only"]:
        _list(choose(options["names"], options["requirement"]))
        return
    suite = _suite(options)
    run = _Run(options, suite)
    with drawn() as progress:
        run.play(progress)
    _print(run)
    click.get_current_context().exit(run.exit_code())


def _list(names: Sequence[str]) -> None:
    if output.wants_json():
        listed = [{"name": name, "requirements": SCENARIOS[name].requirements} for name in names]
        output.emit("conform", {"scenarios": listed})
        return
    table = Table("scenario", "requirements", box=None)
    for name in names:
        table.add_row(name.replace("[", r"\["), report.requirements_of(name))
    output.stdout().print(table)


def _suite(options: _Options) -> Suite:
    """What the options ask for.

    :raises UsageError: they contradict each other
    """
    file = options["program"]
    if file is None:
        return Suite(choose(options["names"], options["requirement"]))
    if options["names"] or options["requirement"]:
        raise UsageError("--program plays one program: leave NAMES and --requirement out")
    try:
        return Suite(programs={file.stem: from_json(json.loads(file.read_text()))})
    except ValueError as error:
        raise UsageError(f"{file} is not JSON: {error}") from error


@dataclass
class _Run:
    """A suite on both sides."""

    options: _Options
    suite: Suite
    lab: LabPlays = field(default_factory=LabPlays)
    comparisons: list[Comparison] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def play(self, progress: Progress) -> None:
        """Play the suite on the kernel, then on a specification of the same host, and compare."""
        options, names = self.options, self.suite.order()
        start = time.monotonic()
        progress.stage("the kernel in the lab", len(names))
        self.lab = in_lab.play(
            self.suite, machine_options(options), options["kernel"], options["limit"], progress.step
        )
        middle = time.monotonic()
        progress.stage("the specification", len(names))
        spec = on_spec.play(self.suite, on_spec.host_config(self.lab.facts), progress.step)
        self.seconds = {"kernel": middle - start, "specification": time.monotonic() - middle}
        self.comparisons = compare_all(spec, self.lab.plays)

    @property
    def bad(self) -> list[Comparison]:
        """What does not hold."""
        return [one for one in self.comparisons if one.verdict in BAD and not self._unserved(one)]

    @property
    def capability(self) -> bool:
        """Whether the kernel claims to pre-fault."""
        return bool(self.lab.facts.get("pre_fault_memory"))

    def _unserved(self, one: Comparison) -> bool:
        """Whether it differs only in that the kernel neither claims to pre-fault nor does it."""
        return not self.capability and one.verdict is Verdict.DIFFERENT and not _pre_faults(one)

    def exit_code(self) -> ExitCode:
        """How the command ends.

        :raises CapabilityMissing: nothing was compared that has to do with pre-faulting
        """
        if self.bad:
            return ExitCode.DOES_NOT_HOLD
        if not self.capability:
            raise CapabilityMissing(
                "the kernel does not report KVM_CAP_PRE_FAULT_MEMORY (236), so that its pre-faulting was not "
                "compared: boot one with the series, or another --mode"
            )
        if not any(one.verdict is Verdict.EQUAL for one in self.comparisons):
            raise CapabilityMissing("every scenario was skipped: nothing was compared")
        return ExitCode.DONE


def _pre_faults(one: Comparison) -> bool:
    """Whether the kernel pre-faulted anything in a scenario."""
    seen = (value for what, value in one.kernel.observations if what.startswith("pre-fault"))
    return any(isinstance(value, dict) and value.get("errno") == 0 for value in seen)


def machine_options(options: _Options) -> MachineOptions:
    """The lab's machine that the options ask for."""
    return MachineOptions(memory_mib=options["memory"] >> 20, mode=options["mode"], append=in_lab.HUGE_PAGES)


def again(name: str, options: _Options, program: Path | None = None) -> str:
    """The command that plays just one scenario or program in the same way."""
    words = ["prefault", "conform"]
    words += ["--program", str(program)] if program else [name]
    words += ["--mode", options["mode"]] if options["mode"] != "nested" else []
    words += ["--kernel", str(options["kernel"])] if options["kernel"] else []
    words += ["--memory", f"{options['memory'] >> 20}M"] if options["memory"] != 3 << 30 else []
    return shlex.join(words)


def _print(run: _Run) -> None:
    if output.wants_json():
        output.emit("conform", _json(run))
        return
    console = output.stdout()
    for one in run.bad:
        program = run.suite.programs.get(one.name)
        lines = report.details(one, again(one.name, run.options, run.options["program"]), program)
        console.print("\n".join(lines), markup=False, soft_wrap=True)
        console.print()
    console.print(report.summary(run.comparisons))
    for line in report.skips(run.comparisons):
        console.print(line, markup=False, soft_wrap=True)
    console.print(report.sentence(run.comparisons, run.seconds, run.lab.boots), soft_wrap=True)


def _json(run: _Run) -> dict[str, object]:
    counts = Counter(one.verdict.value for one in run.comparisons)
    return {
        "mode": run.options["mode"],
        "kernel": run.options["kernel"],
        "facts": run.lab.facts,
        "boots": run.lab.boots,
        "run_dirs": run.lab.folders,
        "seconds": {side: round(spent, 3) for side, spent in run.seconds.items()},
        "counts": {verdict.value: counts[verdict.value] for verdict in Verdict},
        "scenarios": [_comparison_json(one, run) for one in run.comparisons],
    }


def _comparison_json(one: Comparison, run: _Run) -> dict[str, object]:
    listed = SCENARIOS.get(one.name)
    facts: dict[str, object] = {
        "name": one.name,
        "requirements": listed.requirements if listed else (),
        "verdict": one.verdict,
        "observations": one.compared,
        "seconds": round(one.kernel.seconds, 3),
    }
    if one.verdict is not Verdict.EQUAL:
        facts["spec"] = {"outcome": one.spec.outcome, "text": one.spec.text}
        facts["kernel"] = {"outcome": one.kernel.outcome, "text": one.kernel.text}
        facts |= {"difference": one.difference, "splats": one.splats}
        facts["again"] = again(one.name, run.options, run.options["program"])
    return facts
