# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from prefault.machine import FaultCounts
from prefault.report.walk import Clock, describe, sentence, walk_table
from prefault.scenarios.walk import Phase, WalkConfig, WalkResult, WalkRun

PAGES = 1000
RUN = WalkRun(
    phases=(
        Phase("first half", 2_500_000, 2, FaultCounts(read=500, permission=3)),
        Phase("second half", 2_500_000, 2, FaultCounts(write=500)),
    ),
    prefault_ns=0,
    prefaulted_bytes=0,
    leaves={"3": PAGES},
    shadow_leaves={},
    bytes_checked=8000,
)
SPARED = dataclasses.replace(
    RUN,
    phases=(Phase("first half", 4_000, 2), Phase("second half", 6_000, 2)),
    prefault_ns=4_000_000,
    prefaulted_bytes=PAGES * 4096,
    leaves={"2": 1, "3": PAGES - 512},
)
RESULT = WalkResult(WalkConfig(size=PAGES * 4096), 4096, RUN, SPARED)
INSTRUCTIONS = Clock(icount=True)


def rows(result: WalkResult, clock: Clock, wall: tuple[float, float] | None = None) -> dict[str, list[str]]:
    """The printed table: name of the row → its other cells."""
    text = io.StringIO()
    Console(file=text, width=100).print(walk_table(result, clock, wall))
    cells = [
        line.strip("│┃").replace("┃", "│").split("│") for line in text.getvalue().splitlines() if "│" in line
    ]
    return {name.strip(): [cell.strip() for cell in rest] for name, *rest in cells}


def test_faults_are_shown_by_kind_with_their_difference() -> None:
    shown = rows(RESULT, INSTRUCTIONS)
    assert shown["stage-2 faults"] == ["1,000", "0", "-1,000"]
    assert shown["read"] == ["500", "0", "-500"]
    assert shown["write"] == ["500", "0", "-500"]
    assert shown["permission"] == ["3", "0", "-3"]
    assert shown["exits to user space"] == ["4", "4", ""]


def test_leaves_are_shown_for_every_level_that_either_walk_has() -> None:
    shown = rows(RESULT, INSTRUCTIONS)
    assert shown["leaves at level 2"] == ["0", "1", "+1"]
    assert shown["leaves at level 3"] == ["1,000", "488", "-512"]


def test_the_total_has_pre_faulting_and_the_walk() -> None:
    shown = rows(RESULT, INSTRUCTIONS)
    assert shown["instructions"] == ["5,000,000", "4,010,000", "-990,000"]
    assert shown["pre-faulting"] == ["0", "4,000,000", "+4,000,000"]
    assert shown["second half"] == ["2,500,000", "6,000", "-2,494,000"]


def test_without_icount_the_clock_is_time() -> None:
    shown = rows(RESULT, Clock(icount=False))
    assert shown["time"] == ["5 ms", "4.01 ms", "-990 µs"]
    assert "instructions" not in shown


def test_wall_time_stands_beside_instructions() -> None:
    assert rows(RESULT, INSTRUCTIONS, (0.5, 0.25))["time, emulated"] == ["500 ms", "250 ms", "-250 ms"]
    assert "time, emulated" not in rows(RESULT, INSTRUCTIONS)


def test_the_sentence_has_the_cost_per_page_and_per_fault() -> None:
    assert sentence(RESULT, INSTRUCTIONS) == (
        "Pre-faulting 1,000 pages spared the guest 1,000 stage-2 faults: it cost 4,000 instructions "
        "per page, a fault costs 4,990 instructions. "
        "The guest's own walk took 10,000 in place of 5,000,000 instructions; "
        "with pre-faulting added that is 20% less in all."
    )


def test_a_walk_that_became_dearer_is_called_dearer() -> None:
    dear = dataclasses.replace(RESULT, with_prefault=dataclasses.replace(SPARED, prefault_ns=9_990_000))
    assert "100% more in all" in sentence(dear, INSTRUCTIONS)


def test_pre_faulting_that_spared_nothing_is_not_sold_as_a_gain() -> None:
    useless = dataclasses.replace(RUN, prefault_ns=4_000_000, prefaulted_bytes=PAGES * 4096)
    text = sentence(dataclasses.replace(RESULT, with_prefault=useless), INSTRUCTIONS)
    assert "no stage-2 fault" in text
    assert "4,000 instructions per page" in text


def test_nothing_pre_faulted_is_said_to_be_nothing() -> None:
    assert (
        sentence(dataclasses.replace(RESULT, with_prefault=RUN), INSTRUCTIONS) == "Nothing was pre-faulted."
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            WalkConfig(),
            ["A guest walks 32 MiB", "private memory", "1 vCPU,", "50 % writes", "before it runs"],
        ),
        (WalkConfig(nested=True, vcpus=2), ["An L2 and its L1 walk", "2 vCPUs"]),
        (WalkConfig(prefault_permille=125), ["12.5 % pre-faulted"]),
    ],
)
def test_the_title_says_what_was_asked_for(config: WalkConfig, words: list[str]) -> None:
    for word in words:
        assert word in describe(config)
