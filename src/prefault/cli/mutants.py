# SPDX-License-Identifier: Apache-2.0
"""``prefault lab mutants``: kernels with a mistake in the series, and what catches each."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import click
from rich.table import Table

from prefault.cli import output
from prefault.cli.interrupt import results_kept
from prefault.cli.progress import drawn
from prefault.cli.values import Real
from prefault.conform import in_lab
from prefault.conform.judge import judge, said
from prefault.errors import BuildFailed, ExitCode, JobTimeout, LabLost
from prefault.lab import mutants as lab_mutants
from prefault.lab import trial, variants
from prefault.lab.job import Job, JobSplat, run_job
from prefault.lab.machine import MachineOptions
from prefault.lab.mutants import Mutant
from prefault.lab.progress import Progress
from prefault.soak.run import SoakConfig

EPILOG = """\b
Examples:
  prefault lab mutants                            all, about a minute each
  prefault lab mutants current-mmu progress-0     some of them
  prefault lab mutants --all-scenarios progress-0 every scenario that notices one
  prefault lab mutants --list                     what is wrong with each

\b
Exit codes: 0 all were caught, but for those that nobody can tell from a right kernel, 1 one was not,
2 usage, 3 operating error, 77 no lab."""


class _Options(TypedDict):
    names: tuple[str, ...]
    list_only: bool
    all_scenarios: bool
    soak_minutes: float


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    :ivar caught_by: scenarios, the soak, or a splat; empty if nothing noticed
    :ivar evidence: what they said, the first of it
    """

    mutant: Mutant
    caught_by: tuple[str, ...] = ()
    evidence: str = ""

    @property
    def surprising(self) -> bool:
        """Whether it lives and should not, or is dead and was said to be equivalent."""
        return bool(self.caught_by) == bool(self.mutant.equivalent)


@click.command(epilog=EPILOG)
@click.option("--list", "list_only", is_flag=True, help="Print what is wrong with each, and build nothing.")
@click.option(
    "--soak-minutes",
    type=Real(min=0),
    default=1,
    show_default=True,
    help="How long to soak what no scenario has caught; 0 for not at all.",
)
@click.option(
    "--all-scenarios",
    is_flag=True,
    help="Go on after the first scenario that catches a mutant, to see which others do.",
)
@output.json_option
@click.argument("names", nargs=-1)
def mutants(**options: Unpack[_Options]) -> None:
    """Build each mutant of the series, and see whether it is caught.

    A mutant is the series with one mistake that a good engineer could make, from kernel/mutants. The listed
    scenarios are played on it and on the specification and compared, as `prefault conform` does, until one
    catches it; if none does, it is soaked, as `prefault lab soak` does. A kernel that says that something is
    wrong while it boots is caught, too. A mutant that nothing catches shows a gap in the tests, unless its
    patch argues that nobody could tell. Those that only a variant of the kernel notices need that variant:
    `prefault lab build --variant debug`.
    """
    chosen = lab_mutants.choose(options["names"], lab_mutants.read())
    if options["list_only"]:
        _list(chosen)
        return
    verdicts: list[Verdict] = []
    with results_kept(lambda: verdicts) as interruption:
        for mutant in chosen:
            with drawn() as progress:
                verdict = catch(mutant, options, progress)
            verdicts.append(verdict)
            click.echo(f"{mutant.name}: {_caught(verdict)}", err=True)
    _print(verdicts)
    surprising = any(one.surprising for one in verdicts)
    status = ExitCode.DOES_NOT_HOLD if surprising else ExitCode.DONE
    click.get_current_context().exit(interruption.status(status))


def _list(chosen: list[Mutant]) -> None:
    if output.wants_json():
        output.emit("lab mutants", {"mutants": chosen})
        return
    table = Table("mutant", "what is wrong", box=None)
    for one in chosen:
        table.add_row(one.name, one.mistake)
    output.stdout().print(table)


def catch(mutant: Mutant, options: _Options, progress: Progress) -> Verdict:
    """Build it, and try to catch it."""
    try:
        image = trial.image(
            (*trial.lab_series().patches, mutant.patch),
            mutant.name,
            variant=mutant.variant,
            progress=progress,
        )
    except BuildFailed as error:
        raise BuildFailed(f"{mutant.name}: {error}") from error
    variant = variants.of(mutant.variant)
    machine = MachineOptions(
        variant.memory_mib, mode=mutant.mode, mte=mutant.mte, append=(*in_lab.HUGE_PAGES, *variant.arguments)
    )
    limit = in_lab.LIMIT_SECONDS * variant.slow
    try:
        bad = judge(image, machine, limit, progress, all_of_them=options["all_scenarios"]).bad
    except LabLost as error:
        if not error.splats:  # it may be this machine that is slow
            raise
        return Verdict(mutant, ("boot",), error.splats[0])
    if bad:
        return Verdict(mutant, tuple(one.name for one in bad), said(bad[0]))
    if not options["soak_minutes"]:
        return Verdict(mutant)
    progress.stage("soak")
    evidence = _soak(mutant, image, options["soak_minutes"])
    return Verdict(mutant, ("soak",) if evidence else (), evidence)


def _soak(mutant: Mutant, image: Path, minutes: float) -> str:
    """What a soak found; empty if nothing."""
    config = SoakConfig(seconds=60 * minutes, nested=mutant.mode == "nested")
    argv = ("python3", "-m", "prefault.soak.run", json.dumps(dataclasses.asdict(config)))
    variant = variants.of(mutant.variant)
    machine = MachineOptions(
        variant.memory_mib,
        cpus=4,
        mode=mutant.mode,
        mte=mutant.mte,
        append=("hugepages=8", *variant.arguments),
    )
    try:
        result = run_job(Job(argv, timeout=120 + 360 * minutes), machine, kernel=image)
    except JobSplat as error:
        return error.lines[0]
    except (LabLost, JobTimeout) as error:
        return str(error).splitlines()[0]
    for line in result.stdout.splitlines():
        wrong = json.loads(line).get("wrong", ())
        if wrong:
            return str(wrong[0]).strip().splitlines()[-1]
    return "" if result.status == 0 else f"the soak ended with status {result.status}"


def _caught(verdict: Verdict) -> str:
    if not verdict.caught_by:
        return f"lives: {verdict.mutant.equivalent or 'NOT CAUGHT'}"
    first, *others = verdict.caught_by
    more = f" and {len(others)} more" if others else ""
    return f"caught by {first}{more}"


def _print(verdicts: list[Verdict]) -> None:
    if output.wants_json():
        output.emit("lab mutants", {"mutants": verdicts})
        return
    table = Table("mutant", "caught by", "evidence", box=None)
    for one in verdicts:
        table.add_row(
            one.mutant.name, _caught(one).replace("[", r"\["), one.evidence[:80].replace("[", r"\[")
        )
    console = output.stdout()
    console.print(table)
    caught = sum(bool(one.caught_by) for one in verdicts)
    equivalent = sum(bool(one.mutant.equivalent) and not one.caught_by for one in verdicts)
    console.print(f"{caught} of {len(verdicts)} mutants caught, {equivalent} argued equivalent")
