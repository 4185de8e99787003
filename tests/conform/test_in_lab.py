# SPDX-License-Identifier: Apache-2.0
"""A kernel that is lost or hangs costs one scenario, which is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from prefault.conform import in_lab, on_spec
from prefault.conform.compare import Verdict
from prefault.conform.judge import judge
from prefault.conform.session import Session
from prefault.conform.suite import Suite, choose
from prefault.errors import LabError, LabLost, ToolMissing
from prefault.lab.job import Job, JobResult, JobSplat
from prefault.lab.machine import MachineOptions
from prefault.lab.progress import Silent
from prefault.scenarios import SCENARIOS
from prefault.scenarios.program import PreFault, Protect
from prefault.spec import Faults
from tests.conform.fake_lab import FACTS, FakeLab, Line
from tests.conform.test_shrink import PROGRAM

NAMES = choose(["nested_gpa_is_an_l1_ipa", "deleted_slot_is_enoent", "copy_on_write_is_not_broken"])


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> FakeLab:
    fake = FakeLab()
    monkeypatch.setattr(in_lab, "run_job", fake)
    return fake


def test_one_boot_plays_all(lab: FakeLab) -> None:
    told: list[str] = []
    found = in_lab.play(Suite(NAMES), MachineOptions(), done=told.append)
    assert (found.boots, len(lab.jobs)) == (1, 1)
    assert list(found.plays) == told == list(NAMES)
    assert found.facts == FACTS


def test_a_lost_machine_costs_the_scenario_that_it_was_at(lab: FakeLab) -> None:
    lab.fatal = {NAMES[2]}
    found = in_lab.play(Suite(NAMES), MachineOptions())
    assert found.boots == 2
    assert {name: play.outcome for name, play in found.plays.items() if play.outcome != "passed"} == {
        NAMES[2]: "lost"
    }
    assert NAMES[2] not in lab.jobs[1].argv
    assert NAMES[3] in lab.jobs[1].argv


def test_whoever_is_killed_by_the_first_scenario_costs_no_more_than_it(
    lab: FakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine lives on after an oops, but not the process that plays."""

    def run(*arguments: Any, **named: Any) -> JobResult:
        try:
            return lab(*arguments, **named)
        except LabLost:
            return JobResult(-11, b"", b"", {}, "", 1.0, Path("runs/7"))

    lab.fatal = {NAMES[0]}
    monkeypatch.setattr(in_lab, "run_job", run)
    found = in_lab.play(Suite(NAMES), MachineOptions())
    assert (found.boots, found.plays[NAMES[0]].outcome) == (2, "lost")
    assert "status -11; see runs/7" in found.plays[NAMES[0]].text
    assert all(found.plays[name].outcome == "passed" for name in NAMES[1:])


def test_a_kernel_that_does_not_come_up_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> JobResult:
        raise LabLost("the lab's machine did not come up within 150 s")

    monkeypatch.setattr(in_lab, "run_job", run)
    with pytest.raises(LabLost, match="did not come up"):
        in_lab.play(Suite(NAMES), MachineOptions())


def test_after_too_many_lost_machines_the_rest_is_said_not_to_be_played(lab: FakeLab) -> None:
    names = choose(["*"])[: in_lab.MAX_BOOTS + 3]
    lab.fatal = set(names)
    found = in_lab.play(Suite(names), MachineOptions())
    assert found.boots == in_lab.MAX_BOOTS
    assert all(found.plays[name].outcome == "lost" for name in names)
    assert "not played" in found.plays[names[-1]].text


def test_splats_do_not_end_the_run(lab: FakeLab, monkeypatch: pytest.MonkeyPatch) -> None:
    def splat(line: Line) -> None:
        if line["name"] == NAMES[1]:
            line["kernel_log"] = ["WARNING: CPU: 1 PID: 1 at mm/gup.c:1"]

    def run(*arguments: object, **more: object) -> JobResult:
        result = lab(*arguments, **more)  # type: ignore[arg-type]
        raise JobSplat(("WARNING: CPU: 1 PID: 1 at mm/gup.c:1",), result)

    lab.change = splat
    monkeypatch.setattr(in_lab, "run_job", run)
    found = Session(MachineOptions()).compare(Suite(NAMES))
    assert [one.name for one in found if one.verdict is Verdict.SPLAT] == [NAMES[1]]
    assert sum(one.verdict is Verdict.EQUAL for one in found) == len(NAMES) - 1


