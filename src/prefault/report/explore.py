# SPDX-License-Identifier: Apache-2.0
"""What was explored, as tables: one row per race, and the way to a violation with a column per actor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from prefault.spec.explore import Exploration, Found

_FOLDED = 6
"""A way that goes round in circles is cut after so many of its last steps."""
_LONG = 80


@dataclass(frozen=True)
class Explored:
    """One race, and what came of it.

    :ivar fault: the bug that was switched on, or an empty string
    """

    race: str
    fault: str
    result: Exploration
    seconds: float

    def to_json(self) -> dict[str, object]:
        """What ``--json`` prints of it."""
        found = self.result.found
        return {
            "race": self.race,
            "fault": self.fault or None,
            "states": self.result.states,
            "steps": self.result.steps,
            "orders": self.result.orders,
            "complete": self.result.complete,
            "seconds": round(self.seconds, 3),
            "violation": found and {"message": found.violation, "trace": [list(one) for one in found.trace]},
        }


def races_table(explored: Sequence[Explored]) -> Table:
    """What was seen of each race."""
    table = Table()
    table.add_column("race", no_wrap=True)
    for heading in ("states", "steps", "orders"):
        table.add_column(heading, justify="right")
    table.add_column("all orders")
    table.add_column("violation")
    for one in explored:
        result = one.result
        counts = (f"{result.states:,}", f"{result.steps:,}", f"{result.orders:,}")
        all_ = "yes" if result.complete else "up to it" if result.found else "no"
        table.add_row(one.race, *counts, all_, "found" if result.found else "none")
    return table


def faults_table(explored: Sequence[Explored]) -> Table:
    """Which race finds which bug, and how far one has to go for it."""
    table = Table(show_lines=True)
    table.add_column("bug switched on,\nand the race that finds it", no_wrap=True)
    table.add_column("steps", justify="right")
    table.add_column("what it takes, and what comes of it")
    for one in explored:
        found = one.result.found
        steps, told = (
            (str(len(found.trace)), f"{takes(found)}:\n{found.violation}") if found else ("", "not found")
        )
        table.add_row(f"{one.fault}\n  {one.race}", steps, told)
    return table


def takes(found: Found) -> str:
    """What it takes for a violation: one actor, several in turn, or one in the middle of another."""
    actors = [actor for actor, name in found.trace if name != "start"]
    turns = [actor for actor, _ in itertools.groupby(actors)]
    if len(turns) > len(set(turns)):
        return f"a race, {len(turns) - 1} switches"
    return "one after the other" if len(turns) > 1 else "pre-faulting alone"


def trace_table(found: Found) -> Table:
    """The way to a violation, from top to bottom, with a column per actor."""
    actors = list(dict.fromkeys(actor for actor, _ in found.trace))
    table = Table("", *actors, box=None)
    for number, (actor, name) in enumerate(found.trace, 1):
        if len(found.trace) > _LONG and _LONG < number <= len(found.trace) - _FOLDED:
            if number == _LONG + 1:
                table.add_row("…", *("…" for _ in actors))
            continue
        table.add_row(str(number), *(name if actor == one else "" for one in actors))
    return table
