# SPDX-License-Identifier: Apache-2.0
"""``prefault lab bisectable``: every point of the series builds, boots and does what it claims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict, Unpack

import click
from rich.table import Table

from prefault.cli import output
from prefault.cli.interrupt import results_kept
from prefault.cli.progress import drawn
from prefault.conform import in_lab
from prefault.conform.compare import Verdict
from prefault.conform.judge import Judgement, judge, said
from prefault.errors import BuildFailed, ExitCode, UsageError
from prefault.lab import trial
from prefault.lab.machine import MachineOptions
from prefault.lab.progress import Progress
from prefault.lab.series import Series

EPILOG = """\b
Examples:
  prefault lab bisectable                 every point, one to two minutes each
  prefault lab bisectable --first 9       from the ninth patch on

\b
Exit codes: 0 every point holds, 1 one does not, 2 usage, 3 operating error, 77 no lab."""


class _Options(TypedDict):
    first: int
    last: int | None


@dataclass(frozen=True)
class Point:
    """The series up to one patch.

    :ivar claims: whether the kernel reports the capability there
    :ivar equal: scenarios that hold
    :ivar problem: what does not; empty if all does
    """

    number: int
    patch: str
    claims: bool = False
    equal: int = 0
    problem: str = ""


@click.command(epilog=EPILOG)
@click.option("--first", type=click.IntRange(min=0), default=0, show_default=True, help="First point.")
@click.option("--last", type=click.IntRange(min=0), help="Last point; the whole series if not given.")
@output.json_option
def bisectable(**options: Unpack[_Options]) -> None:
    """Build, boot and test the kernel after each patch of the series.

    Whoever bisects another problem lands on any point of the series. At each, the kernel must compile without
    a warning and boot; from where it reports the capability on, every scenario must hold, too, as in
    `prefault conform`. Point 0 is the base without the series.
    """
    series = trial.lab_series()
    last = len(series.patches) if options["last"] is None else options["last"]
    if not options["first"] <= last <= len(series.patches):
        raise UsageError(
            f"points {options['first']} to {last}: the series has points 0 to {len(series.patches)}"
        )
    points: list[Point] = []
    with results_kept(lambda: points) as interruption:
        for number in range(options["first"], last + 1):
            with drawn() as progress:
                points.append(_look_at(number, series, progress))
            click.echo(f"{number:2} {points[-1].patch}: {_sentence(points[-1])}", err=True)
    _print(points)
    broken = any(point.problem for point in points)
    status = ExitCode.DOES_NOT_HOLD if broken else ExitCode.DONE
    click.get_current_context().exit(interruption.status(status))


def _look_at(number: int, series: Series, progress: Progress) -> Point:
    patches = series.patches[:number]
    name = patches[-1].name if patches else "the base"
    try:
        image = trial.image(patches, name, strict=True, progress=progress)
    except BuildFailed as error:
        return Point(number, name, problem=str(error))
    options = MachineOptions(append=in_lab.HUGE_PAGES)
    return _point(number, name, judge(image, options, in_lab.LIMIT_SECONDS, progress))


def _point(number: int, name: str, found: Judgement) -> Point:
    problem, bad = "", found.bad
    if not found.capability:
        # Who claims nothing need not hold anything, but must not misbehave either.
        bad = tuple(one for one in bad if one.verdict in (Verdict.LOST, Verdict.SPLAT))
    if bad:
        problem = f"{len(bad)} scenarios do not hold, the first is {bad[0].name}: {said(bad[0])}"
    return Point(number, name, found.capability, found.equal, problem)


def _sentence(point: Point) -> str:
    if point.problem:
        return point.problem
    return f"boots, {point.equal} scenarios hold" if point.claims else "boots, claims nothing"


def _print(points: list[Point]) -> None:
    if output.wants_json():
        output.emit("lab bisectable", {"points": points})
        return
    table = Table("", "the series up to", "what holds", box=None)
    for point in points:
        table.add_row(str(point.number), point.patch, _sentence(point).replace("[", r"\["))
    output.stdout().print(table)
