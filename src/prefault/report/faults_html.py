# SPDX-License-Identifier: Apache-2.0
"""Recordings and their plan as one page for a browser: nothing is fetched, and it reads without JavaScript,
too.

The page itself is ``faults.html`` beside this file; what is put into it is escaped here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import repeat

import numpy as np

from prefault import __version__
from prefault.faults.plan import Plan
from prefault.faults.planning import USELESS, Made
from prefault.faults.recording import Recording
from prefault.faults.working_set import WorkingSet
from prefault.report.heat import heat, names_of, regions
from prefault.report.next_steps import Files, Step, next_steps
from prefault.report.plan import sentences, verdict
from prefault.report.recording import summary
from prefault.report.units import format_duration, format_size, plural, round_size


def page(made: Made, recordings: Sequence[Recording], named: Files | None = None) -> str:
    """The whole page.

    :param named: what the recordings and the plan are called in the commands that it shows
    """
    plan = made.plan
    names = [_name(number, one) for number, one in enumerate(recordings)]
    heats = [
        heat(one, needed, plan, name) for one, needed, name in zip(recordings, made.sets, names, strict=True)
    ]
    captions = names if len(names) > 1 else [""]
    data = json.dumps([dataclasses.asdict(one) for one in heats if one], separators=(",", ":"))
    parts = {
        "TITLE": escape(_title(recordings)),
        "LEAD": "\n".join(_lead(plan, recordings)),
        "CARDS": "\n".join(_cards(made, recordings)),
        "STEPS": "\n".join(map(_step, next_steps(plan, recordings, named or Files()))),
        "ADVICE": _advice(plan),
        "VCPUS": "\n".join(map(_per_vcpu, recordings, captions)),
        "REGIONS": "\n".join(map(_per_region, recordings, made.sets, repeat(plan), captions)),
        "ABOUT": _about(recordings),
        "DATA": data.replace("<", "\\u003c"),
    }
    text = files("prefault.report").joinpath("faults.html").read_text(encoding="utf-8")
    first, *rest = text.split("{{")
    return first + "".join(parts[one.partition("}}")[0]] + one.partition("}}")[2] for one in rest)


def _name(number: int, recording: Recording) -> str:
    return f"{number + 1}: {recording.metadata.source or 'recording'}"


def _title(recordings: Sequence[Recording]) -> str:
    sources = ", ".join(one.metadata.source or "a recording" for one in recordings[:3])
    return f"Stage-2 faults of {sources}" + (" and others" if len(recordings) > 3 else "")


def _lead(plan: Plan, recordings: Sequence[Recording]) -> Iterator[str]:
    seconds = sum(one.metadata.seconds for one in recordings) / len(recordings)
    says = verdict(plan, plan.prediction)
    for sentence in sentences(plan, seconds):
        kind = f' class="verdict {"yes" if plan.pays else "no"}"' if sentence == says else ""
        yield f"<p{kind}>{escape(sentence)}</p>"


def _cards(made: Made, recordings: Sequence[Recording]) -> Iterator[str]:
    plan, told = made.plan, made.plan.prediction
    found = [summary(one) for one in recordings]
    runs = len(recordings)
    stopped = sum(one.guest_stopped_ns for one in found) / runs
    needed = sum(len(one.page) * one.page_size for one in made.sets) / runs
    each = ", per run" if runs > 1 else ""
    faults = f"{sum(one.faults for one in found) / runs:,.0f}"
    yield _card(faults, f"{'fault' if faults == '1' else 'faults'} of all kinds{each}")
    yield _card(_waited(stopped), f"vCPU time that these took{each}")
    yield _card(round_size(round(needed)), f"memory the guest needed{each}")
    yield _card(round_size(plan.size), f"the plan pre-faults, in {plural(len(plan.ranges), 'range')}")
    yield _card(f"{told.faults_saved:,.0f}", f"faults it saves{each}")
    yield _card(
        ("-" if told.net_ns < 0 else "") + format_duration(abs(told.net_ns)), f"vCPU time saved, net{each}"
    )


def _card(value: str, label: str) -> str:
    return f"<li><b>{escape(value)}</b><span>{escape(label)}</span></li>"


def _advice(plan: Plan) -> str:
    if not plan.advice:
        return ""
    # What settles the matter comes first.
    ordered = sorted(plan.advice, key=lambda one: one.kind not in ("nothing", *USELESS))
    items = "\n".join(f"<li>{escape(one.text[:1].upper() + one.text[1:])}.</li>" for one in ordered)
    return f"<h2>What else to know</h2>\n<ul>\n{items}\n</ul>"


def _step(step: Step) -> str:
    command = f"\n<pre><code>{escape(step.command)}</code></pre>" if step.command else ""
    return f"<li>{escape(step.text)}{command}</li>"


def _waited(ns: float) -> str:
    """A recording without durations adds up to none."""
    return format_duration(ns) if ns else "not known"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table; what is no ``_Markup`` is escaped."""
    cells = "".join(f'<th scope="col">{escape(one)}</th>' for one in head)
    body = "\n".join("<tr>" + "".join(_cell(one) for one in row) + "</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{cells}</tr></thead>\n<tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    return text if isinstance(text, _Markup) else f"<td>{escape(text)}</td>"


class _Markup(str):
    """A cell that this module has made; all others have what recordings say, whoever wrote them."""


def _bar(share: float) -> _Markup:
    return _Markup(f'<td class="bar"><i style="width:{100 * share:.1f}%"></i></td>')


def _per_vcpu(recording: Recording, caption: str) -> str:
    labels, index, count = np.unique(recording.vcpu_labels(), return_inverse=True, return_counts=True)
    spent = np.bincount(index, np.maximum(recording.faults.duration_ns, 0), minlength=len(labels))
    names = names_of(labels, recording)
    most = count.max(initial=1)
    order = np.argsort(-count, kind="stable")[:64] if len(labels) > 64 else np.arange(len(labels))
    rows = [
        (
            names[one],
            f"{count[one]:,}",
            _waited(float(spent[one])),
            _bar(count[one] / most),
        )
        for one in order
    ]
    return _table(("vCPU", "faults", "stopped for", "share of the busiest"), rows, caption)


def _per_region(recording: Recording, needed: WorkingSet, plan: Plan, caption: str) -> str:
    found = regions(recording, needed, plan)
    if not found:
        return f"<p>{escape(caption)} No fault on memory that was not mapped.</p>"
    most = found[0].faults
    rows = [
        (
            f"{one.ipa:#x}",
            f"{one.faults:,}",
            _waited(one.wait_ns),
            f"{one.pages:,} of {one.size // recording.metadata.page_size:,}",
            f"{100 * one.planned // max(1, one.pages)} %",
            _bar(one.faults / most),
        )
        for one in found
    ]
    head = (
        "2 MiB of memory at",
        "faults (not mapped)",
        "guest waited",
        "pages touched",
        "in the plan",
        "share of the most",
    )
    return _table(head, rows, caption)


def _about(recordings: Sequence[Recording]) -> str:
    rows = [
        (
            f"{number + 1}: {one.metadata.source}",
            one.metadata.architecture,
            format_size(one.metadata.page_size),
            one.metadata.kernel or "not known",
            format_duration(one.metadata.seconds * 1e9),
            f"{len(one):,}",
            f"{one.metadata.lost_events:,}",
            f"{one.metadata.bad_lines:,}",
            one.metadata.recorded,
        )
        for number, one in enumerate(recordings)
    ]
    head = (
        "source",
        "architecture",
        "page",
        "kernel",
        "length",
        "faults",
        "events lost",
        "bad lines",
        "recorded",
    )
    return _table(head, rows) + f'\n<p class="soft">Made by prefault {escape(__version__)}.</p>'
