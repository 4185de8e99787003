# SPDX-License-Identifier: Apache-2.0
"""The page of a plan: well-formed, whole, safe, small, and it says the numbers without JavaScript."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given

from prefault.faults.planning import PlanConfig, make_plan
from prefault.faults.recording import Recording
from prefault.faults.working_set import DEVICE_FAULTS
from prefault.report.faults_html import page
from tests.faults.recordings import RECORDINGS, Fault, recording_of

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Reader(HTMLParser):
    """Checks that elements are closed in order; collects ids, text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


def made(*recordings: Recording) -> str:
    return page(make_plan(recordings, PlanConfig(4096)), recordings)


def page_of_granules(*recordings: Recording) -> str:
    return page(make_plan(recordings, PlanConfig()), recordings)


def parsed(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def data_of(text: str) -> list[dict[str, Any]]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert match
    return list(json.loads(match[1]))


@given(RECORDINGS)
def test_every_page_is_well_formed_and_whole(recording: Recording) -> None:
    text = made(recording)
    reader = parsed(text)
    assert len(reader.ids) == len(set(reader.ids))
    assert "{{" not in text
    assert sum(sum(one["all"]["cells"][4]) for one in data_of(text)) == len(recording)


def test_nothing_is_fetched() -> None:
    text = made(recording_of([Fault(1)]))
    reader = parsed(text)
    assert not [value for name, value in reader.attributes if name in ("src", "href", "srcset")]
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|@import|fetch\(|XMLHttpRequest|url\(", text)


def test_what_the_scripts_ask_for_is_there() -> None:
    text = made(recording_of([Fault(1)]))
    asked = set(re.findall(r'(?:\$|getElementById)\("([\w-]+)"\)', text)) | {"vcpu", "kind", "measure"}
    assert asked <= set(parsed(text).ids)


def test_the_numbers_are_there_without_javascript() -> None:
    said = " ".join(parsed(made(recording_of([Fault(2 * n, 20_000 * n, 5000) for n in range(1000)]))).text)
    assert "your guest took 1,000 stage-2 faults" in said
    assert "It pays:" in said
    assert "What is a stage-2 fault" in said


def test_what_needs_javascript_is_hidden_without_it() -> None:
    text = made(recording_of([Fault(1)]))
    assert "[hidden] { display: none !important; }" in text  # else, display: flex would show them
    assert '<fieldset id="controls" hidden>' in text
    assert text.count("<figure") == text.count("<figure hidden>") == 2


def test_one_fault_is_told_in_the_singular() -> None:
    assert "took 1 stage-2 fault on memory" in " ".join(parsed(made(recording_of([Fault(1, 0, 900)]))).text)


def test_durations_that_are_not_known_are_not_told_as_none() -> None:
    text = made(recording_of([Fault(1), Fault(2, 9)]))
    assert text.count("<td>not known</td>") == 3  # the kernel, the vCPU's, the memory's
    assert "<td>0 ns</td>" not in text


def test_memory_that_the_guest_needed_is_the_plans_working_set() -> None:
    device = [Fault(3, time) for time in range(DEVICE_FAULTS)]
    text = made(recording_of([*device, Fault(512, 99)]))
    assert "<b>4 KiB</b><span>memory the guest needed</span>" in text


def test_a_table_of_one_run_has_no_name_and_those_of_several_have() -> None:
    one, other = recording_of([Fault(1)], source="a"), recording_of([Fault(2)], source="b")
    assert "<caption>" not in made(one)
    assert "<caption>1: a</caption>" in made(one, other)


def test_a_command_can_be_copied_without_its_button() -> None:
    text = made(recording_of([Fault(2 * n, 20_000 * n, 5000) for n in range(1000)]))
    assert "<pre><code>prefault apply plan.json --pid PID</code></pre>" in text


def test_paper_is_light() -> None:
    text = made(recording_of([Fault(1)]))
    assert "@media screen and (prefers-color-scheme: dark)" in text
    assert "print-color-adjust: exact" in text


def test_what_settles_the_matter_is_said_first() -> None:
    said = " ".join(parsed(page_of_granules(recording_of([Fault(16 * n, n, 900) for n in range(9)]))).text)
    assert said.index("Leave it:") < said.index("The plan maps")


def test_names_from_outside_cannot_become_markup() -> None:
    evil = '</script><script>alert(1)</script><img src=x onerror="x">{{DATA}}'
    recording = recording_of([Fault(1)], source=evil, kernel=evil, threads={7: (1, evil)})
    recording.faults.vcpu[:] = -1
    text = made(recording)
    assert "<script>alert" not in text
    assert "<img" not in text
    assert len(re.findall("<script", text)) == 2
    parsed(text)
    assert data_of(text)[0]["name"] == f"1: {evil}"


def test_several_runs_can_be_chosen() -> None:
    runs = data_of(made(recording_of([Fault(1)]), recording_of([Fault(2), Fault(3)])))
    assert [sum(one["all"]["cells"][4]) for one in runs] == [1, 2]


@pytest.mark.parametrize("faults", [[], [Fault(0)]])
def test_a_recording_with_next_to_nothing_has_a_page(faults: list[Fault]) -> None:
    parsed(made(recording_of(faults)))


@pytest.mark.parametrize("name", ["architecture", "kernel", "source", "recorded", "format", "clock"])
def test_no_fact_of_a_recording_becomes_markup(name: str) -> None:
    """A cell that begins as one of the page's own would, for instance."""
    hostile = "<td><img src=x onerror=alert(1)></td>{{DATA}}</script><script>alert(2)</script>"
    facts: Any = {name: hostile}
    one = recording_of([Fault(1, 5, 900)])
    text = made(Recording(dataclasses.replace(one.metadata, **facts), one.faults))
    parsed(text)
    assert "<img" not in text
    assert "<script>alert" not in text
    assert text.count("<script") == 2
