# SPDX-License-Identifier: Apache-2.0
"""All listed scenarios and some random programs are the same on the specification and on the lab's kernel."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from prefault.cli.main import main
from prefault.conform.in_lab import HUGE_PAGES, play
from prefault.conform.suite import Suite, matches
from prefault.errors import ExitCode
from prefault.guest.program import Walk
from prefault.lab.machine import MODES, MachineOptions
from prefault.machine import Backing, MemoryRegion, Resident
from prefault.scenarios import SCENARIOS
from prefault.scenarios.program import BLOCK, PAGE, Guest, PreFault, SetRegion, VmmProgram
from prefault.scenarios.scenario import DATA

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


RICHER = {"--mte": "guests_with_tags*", "--lpa2": "the_top_of_the_ipa_space_can_be_prefaulted[*]"}
"""Options of the machine that some scenarios need, and which."""


@functools.cache
def _played(*words: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("click.echo", lambda text="", **more: None if more.get("err") else printed.append(text))
        status = main(["conform", "--json", *words])
    return {"status": status, **json.loads(printed[0])}


def _skipped(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in found["scenarios"] if one["verdict"] == "skipped"]


@pytest.mark.parametrize("mode", MODES)
def test_every_listed_scenario_is_equal_or_skipped_on_both_sides(mode: str) -> None:
    found = _played("--mode", mode)
    bad = [one for one in found["scenarios"] if one["verdict"] not in ("equal", "skipped")]
    assert bad == [], json.dumps(bad, indent=1)
    alone = [one for one in _skipped(found) if one["spec"]["outcome"] != one["kernel"]["outcome"]]
    # A kernel may decline what is asked of its memory management, as for pages that a hypervisor holds.
    assert [one for one in alone if not one["kernel"]["text"].startswith("madvise(")] == []
    assert found["boots"] == 1


def test_a_cpu_without_fwb_and_dic_is_no_other() -> None:
    """Caches are cleaned then, pages that were read are not executable yet, and a reset unmaps all."""
    laws = ("prefaulting_maps_what*", "guest_reads_what*", "the_host_keeps*", "*reset*")
    found = _played("--cpu", "cortex-a76", *laws)
    assert found["counts"]["equal"] == len(found["scenarios"]) > 30


def test_with_nesting_only_what_needs_more_of_the_machine_is_skipped() -> None:
    found = _played("--mode", "nested")
    assert found["status"] == ExitCode.DONE
    skipped = {one["name"] for one in _skipped(found)}
    assert not {name for name in skipped if not any(matches(name, pattern) for pattern in RICHER.values())}
    assert found["counts"]["equal"] == len(SCENARIOS) - len(skipped)


@pytest.mark.parametrize("option", list(RICHER))
def test_with_more_of_the_machine_nothing_is_skipped(option: str) -> None:
    found = _played(option, RICHER[option])
    assert found["status"] == ExitCode.DONE
    assert _skipped(found) == []


def test_random_programs_are_equal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["conform", "--json", "--random", "12", "--seed", "1", "--output", str(tmp_path)]
    status = main(words)
    found = json.loads(capsys.readouterr().out)
    assert [one for one in found["scenarios"] if one["verdict"] != "equal"] == []
    assert status == ExitCode.DONE


def test_a_scenario_that_takes_too_long_is_named_and_the_others_are_played() -> None:
    slow = VmmProgram(
        (
            SetRegion(MemoryRegion(1, DATA, 128 * BLOCK, Backing.PRIVATE, Resident.WRITE)),
            *[Guest((Walk(DATA, 128 * BLOCK, 8),))] * 20,
        )
    )
    quick = VmmProgram((SetRegion(MemoryRegion(1, DATA, BLOCK)), PreFault(DATA, PAGE)))
    suite = Suite(programs={"quick": quick, "slow": slow, "after": quick})
    found = play(suite, MachineOptions(append=HUGE_PAGES), limit=5)
    assert {name: one.outcome for name, one in found.plays.items()} == {
        "quick": "passed",
        "slow": "lost",
        "after": "passed",
    }
    assert re.fullmatch(r"not done after 5 s.*; in 1 s more: \d+ kvm_.*", found.plays["slow"].text)
    assert found.boots == 2
