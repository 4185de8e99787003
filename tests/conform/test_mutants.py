# SPDX-License-Identifier: Apache-2.0
"""Bugs of a kernel are found: each is switched on in the specification that plays the kernel's part."""

from __future__ import annotations

import pytest

from prefault.conform import in_lab
from prefault.conform.compare import Verdict
from prefault.conform.session import Session
from prefault.conform.strategies import generate
from prefault.conform.suite import Suite, choose
from prefault.lab.machine import MachineOptions
from prefault.report.conform import details
from prefault.scenarios import SCENARIOS
from prefault.spec import Faults
from tests.conform.fake_lab import FakeLab

CAUGHT = [
    ("log_ignored", "prefaulting_makes_nothing_dirty", "M7", "a logged slot has a writable leaf"),
    ("dirty_marked", "prefaulting_makes_nothing_dirty", "M7", "pre-faulting made pages dirty"),
    ("log_without_protecting", "logging_switched_on_later_sees_every_write", "M7", "a write is missing"),
    ("write_fault", "copy_on_write_is_not_broken", "M6", "memory never written came out writable"),
    ("readonly_ignored", "read_only_slots_are_mapped_read_only", "M8", "has a writable leaf"),
    ("wrong_mmu", "nested_prefault_leaves_shadow_untouched", "M4", "a shadow table changed"),
    (
        "shadow_kept",
        "memory_that_the_host_takes_back_leaves_the_shadows_too",
        "M4",
        "shadows without the page",
    ),
    ("past_range", "progress_inside_a_block_is_cut_to_the_range", "M2", "a part of a block gave"),
    ("mapped_again", "mapped_memory_is_left_as_it_is", "M5", "tried again and again"),
]


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> FakeLab:
    fake = FakeLab()
    monkeypatch.setattr(in_lab, "run_job", fake)
    return fake


@pytest.mark.parametrize(("bug", "law", "requirement", "said"), CAUGHT, ids=[case[0] for case in CAUGHT])
def test_a_bug_breaks_a_law_that_says_so(
    lab: FakeLab, bug: str, law: str, requirement: str, said: str
) -> None:
    lab.faults = Faults(**{bug: True})
    found = Session(MachineOptions()).compare(Suite(choose([law])))
    wrong = [one for one in found if one.verdict is Verdict.DIFFERENT]
    assert wrong
    assert requirement in SCENARIOS[wrong[0].name].requirements
    assert said in "\n".join(details(wrong[0], "prefault conform …"))


def test_random_programs_find_what_no_law_says(lab: FakeLab) -> None:
    lab.faults = Faults(shadow_kept=True)
    programs = {str(index): one for index, one in enumerate(generate(8, 3, 25)) if one.el2}
    found = Session(MachineOptions()).compare(Suite(programs=programs))
    wrong = [one for one in found if one.verdict is Verdict.DIFFERENT]
    assert wrong
    assert wrong[0].difference
    assert wrong[0].difference.part == "shadows"
