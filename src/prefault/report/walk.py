# SPDX-License-Identifier: Apache-2.0
"""A guest's walk without and with pre-faulting: one table, and what it means in one line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from prefault.machine import Resident
from prefault.report.units import format_duration, format_size, plural
from prefault.scenarios.walk import WalkConfig, WalkResult, WalkRun, When

_RESIDENT = {
    Resident.NOTHING: "not resident",
    Resident.READ: "populated for reading",
    Resident.WRITE: "resident",
}
_KINDS = ("read", "write", "execute", "permission")


@dataclass(frozen=True)
class Clock:
    """What a nanosecond of the machine's clock means.

    :ivar icount: an instruction
    :ivar estimated: the numbers were not measured in this walk
    """

    icount: bool
    estimated: bool = False

    def text(self, ns: float) -> str:
        """An amount, readable: instructions as a number, time with its unit; three digits of an estimate."""
        ns = float(f"{ns:.3g}") if self.estimated else ns
        return f"{ns:,.0f}" if self.icount else format_duration(ns)

    def phrase(self, ns: float) -> str:
        """An amount within a sentence."""
        about = "about " if self.estimated else ""
        return f"{about}{self.text(ns)} instructions" if self.icount else self.text(ns)

    @property
    def heading(self) -> str:
        """What the amounts are."""
        unit = "instructions" if self.icount else "time"
        return f"{unit}, estimated" if self.estimated else unit


def walk_table(result: WalkResult, clock: Clock, wall: tuple[float, float] | None = None) -> Table:
    """Both walks side by side, and the difference.

    :param wall: seconds that each took outside of the machine, if its clock counts instructions
    """
    table = Table()
    table.add_column("")
    for heading in ("demand faults", "pre-faulted", "difference"):
        table.add_column(heading, justify="right")
    for name, left, right in _counts(result.without, result.with_prefault):
        table.add_row(name, f"{left:,}", f"{right:,}", _gain(left, right, f"{right - left:+,}"))
    table.add_section()
    for name, left, right in _costs(result.without, result.with_prefault, clock):
        table.add_row(name, *_cells(left, right, clock))
    if wall:
        left, right = (round(seconds * 1e9) for seconds in wall)
        table.add_row("time, emulated", *_cells(left, right, Clock(icount=False)))
    return table


def describe(config: WalkConfig) -> str:
    """What the guest does, in one line."""
    who = "An L2 and its L1 walk" if config.nested else "A guest walks"
    when = "while it runs" if config.when is When.WHILE_RUNNING else "before it runs"
    return (
        f"{who} {format_size(config.size)}: {config.backing.value} memory, {_RESIDENT[config.resident]}, "
        f"{plural(config.vcpus, 'vCPU')}, {config.write_permille / 10:g} % writes; "
        f"{config.prefault_permille / 10:g} % pre-faulted {when}"
    )


def sentence(result: WalkResult, clock: Clock) -> str:
    """What it comes to, in one line."""
    without, with_ = result.without, result.with_prefault
    pages = with_.prefaulted_bytes // result.page_size
    spared = without.faults.total - with_.faults.total
    if not pages:
        return "Nothing was pre-faulted."
    what, cost = f"Pre-faulting {plural(pages, 'page')}", clock.phrase(with_.prefault_ns / pages)
    if spared <= 0:
        return f"{what} spared the guest no stage-2 fault; it cost {cost} per page."
    fault = clock.phrase((without.walk_ns - with_.walk_ns) / spared)
    total = (with_.prefault_ns + with_.walk_ns) / without.walk_ns - 1
    return (
        f"{what} spared the guest {plural(spared, 'stage-2 fault')}: it cost {cost} per page, "
        f"a fault costs {fault}. "
        f"The guest's own walk took {clock.text(with_.walk_ns)} in place of {clock.phrase(without.walk_ns)}; "
        f"with pre-faulting added that is {abs(total):.0%} {'less' if total < 0 else 'more'} in all."
    )


def _counts(without: WalkRun, with_: WalkRun) -> Iterator[tuple[str, int, int]]:
    yield "stage-2 faults", without.faults.total, with_.faults.total
    for kind in _KINDS:
        yield f"  {kind}", getattr(without.faults, kind), getattr(with_.faults, kind)
    yield "exits to user space", without.exits, with_.exits
    for title, left, right in (
        ("leaves", without.leaves, with_.leaves),
        ("shadow leaves", without.shadow_leaves, with_.shadow_leaves),
    ):
        for level in sorted({*left, *right}):
            yield f"{title} at level {level}", left.get(level, 0), right.get(level, 0)


def _costs(without: WalkRun, with_: WalkRun, clock: Clock) -> Iterator[tuple[str, int, int]]:
    total = (without.prefault_ns + without.walk_ns, with_.prefault_ns + with_.walk_ns)
    yield clock.heading, *total
    yield "  pre-faulting", without.prefault_ns, with_.prefault_ns
    for left, right in zip(without.phases, with_.phases, strict=True):
        yield f"  {left.name}", left.ns, right.ns


def _cells(left: int, right: int, clock: Clock) -> tuple[str, str, Text]:
    sign = "-" if right < left else "+"
    return clock.text(left), clock.text(right), _gain(left, right, sign + clock.text(abs(right - left)))


def _gain(left: int, right: int, text: str) -> Text:
    """Less is green, more is red, and nothing is said where nothing changed."""
    return Text("" if left == right else text, style="green" if right < left else "red")