def test_a_lab_that_plays_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: Job, *_: object, **__: object) -> JobResult:
        return JobResult(1, b"", b"ImportError: no", {}, "", 1.0, Path("runs/7"))

    monkeypatch.setattr(in_lab, "run_job", run)
    with pytest.raises(LabError, match="ImportError"):
        in_lab.play(Suite(NAMES), MachineOptions())


def test_without_a_lab_that_is_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> JobResult:
        raise ToolMissing("no QEMU")

    monkeypatch.setattr(in_lab, "run_job", run)
    with pytest.raises(ToolMissing, match="no QEMU"):
        in_lab.play(Suite(NAMES), MachineOptions())


def test_the_specification_is_given_the_kernels_host() -> None:
    facts = {**FACTS, "page_size": 0x4000, "ipa_limit": 52, "nested": False, "hugetlb": {"33554432": 4}}
    config = on_spec.host_config(facts)
    assert (config.page_size, config.ipa_limit, config.lpa2) == (0x4000, 52, True)
    assert (config.nested, config.protected, config.hugetlb) == (False, False, (32 << 20,))
    assert on_spec.host_config(FACTS).hugetlb[0] == 2 << 20
    facts = {**facts, "page_size": 0x1_0000, "vm_kinds": [{"name": "protected", "creatable": True}]}
    assert on_spec.host_config(facts).lpa2 is False
    assert on_spec.host_config(facts).protected is True
    assert config.mmio_sign_extends is True
    assert on_spec.host_config({**facts, "mmio_sign_extends": False}).mmio_sign_extends is False
    assert config.hafdbs is True
    assert on_spec.host_config({**facts, "access_flag_by_hardware": False}).hafdbs is False
    assert config.dic is True
    assert on_spec.host_config({**facts, "executable_at_once": False}).dic is False


def test_both_sides_without_nesting_agree_on_what_is_skipped(lab: FakeLab) -> None:
    lab.config = dataclasses.replace(lab.config, nested=False)
    lab.facts["nested"] = False
    found = Session(MachineOptions(mode="nvhe")).compare(Suite(NAMES))
    skipped = [one for one in found if one.verdict is Verdict.SKIPPED]
    assert skipped
    assert all((one.spec.outcome, one.kernel.outcome) == ("skipped", "skipped") for one in skipped)
    assert all(one.verdict in (Verdict.EQUAL, Verdict.SKIPPED) for one in found)


def wrong_leaves(line: Line) -> None:
    """A kernel that maps nothing after a protected page was pre-faulted."""
    observations = line["observations"]
    assert isinstance(observations, list)
    kinds = [what.split(": ")[-1] if "protects" not in what else "protects" for what, _ in observations]
    if "protects" in kinds:
        for what, value in observations[kinds.index("protects") :]:
            if "pre-fault" in what:
                value["leaves"] = ["nothing of the kind"]


def test_a_program_that_differs_comes_out_small(lab: FakeLab) -> None:
    lab.change = wrong_leaves
    session = Session(MachineOptions())
    (found,) = session.compare(Suite(programs={"p": PROGRAM}))
    assert found.verdict is Verdict.DIFFERENT
    program, last = session.minimal(PROGRAM, found)
    assert [type(action) for action in program.actions] == [Protect, PreFault]
    assert last.verdict is Verdict.DIFFERENT
    assert last.difference
    assert last.difference.part == "leaves"


def test_the_search_ends_when_enough_programs_differ(lab: FakeLab) -> None:
    lab.change = wrong_leaves
    programs = {str(number): PROGRAM for number in range(120)}
    batches = list(Session(MachineOptions()).search(programs))
    assert len(batches) == 1


def test_who_has_seen_enough_switches_the_machine_off(lab: FakeLab) -> None:
    found = in_lab.play(Suite(NAMES), MachineOptions(), enough=lambda so_far: NAMES[1] in so_far.plays)
    assert list(found.plays) == list(NAMES[:2])
    assert found.boots == 1


def test_a_judge_who_looks_for_one_bad_scenario_stops_at_the_first(lab: FakeLab) -> None:
    lab.faults = Faults(dirty_marked=True)
    found = judge(Path("Image"), MachineOptions(), 10, Silent(), all_of_them=False)
    assert found.capability
    assert len(found.bad) == 1
    assert found.comparisons[-1] in found.bad
    assert 1 < len(found.comparisons) < len(SCENARIOS)
