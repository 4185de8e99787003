# SPDX-License-Identifier: Apache-2.0
"""What was measured, against what must be reached: one table, one JSON object, one plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text

from prefault.bench.cases import AGAIN, HOLD, PKVM_SHARE, SIZE, SPREAD, Case
from prefault.bench.measure import Measured
from prefault.bench.pairs import WAYS, Pair
from prefault.bench.waits import Waits
from prefault.machine import Resident
from prefault.report.profile import LONGEST, MMU_LOCK, Profile
from prefault.report.units import format_duration, format_size

COLUMNS = {
    "demand": "demand fault",
    "prefault": "pre-fault",
    "again": "again",
    "touch": "touch after",
    "populate_read": "MADV_POPULATE_READ",
    "populate_write": "MADV_POPULATE_WRITE",
    "map_populate": "MAP_POPULATE",
}
"""What is measured, and how it is called."""
SAME_PATH = 0.02
"""By how much a demand fault may differ between two kernels that have one fault path: compilers inline."""
WIDTH = 128
"""Columns that the table takes."""
PEER = "x86_64"
MODES = {
    "nested": "KVM",
    "protected": "pKVM",
    "nvhe": "KVM, nVHE",
    PEER: "x86, as a peer",
}
"""Where a case was measured: a mode of KVM, or another architecture."""


@dataclass(frozen=True)
class Row:
    """One case on a kernel.

    :ivar before: the same on the page-at-a-time version; None if that was not measured
    """

    mode: str
    case: Case
    found: Measured
    before: Measured | None = None

    @property
    def label(self) -> str:
        """Its name, with the size if that is not the usual one."""
        usual = self.case.page_size > 2 << 20 or self.case.size == SIZE
        return self.case.name if usual else f"{self.case.name} {format_size(self.case.size)}"

    def cost(self, name: str) -> float | None:
        """Instructions for each leaf; None if that was not measured."""
        return per_leaf(self.found, name)

    @property
    def page_wise(self) -> float | None:
        """What pre-faulting a leaf costs page at a time."""
        return per_leaf(self.before, "prefault") if self.before else None

    @property
    def bar(self) -> float | None:
        """What pre-faulting a leaf may cost; None if nothing was set, or it is not known."""
        if self.mode == PEER:
            return None
        if self.mode != "protected":
            return self.case.bar
        if self.page_wise is None or self.case.resident is Resident.NOTHING:
            return None  # allocation costs the same by whatever it is done
        return self.page_wise * PKVM_SHARE

    @property
    def again_per_page(self) -> float | None:
        """What a page costs that is mapped already."""
        cost = self.cost("again")
        return None if cost is None else cost * self.found.page_size / self.found.unit

    def failures(self) -> Iterator[str]:
        """What does not hold, a sentence each; nothing is asked of a peer."""
        if self.mode == PEER:
            return
        cost, again, bar = self.cost("prefault"), self.again_per_page, self.bar
        if cost is not None and bar is not None and cost > bar:
            yield f"{self.label}: pre-faulting costs {cost:,.0f}, not {bar:,.0f} or less"
        if again is not None and self.mode != "protected" and again > AGAIN:
            yield f"{self.label}: a page that is mapped costs {again:,.1f}, not {AGAIN} or less"
        if self.case.blocks and "3" in self.found.leaves:
            yield f"{self.label}: {self.found.leaves['3']} pages were mapped where blocks fit"

    def to_json(self) -> dict[str, object]:
        """As JSON types."""
        return {
            "mode": self.mode,
            "case": self.case.to_json(),
            "unit": self.found.unit,
            "leaves": self.found.leaves,
            "adjacent": self.found.adjacent,
            "cost": {name: self.cost(name) for name in COLUMNS if name in self.found.samples},
            "page_at_a_time": {
                name: per_leaf(self.before, name) for name in (self.before.samples if self.before else ())
            },
            "must_reach": self.bar,
            "does_not_hold": list(self.failures()),
            "skipped": self.found.skipped,
            "samples": self.found.samples,
        }


def per_leaf(found: Measured | None, name: str) -> float | None:
    """Instructions for each leaf, the median of all times; None if that was not measured."""
    samples = found.samples.get(name) if found else None
    if not found or not samples:
        return None
    # What was taken off may be more than there was, by an instruction or two.
    return max(0.0, statistics.median(samples) / (found.size // found.unit))


def spreads(rows: Iterable[Row]) -> Iterator[str]:
    """What does not hold of cases that were measured over several sizes."""
    sizes: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        cost = row.cost("prefault")
        if cost is not None and row.mode != PEER:
            sizes.setdefault((row.mode, row.case.name), []).append(cost)
    for (_, name), costs in sizes.items():
        if max(costs) > min(costs) * (1 + SPREAD):
            yield (
                f"{name}: pre-faulting costs {min(costs):,.1f} to {max(costs):,.1f} by size, not within "
                f"{SPREAD:.0%} of each other"
            )


def failures(rows: Sequence[Row]) -> list[str]:
    """All that does not hold."""
    return [*(line for row in rows for line in row.failures()), *spreads(rows)]


def table(rows: Sequence[Row]) -> Table:
    """All of it."""
    made = Table(title="Instructions for each page, or block where blocks are used", box=None, padding=(0, 1))
    made.add_column("case", no_wrap=True)
    made.add_column("leaf", no_wrap=True)
    headings = ("demand\nfault", "page at\na time", "pre-\nfault", "must\nreach", "again", "touch\nafter")
    beside = ("POPULATE\n_READ", "POPULATE\n_WRITE", "MAP_\nPOPULATE", "adja-\ncent")
    for heading in (*headings, *beside):
        made.add_column(heading, justify="right", no_wrap=True)
    mode = ""
    for row in rows:
        if row.mode != mode:
            mode = row.mode
            made.add_row(Text(MODES[mode], style="bold"))
        made.add_row(row.label, *_cells(row))
    return made


def _cells(row: Row) -> Iterator[str | Text]:
    if row.found.skipped:
        yield from ("", Text("skipped"))
        return
    yield format_size(row.found.unit).replace("iB", "").replace(" ", "")
    yield _number(row.cost("demand"))
    yield _number(row.page_wise)
    cost, bar = row.cost("prefault"), row.bar
    missed = cost is not None and bar is not None and cost > bar
    yield Text(_number(cost), style="" if bar is None else "red" if missed else "green")
    yield Text(
        "" if bar is None else f"{_number(bar)} {'no' if missed else 'yes'}", style="red" if missed else ""
    )
    for name in ("again", "touch", "populate_read", "populate_write", "map_populate"):
        yield _number(row.cost(name))
    yield "" if row.found.adjacent is None else f"{row.found.adjacent:.0%}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """What to know about the table, and what was not measured."""
    yield (
        "demand fault: the guest walks, nothing pre-faulted. again: the same range, mapped already. touch "
        "after: the guest walks what was pre-faulted. adjacent: neighbouring pages with neighbouring frames."
    )
    yield from _beside_peer(rows)
    for row in rows:
        if row.found.skipped:
            yield f"skipped {row.label}: {row.found.skipped}"
        fault, other = row.cost("demand"), per_leaf(row.before, "demand")
        if fault is not None and other is not None and abs(fault - other) > other * SAME_PATH:
            yield (
                f"{row.label}: a demand fault costs {fault:,.0f} on this kernel, {other:,.0f} on that of the "
                "page-at-a-time version: the fault path is not the same"
            )


def _beside_peer(rows: Sequence[Row]) -> Iterator[str]:
    """Pre-faulting over a demand fault, there and here."""
    ours = {row.label: share for row in rows if row.mode == "nested" and (share := _share(row))}
    theirs = {row.label: share for row in rows if row.mode == PEER and (share := _share(row))}
    shares = [f"{label} {theirs[label]:.2f} and {ours[label]:.2f}" for label in theirs if label in ours]
    if shares:
        yield f"pre-fault over demand fault, x86 and here: {', '.join(shares)}"
    if theirs:
        yield (
            "Compare with x86 what is resident, and not what has to be cleared or copied: the emulator "
            "counts x86's string instructions a byte at a time."
        )


def _share(row: Row) -> float | None:
    cost, fault = row.cost("prefault"), row.cost("demand")
    return cost / fault if cost is not None and fault else None


DEMAND, PAGE_WISE, PRE_FAULT = "demand fault", "page at a time", "pre-fault"
_SHOWN = 12
"""Functions of each call that a table names; the others are one row."""


@dataclass
class Profiled:
    """Where the instructions of a case go.

    :ivar profiles: by what was done: instructions by function, and the longest stretches
    """

    case: Case
    profiles: dict[str, Profile] = field(default_factory=dict)

    @property
    def leaves(self) -> int:
        """Pages, or blocks where blocks are used; of the sizes that a granule of 4 KiB gives them."""
        if not self.case.blocks:
            return self.case.size // 4096
        return self.case.size // (1 << 30 if self.case.page_size >= 1 << 30 else 2 << 20)

    def to_json(self) -> dict[str, object]:
        """As JSON types; for the whole size."""
        return {
            "case": self.case.to_json(),
            "leaves": self.leaves,
            "calls": {
                name: {"functions": dict(one.counts.most_common()), "longest": dict(one.longest)}
                for name, one in self.profiles.items()
            },
        }


def profile_table(one: Profiled) -> Table:
    """Functions by what they cost, for each leaf; below them the longest stretches."""
    size = format_size(one.case.size)
    made = Table(title=f"{one.case.name}, {size}: the kernel's instructions for each leaf", box=None)
    made.add_column("function", no_wrap=True)
    for name in one.profiles:
        made.add_column(name, justify="right", no_wrap=True)
    counts = [found.counts for found in one.profiles.values()]
    named = {name for found in counts for name, _ in found.most_common(_SHOWN)}
    # What is done now comes first, then what it was before.
    order = sorted(named, key=lambda name: tuple(-found[name] for found in reversed(counts)))

    def add(name: str, values: Iterable[float]) -> None:
        made.add_row(name, *(_number(value) if value else "" for value in values))

    for name in order:
        add(name, (found[name] / one.leaves for found in counts))
    add("all others", ((found.total() - sum(found[name] for name in order)) / one.leaves for found in counts))
    add("all", (found.total() / one.leaves for found in counts))
    made.add_row()
    for what in LONGEST:
        add(f"longest {what}", (float(found.longest[what]) for found in one.profiles.values()))
    return made


def hold(one: Profiled) -> str:
    """How long pre-faulting holds the mmu_lock, and whether it may; empty if that was not seen."""
    found = one.profiles.get(PRE_FAULT)
    if not found or not found.longest[MMU_LOCK]:
        return ""
    longest = found.longest[MMU_LOCK]
    verdict = "does not hold" if longest > HOLD else "holds"
    return f"{verdict}: the mmu_lock is held for {longest:,} instructions at most; {HOLD:,} is the limit"


WAITED = {"fault": "demand fault of another vCPU", "invalidation": "MADV_DONTNEED of another page"}


def waits_table(found: Mapping[str, Sequence[Waits]]) -> Table:
    """How long others took, beside other work and beside each version of the ioctl.

    :param found: by version
    """
    made = Table(title="Time, emulated: how long others take while one vCPU pre-faults", box=None)
    made.add_column("what", no_wrap=True)
    made.add_column("meanwhile", no_wrap=True)
    for heading in ("times", "median", "90 %", "99 %", "longest"):
        made.add_column(heading, justify="right")
    for kind, what in WAITED.items():
        for version, waits in found.items():
            for one in waits:
                if one.kind == kind and one.ns:
                    meanwhile = f"{version}: {'pre-faulting' if one.busy else 'other work'}"
                    made.add_row(
                        what, meanwhile, f"{len(one.ns):,}", *map(format_duration, quantiles(one.ns))
                    )
    return made


PAIRED = {"one": "one vCPU", "halves": "two vCPUs, a half each", "both all": "two vCPUs, all of it each"}


def pairs_table(found: Mapping[str, Mapping[str, Sequence[Pair]]]) -> Table:
    """What two vCPUs take for what one does, as medians over the rounds.

    :param found: by version; ``instructions`` are those of a machine whose clock counts them
    """
    made = Table(title="Pre-faulting with two vCPUs, as a share of what one takes", box=None)
    made.add_column("who", no_wrap=True)
    made.add_column("version", no_wrap=True)
    for heading in ("times", "instructions", "time, emulated", "CPU time of both"):
        made.add_column(heading, justify="right")
    for way in WAYS:
        for version, pairs in found.items():
            rounds = share_of_one(pairs["time"], way)
            elapsed, spent = (statistics.median(shares) for shares in zip(*rounds, strict=True))
            done = statistics.median(share for share, _ in share_of_one(pairs["instructions"], way))
            shares = (f"{share:.2f}" for share in (done, elapsed, spent))
            made.add_row(PAIRED[way], version, f"{len(rounds):,}", *shares)
    return made


def share_of_one(pairs: Sequence[Pair], way: str) -> list[tuple[float, float]]:
    """Time and CPU time of one way, over those of one vCPU in the same round."""
    alone = [pair for pair in pairs if pair.way == WAYS[0]]
    others = [pair for pair in pairs if pair.way == way]
    return [(b.ns / a.ns, b.cpu_ns / a.cpu_ns) for a, b in zip(alone, others, strict=True)]


def quantiles(values: Sequence[int]) -> tuple[int, int, int, int]:
    """Median, 90 %, 99 %, and the longest."""
    ordered = sorted(values)
    half, most, nearly = (
        ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 90, 99)
    )
    return half, most, nearly, ordered[-1]


def plot(rows: Sequence[Row], file: Path) -> None:
    """Demand fault, page at a time and pre-fault of each case as bars, what must be reached as a mark.

    :param file: its suffix says the format: svg, png, pdf
    :raises OSError: it cannot be written
    :raises ValueError: there is no such format
    """
    import matplotlib  # half a second, for who wants a plot
    from matplotlib.figure import Figure

    shown = [row for row in rows if not row.found.skipped]
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    places = [-float(index) for index in range(len(shown))]
    for shift, colour, name in (
        (0.25, "#c44e52", "demand"),
        (0, "#dd8452", ""),
        (-0.25, "#4c72b0", "prefault"),
    ):
        costs = [(row.cost(name) if name else row.page_wise) or 0 for row in shown]
        label = COLUMNS.get(name, "pre-fault, page at a time")
        axes.barh([place + shift for place in places], costs, height=0.24, color=colour, label=label)
    marks = [(row.bar, place - 0.25) for row, place in zip(shown, places, strict=True) if row.bar is not None]
    if marks:
        axes.plot(*zip(*marks, strict=True), "k|", markersize=9, label="must reach")
    several = len({row.mode for row in shown}) > 1
    axes.set_yticks(places, [f"{MODES[row.mode]}: {row.label}" if several else row.label for row in shown])
    axes.set_ylim(min(places, default=0) - 0.6, 0.6)
    axes.set_xscale("log")
    axes.set_xlabel("instructions for each page, or block where blocks are used")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=4, frameon=False)
    # Neither chance nor a date in it: the same figures give the same file. Text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "prefault", "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
