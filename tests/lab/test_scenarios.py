# SPDX-License-Identifier: Apache-2.0
"""Every scenario on the lab's kernel, all in one boot for each mode of KVM, each shown as a test."""

from __future__ import annotations

import functools
import json

import pytest

from prefault.conform.in_lab import HUGE_PAGES
from prefault.lab.job import Job, run_job
from prefault.lab.machine import MachineOptions
from prefault.scenarios import SCENARIOS

NESTED = {name for name, one in SCENARIOS.items() if "M4" in one.requirements} | {
    "uninitialised_vcpu_is_enoexec[True]",
    "vcpu_that_never_ran_can_prefault_beside_one_that_did[True]",
}

LARGE = {f"the_top_of_the_ipa_space_can_be_prefaulted[{bits}]" for bits in (49, 52)}
"""Scenarios that need addresses of 52 bits, with which all others take longer."""

TAGS = {name for name in SCENARIOS if name.startswith("guests_with_tags")}
"""Scenarios that need a machine with memory tags, which makes everything slower."""

NOT_UNDER_PKVM = {
    "a_huge_page_of_the_size_of_a_level_1_block_is_one",
    "read_only_slots_of_a_device_are_mapped_read_only",
    *(name for name in SCENARIOS if name.startswith("migrated_pages_are_mapped_where_they_are_now")),
    *(name for name in SCENARIOS if name.startswith("pages_that_prefaulting_brought_in_are_held_by_nobody")),
}
"""The hypervisor maps no blocks above level 2, and no devices; for the rest see the scenario."""

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]


@functools.cache
def _outcomes(
    mode: str, names: tuple[str, ...] = (), lpa2: bool = False, mte: bool = False
) -> dict[str, tuple[str, str]]:
    """What came of each scenario: (outcome, text)."""
    job = Job(("python3", "-m", "prefault.scenarios", *names), timeout=300)
    options = MachineOptions(memory_mib=3072, mode=mode, append=HUGE_PAGES, lpa2=lpa2, mte=mte)
    result = run_job(job, options)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    found = {str(line["name"]): (str(line["outcome"]), str(line["text"])) for line in lines}
    assert found, f"nothing was reported: {result.stderr.decode()}"
    return found


def _came_of(name: str, mode: str) -> tuple[str, str]:
    return _outcomes(mode).get(name, ("failed", "it was not reported: the run ended before"))


@pytest.mark.parametrize("name", sorted(LARGE))
def test_scenario_holds_with_large_addresses(name: str) -> None:
    assert _outcomes("nested", tuple(sorted(LARGE)), lpa2=True).get(name) == ("passed", "")


@pytest.mark.parametrize("name", sorted(TAGS))
def test_scenario_holds_with_memory_tags(name: str) -> None:
    assert _outcomes("nested", tuple(sorted(TAGS)), mte=True).get(name) == ("passed", "")


@pytest.mark.parametrize("name", sorted(set(SCENARIOS) - LARGE - TAGS))
def test_scenario_holds(name: str) -> None:
    assert _came_of(name, "nested") == ("passed", "")


@pytest.mark.parametrize("name", sorted(set(SCENARIOS) - NESTED - LARGE - TAGS))
def test_scenario_holds_without_vhe(name: str) -> None:
    assert _came_of(name, "nvhe") == ("passed", "")


@pytest.mark.parametrize("name", sorted(set(SCENARIOS) - NESTED - LARGE - TAGS - NOT_UNDER_PKVM))
def test_scenario_holds_under_pkvm(name: str) -> None:
    assert _came_of(name, "protected") == ("passed", "")


@pytest.mark.parametrize("name", sorted(NOT_UNDER_PKVM))
def test_a_law_that_does_not_hold_under_pkvm_is_not_played_there(name: str) -> None:
    outcome, text = _came_of(name, "protected")
    assert outcome == "skipped"
    assert "kvm-arm.mode=protected" in text
