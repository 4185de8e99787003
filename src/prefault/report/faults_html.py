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

import numpy as np

from prefault import __version__
from prefault.faults.plan import Plan
from prefault.faults.planning import Made
from prefault.faults.recording import Recording
from prefault.report.heat import heat, label_of, regions
from prefault.report.plan import sentences, verdict
from prefault.report.recording import summary
from prefault.report.units import format_duration, format_size, plural, round_size


def page(made: Made, recordings: Sequence[Recording]) -> str:
    """The whole page."""
    plan = made.plan
    names = [_name(number, one) for number, one in enumerate(recordings)]
    heats = [
        heat(one, needed, plan, name) for one, needed, name in zip(recordings, made.sets, names, strict=True)
    ]
    data = json.dumps([dataclasses.asdict(one) for one in heats if one], separators=(",", ":"))
    parts = {
        "TITLE": escape(_title(recordings)),
        "LEAD": "\n".join(_lead(plan, recordings)),
        "CARDS": "\n".join(_cards(plan, recordings)),
        "ADVICE": _advice(plan),
        "VCPUS": "\n".join(_per_vcpu(one, name) for one, name in zip(recordings, names, strict=True)),
        "REGIONS": "\n".join(
            _per_region(one, plan, name) for one, name in zip(recordings, names, strict=True)
        ),
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


def _cards(plan: Plan, recordings: Sequence[Recording]) -> Iterator[str]:
    told = plan.prediction
    found = [summary(one) for one in recordings]
    runs = len(recordings)
    stopped = sum(one.guest_stopped_ns for one in found) / runs
    size = recordings[0].metadata.page_size
    pages = sum(one.pages for one in found) / runs
    each = " a run" if runs > 1 else ""
    yield _card(f"{sum(one.faults for one in found) / runs:,.0f}", f"faults of all kinds{each}")
    yield _card(format_duration(stopped) if stopped else "not known", f"vCPUs were stopped for them{each}")
    yield _card(round_size(round(pages) * size), f"memory the guest needed{each}")
    yield _card(round_size(plan.size), f"the plan pre-faults, in {plural(len(plan.ranges), 'range')}")
    yield _card(f"{told.faults_saved:,.0f}", f"faults it saves{each}")
    yield _card(("-" if told.net_ns < 0 else "") + format_duration(abs(told.net_ns)), "saved in all, net")


def _card(value: str, label: str) -> str:
    return f"<li><b>{escape(value)}</b><span>{escape(label)}</span></li>"


def _advice(plan: Plan) -> str:
    if not plan.advice:
        return ""
    items = "\n".join(f"<li>{escape(one.text)}.</li>" for one in plan.advice)
    return f"<h2>What to do, and what to know</h2>\n<ul>\n{items}\n</ul>"


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


def _per_vcpu(recording: Recording, name: str) -> str:
    labels, index, count = np.unique(recording.vcpu_labels(), return_inverse=True, return_counts=True)
    spent = np.bincount(index, np.maximum(recording.faults.duration_ns, 0), minlength=len(labels))
    most = count.max(initial=1)
    order = np.argsort(-count, kind="stable")[:64] if len(labels) > 64 else np.arange(len(labels))
    rows = [
        (
            label_of(int(labels[one]), recording),
            f"{count[one]:,}",
            format_duration(float(spent[one])),
            _bar(count[one] / most),
        )
        for one in order
    ]
    return _table(("vCPU", "faults", "stopped for", ""), rows, name)


def _per_region(recording: Recording, plan: Plan, name: str) -> str:
    found = regions(recording, plan)
    most = max((one.faults for one in found), default=1)
    rows = [
        (
            f"{one.ipa:#x}",
            f"{one.faults:,}",
            format_duration(one.wait_ns),
            f"{one.pages:,} of {one.size // recording.metadata.page_size:,}",
            f"{100 * one.planned // max(1, one.pages)} %",
            _bar(one.faults / most),
        )
        for one in found
    ]
    head = ("2 MiB of memory at", "faults (not mapped)", "guest waited", "pages touched", "in the plan", "")
    return _table(head, rows, name)


def _about(recordings: Sequence[Recording]) -> str:
    rows = [
        (
            f"{number + 1}: {one.metadata.source}",
            one.metadata.architecture,
            format_size(one.metadata.page_size),
            one.metadata.kernel or "not known",
            f"{one.metadata.seconds:.3g} s",
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
