# SPDX-License-Identifier: Apache-2.0
"""A conformance run for people: the summary, and each difference so that it can be acted on."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import cast

from rich.table import Table

from prefault.conform import peers
from prefault.conform.compare import BAD, Comparison, Difference, Verdict
from prefault.machine import Leaf
from prefault.report.units import plural
from prefault.scenarios import SCENARIOS
from prefault.scenarios.program import VmmProgram, leaf_line

_MEANING = {
    Verdict.EQUAL: "the law holds on both sides, and both show the same",
    Verdict.KNOWN: "the peer answers otherwise, as is known, and ours does not for a reason",
    Verdict.DIFFERENT: "the two sides do not show the same",
    Verdict.FAILED: "both sides show the same, and the law does not hold",
    Verdict.SPLAT: "the kernel logged what a sound kernel never logs",
    Verdict.LOST: "the kernel was lost or hung",
    Verdict.SKIPPED: "not compared: a side lacks something",
}
_CONTEXT = 2
_WIDE = 160


def summary(comparisons: Sequence[Comparison]) -> Table:
    """How many scenarios had which verdict."""
    counts = Counter(one.verdict for one in comparisons)
    table = Table("verdict", "how many", "meaning")
    table.columns[1].justify = "right"
    for verdict in Verdict:
        if counts[verdict] or verdict is Verdict.EQUAL:
            table.add_row(verdict.value, f"{counts[verdict]:,}", _MEANING[verdict])
    return table


def requirements_of(name: str) -> str:
    """``M3, M4``, or nothing for a program."""
    one = SCENARIOS.get(name)
    return ", ".join(one.requirements) if one else ""


def skips(comparisons: Iterable[Comparison]) -> list[str]:
    """Why scenarios were not compared, each reason once, with the side that gave it."""
    reasons: dict[str, list[str]] = {}
    for one in comparisons:
        if one.verdict is not Verdict.SKIPPED:
            continue
        kernel, spec = one.kernel.outcome == "skipped", one.spec.outcome == "skipped"
        side = "both sides" if kernel and spec else "the specification" if spec else "the kernel"
        text = (one.kernel.text if kernel else one.spec.text) or "no KVM_PRE_FAULT_MEMORY"
        reasons.setdefault(f"{side}: {text}", []).append(one.name)
    return [f"{plural(len(names), 'scenario')} skipped by {reason}" for reason, names in reasons.items()]


def cuts(comparisons: Iterable[Comparison]) -> list[str]:
    """Which programs were compared in part, and why."""
    return [
        f"{one.name}: {plural(one.compared, 'action')} of {len(one.spec.observations)} compared; {one.cut}"
        for one in comparisons
        if one.cut
    ]


def known(arch: str, comparisons: Iterable[Comparison]) -> list[str]:
    """What is known of a peer and was seen, each once, with the reason why ours is otherwise."""
    seen: dict[peers.Known, int] = {}
    for one in comparisons:
        entry = peers.known(arch, one)
        if one.verdict is Verdict.KNOWN and entry is not None:
            seen[entry] = seen.get(entry, 0) + 1
    return [
        f"{plural(count, 'scenario')} known to differ: on {arch}, {entry.peer}; not so here ({entry.reason})"
        for entry, count in seen.items()
    ]


def gone(arch: str, comparisons: Sequence[Comparison]) -> list[str]:
    """What was known of a peer and is not so any more."""
    return [
        f"no longer so on {arch}: {entry.peer}; take it out of prefault.conform.peers"
        for entry in peers.gone(arch, comparisons)
    ]


def grouped(comparisons: Iterable[Comparison]) -> list[tuple[Comparison, list[Comparison]]]:
    """Cases of one law that end in the same way, as the first of them and the others."""
    groups: dict[tuple[object, ...], list[Comparison]] = {}
    for one in comparisons:
        law = one.name.partition("[")[0]
        groups.setdefault((law, one.verdict, one.kernel.text, one.spec.text), []).append(one)
    return [(group[0], group[1:]) for group in groups.values()]


def details(one: Comparison, again: str, program: VmmProgram | None = None) -> list[str]:
    """All that is to be said about a scenario that is not equal.

    :param again: the command that repeats just this one
    :param program: what was played, if it is not a listed scenario
    """
    needs = requirements_of(one.name)
    said = [f"{one.verdict.value.upper()}  {one.name}" + (f"  ({needs})" if needs else "")]
    if program:
        said += ["  the program:", *_numbered(program.text())]
    if one.difference:
        said += _difference(one.difference)
    elif one.verdict is Verdict.DIFFERENT:
        said += [f"  {plural(one.compared, 'observation')} equal, then one side ends otherwise:"]
    said += _end("specification", one.spec.outcome, one.spec.text)
    said += _end("kernel", one.kernel.outcome, one.kernel.text)
    said += [f"  kernel log: {line}" for line in one.splats[:10]]
    return [*said, f"  again: {again}"]


def _numbered(lines: list[str]) -> list[str]:
    return [f"    {number}. {line}" if number else f"    {line}" for number, line in enumerate(lines)]


def _difference(it: Difference) -> list[str]:
    part = f": {it.part}" if it.part else ""
    said = [f"  observation {it.index + 1} differs: {it.what}{part}"]
    spec, kernel = _lines(it.spec), _lines(it.kernel)
    if len(spec) == len(kernel) == 1:
        return [*said, f"    specification  {spec[0]}", f"    kernel         {kernel[0]}"]
    diff = list(difflib.unified_diff(spec, kernel, lineterm="", n=_CONTEXT))
    # The file names are replaced by what the sides are.
    said += ["    - specification", "    + kernel"]
    return [*said, *(f"    {line}" for line in diff[2:])]


def _lines(value: object) -> list[str]:
    """A value as lines: a table by its leaves, a record by its fields, all else as it is."""
    if isinstance(value, list):
        if not value:
            return ["nothing"]
        return [line for one in value for line in _item(one)]
    return [_text(value)]


def _item(value: object) -> list[str]:
    """One of several: the tables of a list of tables are told apart by a line."""
    if isinstance(value, list):
        return ["table", *(f"  {line}" for line in _lines(value))]
    return [_text(value)]


def _text(value: object) -> str:
    if value is None:
        return "nothing"
    if not isinstance(value, dict):
        return (
            f"{value:#x}"
            if isinstance(value, int) and not isinstance(value, bool) and value > 9
            else str(value)
        )
    fields = cast(dict[str, object], value)
    if fields.get("kind") == "Leaf":
        return leaf_line(Leaf(**{name: it for name, it in fields.items() if name != "kind"}))  # type: ignore[arg-type]  # as it was written
    shown = ", ".join(f"{name}={_text(it)}" for name, it in fields.items() if name != "kind")
    return f"{fields.get('kind', '')}({shown})"


def _end(side: str, outcome: str, text: str) -> list[str]:
    lines = text.strip().splitlines()
    if text.startswith("Traceback"):
        # What happened is in its last line, and where in the last file that it names.
        where = [line.strip() for line in lines if line.strip().startswith("File ")]
        lines = [lines[-1], *where[-2:]]
    shown = lines[:6]
    head = f"  {side}: {outcome}"
    return [f"{head}: {shown[0][:_WIDE]}" if shown else head, *(f"    {line[:_WIDE]}" for line in shown[1:])]


def sentence(comparisons: Sequence[Comparison], noun: str, seconds: dict[str, float], boots: int) -> str:
    """One line about the whole run."""
    bad = sum(one.verdict in BAD for one in comparisons)
    equal = sum(one.verdict is Verdict.EQUAL for one in comparisons)
    known = sum(one.verdict is Verdict.KNOWN for one in comparisons)
    as_known = f", {known:,} different as known" if known else ""
    seen = sum(one.compared for one in comparisons)
    times = ", ".join(f"{side} {spent:.1f} s" for side, spent in seconds.items())
    return (
        f"{equal:,} of {plural(len(comparisons), noun)} equal{as_known}, {bad:,} not, "
        f"{seen:,} observations compared; {times}, {plural(boots, 'boot')}"
    )
