# SPDX-License-Identifier: Apache-2.0
"""``prefault explore``: small programs on the specification, in every order that their steps allow."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Iterator, Sequence
from typing import TypedDict, Unpack

import click
from rich.table import Table

from prefault.cli import output
from prefault.cli.progress import drawn
from prefault.errors import ExitCode, UsageError
from prefault.lab.progress import Progress
from prefault.report.explore import Explored, faults_table, races_table, trace_table
from prefault.report.units import plural
from prefault.spec import Faults
from prefault.spec.explore import Exploration, Explorer
from prefault.spec.races import FAULTS, RACES, world

EPILOG = """\b
Examples:
  prefault explore                                             every race: finds nothing, or a bug
  prefault explore prefault-madvise --fault no_sequence_check  a bug switched on, and the way to it
  prefault explore --all-faults                                which race finds which bug
  prefault explore --list                                      races and bugs, with what they are

\b
Exit codes: 0 no violation (with --all-faults: every bug was found), 1 a violation (a bug was not found),
2 usage."""


class _Options(TypedDict):
    races: tuple[str, ...]
    fault: str | None
    all_faults: bool
    list_only: bool
    limit: int


@click.command(epilog=EPILOG)
@click.option("--fault", metavar="BUG", help="Switch a bug on; --list names them.")
@click.option("--all-faults", is_flag=True, help="Switch on one bug after the other: a race must find it.")
@click.option("--list", "list_only", is_flag=True, help="Print the races and the bugs, and explore nothing.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="STEPS",
    default=5_000_000,
    show_default=True,
    help="Give a race up after so many steps.",
)
@output.json_option
@click.argument("races", nargs=-1, metavar="[RACE]...")
def explore(**options: Unpack[_Options]) -> None:
    """Let two or three actors race on the executable specification, in every order that their steps allow.

    A race is a small program: pre-faulting against a notifier invalidation, the deletion of the memslot, the
    start of dirty logging, a guest's fault on the same page, a second pre-fault, L1's TLB invalidation and
    more. After each step it is checked that no mapping is stale, at the end that nothing was lost: no table,
    no page reference, no dirty page, no write; and that every order comes to an end. For a violation, the way
    to it is printed, with as few switches between actors as possible.
    """
    if options["list_only"]:
        _list()
        return
    _refuse_contradictions(options)
    with drawn() as progress:
        explored = list(_explore(options, progress))
    if options["all_faults"]:
        _print_faults(explored)
        held = all(one.result.found for one in explored)
    else:
        _print_races(explored)
        held = not any(one.result.found for one in explored)
    click.get_current_context().exit(ExitCode.DONE if held else ExitCode.DOES_NOT_HOLD)


def _refuse_contradictions(options: _Options) -> None:
    """Check what click cannot.

    :raises UsageError: a race or a bug is unknown, or --all-faults comes with what it chooses itself
    """
    for name in options["races"]:
        if name not in RACES:
            raise UsageError(f"there is no race {name!r}; `prefault explore --list` names them")
    if options["fault"] not in (None, *FAULTS):
        raise UsageError(f"there is no bug {options['fault']!r}; `prefault explore --list` names them")
    if options["all_faults"] and (options["races"] or options["fault"]):
        raise UsageError("--all-faults chooses race and bug itself: leave RACE and --fault out")


def _list() -> None:
    abouts = {one.name: str(one.metadata["about"]) for one in dataclasses.fields(Faults)}
    if output.wants_json():
        races = [
            {"race": name, "about": race.about, "actors": race.actors, "known": race.known or None}
            for name, race in RACES.items()
        ]
        faults = [{"fault": name, "about": abouts[name], "found_by": race} for name, race in FAULTS.items()]
        output.emit("explore", {"races": races, "faults": faults})
        return
    table = _names("race", "what races with the pre-fault", "actors")
    for name, race in RACES.items():
        about = f"{race.about} (not by default: finds what is known)" if race.known else race.about
        table.add_row(name, about, ", ".join(race.actors).replace("_", "-"))
    bugs = _names("bug", "what is wrong then", "found by")
    for name, race_name in FAULTS.items():
        bugs.add_row(name, abouts[name], race_name)
    for one in (table, "", bugs):
        output.stdout().print(one)


def _names(first: str, *others: str) -> Table:
    """A list whose first column can be copied."""
    table = Table(box=None)
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading)
    return table


def _work(options: _Options) -> list[tuple[str, str]]:
    """(race, bug) to explore; the bug may be an empty string."""
    if options["all_faults"]:
        return [(race, fault) for fault, race in FAULTS.items()]
    races = options["races"] or [name for name, race in RACES.items() if not race.known]
    return [(race, options["fault"] or "") for race in races]


def _explore(options: _Options, progress: Progress) -> Iterator[Explored]:
    work = _work(options)
    progress.stage("exploring")
    for number, (race, fault) in enumerate(work, 1):
        faults = Faults(**{fault: True}) if fault else Faults()

        def tell(result: Exploration, where: str = f"{number} of {len(work)}, {race}") -> None:
            progress.step(f" {where}: {result.states:,} states")

        began = time.monotonic()
        result = Explorer(world(race, faults), options["limit"], tell=tell).explore()
        yield Explored(race, fault, result, time.monotonic() - began)


def _print_faults(explored: Sequence[Explored]) -> None:
    if output.wants_json():
        output.emit("explore", {"faults": [one.to_json() for one in explored]})
        return
    console = output.stdout()
    console.print(faults_table(explored))
    missed = [one.fault for one in explored if not one.result.found]
    found = f"{len(explored) - len(missed)} of {plural(len(explored), 'bug')} were found"
    console.print(f"{found}; not {', '.join(missed)}." if missed else f"{found}.")


def _print_races(explored: Sequence[Explored]) -> None:
    if output.wants_json():
        output.emit("explore", {"races": [one.to_json() for one in explored]})
        return
    console = output.stdout()
    console.print(races_table(explored))
    console.print(_sentence(explored), soft_wrap=True)
    for one in explored:
        if one.result.found:
            fault = ("--fault", one.fault) if one.fault else ()
            console.print(f"\n{one.race}: {one.result.found.violation}", soft_wrap=True)
            console.print(trace_table(one.result.found))
            if RACES[one.race].known and not one.fault:
                console.print(f"This is known: {RACES[one.race].known}.", soft_wrap=True)
            console.print(f"Again: {shlex.join(('prefault', 'explore', one.race, *fault))}", soft_wrap=True)


def _sentence(explored: Sequence[Explored]) -> str:
    steps, seconds = sum(one.result.steps for one in explored), sum(one.seconds for one in explored)
    states = sum(one.result.states for one in explored)
    found = sum(one.result.found is not None for one in explored)
    cut = [one.race for one in explored if not one.result.complete and not one.result.found]
    text = f"{plural(len(explored), 'race')}, {states:,} states, {steps:,} steps in {seconds:.1f} s: "
    text += f"{plural(found, 'violation')}." if found else "no violation."
    return text + (f" Not all orders of {', '.join(cut)} were followed; --limit sets how far." if cut else "")
