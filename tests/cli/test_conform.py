# SPDX-License-Identifier: Apache-2.0
"""``prefault conform`` with a lab whose kernel is the specification, right or with a bug."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from prefault.cli.interrupt import INTERRUPTED
from prefault.cli.main import main
from prefault.conform import in_lab
from prefault.conform.session import Session
from prefault.errors import ExitCode, ToolMissing
from prefault.scenarios import SCENARIOS
from prefault.spec import Faults
from tests.conform.fake_lab import FakeLab, Line
from tests.conform.test_in_lab import wrong_leaves

LAW = "deleted_slot_is_enoent"
HONEST = "capability_is_reported_where_it_works"


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> FakeLab:
    fake = FakeLab()
    monkeypatch.setattr(in_lab, "run_job", fake)
    return fake


def reported(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]  # an object was written


def test_equal_scenarios_end_with_0(lab: FakeLab, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conform", "copy_on_write_is_not_broken", LAW]) == ExitCode.DONE
    assert "5 of 5 scenarios equal" in capsys.readouterr().out
    assert len(lab.jobs) == 1


def test_json_has_every_scenario_with_its_requirements(
    lab: FakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conform", "--json", LAW]) == ExitCode.DONE
    found = reported(capsys)
    assert (found["version"], found["command"], found["counts"]["equal"]) == (1, "conform", 1)
    (one,) = found["scenarios"]
    assert (one["name"], one["verdict"], one["requirements"]) == (LAW, "equal", ["M10"])


def test_a_difference_is_shown_with_the_command_that_repeats_it(
    lab: FakeLab, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def bug(line: Line) -> None:
        observations: Any = line["observations"]
        observations[-1][1]["errno"] = 14

    lab.change = bug
    kernel = tmp_path / "Image"
    kernel.write_bytes(b"\0" * 56 + b"ARM\x64" + b"\0" * 64)
    words = ["conform", LAW, "--mode", "nvhe", "--kernel", str(kernel)]
    assert main(words) == ExitCode.DOES_NOT_HOLD
    text = capsys.readouterr().out
    assert f"DIFFERENT  {LAW}  (M10)" in text
    assert "specification  PreFaultProgress(gpa=0x100000000, size=0x1000, errno=2)" in text
    assert "kernel         PreFaultProgress(gpa=0x100000000, size=0x1000, errno=0xe)" in text
    assert f"again: prefault conform {LAW} --mode nvhe --kernel {kernel}" in text
    assert lab.kernels == [kernel]
    assert lab.options[0].mode == "nvhe"


def test_tables_that_differ_are_shown_as_a_diff(lab: FakeLab, capsys: pytest.CaptureFixture[str]) -> None:
    def bug(line: Line) -> None:
        observations: Any = line["observations"]
        tables = [value for what, value in observations if what == "leaves"]
        tables[0][0]["writable"] = True

    lab.change = bug
    assert main(["conform", "copy_on_write_is_not_broken[private-nothing]"]) == ExitCode.DOES_NOT_HOLD
    text = capsys.readouterr().out
    assert "specification  0x100000000 size 0x10000 level 3 page r-xuA" in text
    assert "kernel         0x100000000 size 0x10000 level 3 page rwxuA" in text


def test_a_kernel_without_the_capability_is_no_success(
    lab: FakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.config = dataclasses.replace(lab.config, protected=True)
    lab.facts["pre_fault_memory"] = 0
    assert main(["conform", LAW, HONEST]) == ExitCode.MISSING
    assert "does not report KVM_CAP_PRE_FAULT_MEMORY" in capsys.readouterr().err
    assert main(["conform", "--json", LAW, HONEST]) == ExitCode.MISSING
    found = reported(capsys)
    assert "KVM_CAP_PRE_FAULT_MEMORY" in found["nothing_compared"]
    assert found["counts"]["different"] == 0


def test_a_lost_kernel_names_what_it_was_at(lab: FakeLab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.fatal = {LAW}
    assert main(["conform", "--json", LAW, HONEST]) == ExitCode.DOES_NOT_HOLD
    found = reported(capsys)
    assert {one["name"]: one["verdict"] for one in found["scenarios"]} == {HONEST: "equal", LAW: "lost"}
    assert found["boots"] == 2 if list(SCENARIOS).index(LAW) < list(SCENARIOS).index(HONEST) else 1


def test_if_everything_is_skipped_nothing_was_compared(
    lab: FakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.config = dataclasses.replace(lab.config, nested=False)
    lab.facts["nested"] = False
    assert main(["conform", "nested_gpa_is_an_l1_ipa"]) == ExitCode.MISSING
    printed = capsys.readouterr()
    assert "nothing was compared" in printed.err
    assert "skipped by both sides: KVM_CAP_ARM_EL2 is 0" in printed.out


class X86Lab:
    """What makes the fake kernel one of x86: no tables, and pages that pre-faulting makes dirty."""

    def __init__(self, lab: FakeLab, text: str) -> None:
        lab.facts |= {"guests": False, "ipa_limit": 0, "nested": False, "access_flag_by_hardware": False}
        lab.change = self.change
        self._text = text

    def change(self, line: Line) -> None:
        observations: Any = line["observations"]
        line["observations"] = [one for one in observations if one[0] != "leaves"]
        if str(line["name"]).startswith("prefaulting_makes_nothing_dirty"):
            line |= {"outcome": "failed", "text": self._text}


def test_of_a_peer_what_is_known_is_told_and_no_failure(
    lab: FakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    X86Lab(lab, "pre-faulting made pages dirty")
    names = ["prefaulting_makes_nothing_dirty[private]", LAW]
    assert main(["conform", "--arch", "x86_64", *names]) == ExitCode.DONE
    text = capsys.readouterr().out
    assert "1 of 2 scenarios equal, 1 different as known, 0 not" in text
    assert "on x86_64, with dirty logging on, every page that is pre-faulted becomes dirty" in text
    assert lab.options[0].arch.name == "x86_64"
    assert main(["conform", "--arch", "x86_64", "--json", *names]) == ExitCode.DONE
    found = reported(capsys)
    assert found["counts"]["known"] == 1
    assert "M7" in next(one for one in found["scenarios"] if one["verdict"] == "known")["reason"]


def test_of_a_peer_any_other_difference_is_a_failure(
    lab: FakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    X86Lab(lab, "the guest's writes are not in the log")
    name = "prefaulting_makes_nothing_dirty[private]"
    assert main(["conform", "--arch", "x86_64", name]) == ExitCode.DOES_NOT_HOLD
    assert f"again: prefault conform '{name}' --arch x86_64" in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--random", "3"], ["--variant", "16k"], ["--mode", "nvhe"], ["--lpa2"]])
def test_what_a_peer_does_not_have_is_a_usage_error(lab: FakeLab, option: list[str]) -> None:
    assert main(["conform", "--arch", "x86_64", *option]) == ExitCode.USAGE
    assert lab.jobs == []


def test_the_machine_has_the_cpu_that_was_asked_for(lab: FakeLab) -> None:
    assert main(["conform", "--cpu", "cortex-a76", LAW]) == ExitCode.DONE
    assert lab.options[0].cpu == "cortex-a76"


def test_without_a_lab_the_status_is_77(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ToolMissing("the lab has no kernel yet: run `prefault lab build`")

    monkeypatch.setattr(in_lab, "run_job", missing)
    assert main(["conform", "--json", LAW]) == ExitCode.MISSING
    assert reported(capsys)["error"]["type"] == "ToolMissing"


def test_the_list_needs_no_lab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(in_lab, "run_job", None)
    assert main(["conform", "--list", "--json", "--requirement", "M8"]) == ExitCode.DONE
    listed = reported(capsys)["scenarios"]
    assert listed
    assert all("M8" in one["requirements"] for one in listed)


@pytest.mark.parametrize(
    "words",
    [
        ["no_such_law"],
        ["--requirement", "M99"],
        ["--random", "1", LAW],
        ["--random", "-1"],
        ["--kernel", __file__],
        ["--mode", "vhe"],
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(lab: FakeLab, words: list[str]) -> None:
    assert main(["conform", *words]) == ExitCode.USAGE
    assert not lab.jobs


def test_a_file_that_is_no_program_is_refused(lab: FakeLab, tmp_path: Path) -> None:
    for text in (
        "{",
        "[]",
        '{"version": 1, "actions": [{"do": "Nothing"}]}',
        '{"version": 9, "actions": []}',
    ):
        file = tmp_path / "program.json"
        file.write_text(text)
        assert main(["conform", "--program", str(file)]) == ExitCode.USAGE
    assert not lab.jobs


def test_random_programs_are_equal_on_equal_machines(
    lab: FakeLab, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["conform", "--random", "3", "--seed", "5", "--steps", "6", "--output", str(tmp_path / "out")]
    assert main(words) == ExitCode.DONE
    assert "3 of 3 programs equal" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_random_program_that_differs_is_kept_small_and_can_be_played_again(
    lab: FakeLab, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lab.change = wrong_leaves
    words = ["conform", "--random", "8", "--seed", "2", "--steps", "25", "--output", str(tmp_path)]
    assert main(words) == ExitCode.DOES_NOT_HOLD
    text = capsys.readouterr().out
    file = next(iter(tmp_path.glob("program-2-*.json")))
    assert len(json.loads(file.read_text())["actions"]) <= 3
    assert f"again: prefault conform --program {file}" in text
    assert "protects" in text
    assert main(["conform", "--program", str(file)]) == ExitCode.DOES_NOT_HOLD
    assert "nothing of the kind" in capsys.readouterr().out


def test_cases_that_end_alike_are_told_once(lab: FakeLab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.faults = Faults(readonly_ignored=True)
    assert main(["conform", "read_only_slots_are_mapped_read_only"]) == ExitCode.DOES_NOT_HOLD
    text = capsys.readouterr().out
    assert text.count("DIFFERENT  read_only_slots_are_mapped_read_only") == 1
    assert "the same: read_only_slots_are_mapped_read_only[shared]" in text


def test_programs_that_differ_are_kept_when_the_search_is_interrupted(
    lab: FakeLab, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    lab.change = wrong_leaves
    monkeypatch.setattr(Session, "minimal", interrupted)
    words = ["conform", "--random", "8", "--seed", "2", "--output", str(tmp_path)]
    assert main(words) == INTERRUPTED
    text = capsys.readouterr().out
    assert "DIFFERENT" in text
    kept = list(tmp_path.glob("program-2-*.json"))
    assert kept
    assert str(kept[0]) in text
