# SPDX-License-Identifier: Apache-2.0
"""``prefault explore`` on races that take no time."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefault.cli import explore as command
from prefault.cli.main import main
from prefault.errors import ExitCode
from prefault.report.explore import takes
from prefault.spec.explore import Exploration, Found
from prefault.spec.races import FAULTS, RACES

RACE = "prefault-get-log"


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    status = main(["explore", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_race_without_a_violation_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", RACE]) == ExitCode.DONE
    out = capsys.readouterr().out
    assert RACE in out
    assert "no violation." in out


def test_the_object_has_what_the_table_has(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = printed(capsys, RACE, "prefault-age")
    assert status == ExitCode.DONE
    assert [one["race"] for one in found["races"]] == [RACE, "prefault-age"]
    first = found["races"][0]
    assert first["complete"] is True
    assert first["violation"] is None
    assert 0 < first["states"] < first["steps"]


def test_a_violation_ends_with_1_and_a_trace_that_can_be_had_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["explore", "prefault-madvise", "--fault", "no_sequence_check"]) == ExitCode.DOES_NOT_HOLD
    out = capsys.readouterr().out
    assert "taken back" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["17", "mmu_lock.read_lock"] in rows
    again = out.splitlines()[-1].removeprefix("Again: prefault ").split()
    assert again == ["explore", "prefault-madvise", "--fault", "no_sequence_check"]
    status, found = printed(capsys, *again[1:])
    assert status == ExitCode.DOES_NOT_HOLD
    trace = found["races"][0]["violation"]["trace"]
    assert trace[0] == ["pre-fault", "start"]
    assert ["madvise", "mm.change"] in trace


def test_what_is_known_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", "l2-remap"]) == ExitCode.DOES_NOT_HOLD
    assert "This is known" in capsys.readouterr().out


def test_a_limit_leaves_orders_out_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", "prefault-madvise", "--limit", "50"]) == ExitCode.DONE
    assert "Not all orders of prefault-madvise were followed" in capsys.readouterr().out


def test_all_bugs_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = printed(capsys, "--all-faults")
    assert status == ExitCode.DONE
    assert [one["fault"] for one in found["faults"]] == list(FAULTS)
    assert all(one["violation"] for one in found["faults"])


def test_a_bug_that_is_not_found_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Blind:
        def __init__(self, *_: object, **__: object) -> None: ...

        def explore(self) -> Exploration:
            return Exploration(complete=True)

    monkeypatch.setattr(command, "Explorer", Blind)
    assert main(["explore", "--all-faults"]) == ExitCode.DOES_NOT_HOLD
    assert f"0 of {len(FAULTS)} bugs were found" in capsys.readouterr().out


def test_the_list_names_all_races_and_bugs(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = printed(capsys, "--list")
    assert status == ExitCode.DONE
    assert [one["race"] for one in found["races"]] == list(RACES)
    assert {one["fault"] for one in found["faults"]} == set(FAULTS)
    assert main(["explore", "--list"]) == ExitCode.DONE
    out = capsys.readouterr().out
    assert all(name in out for name in (*RACES, *FAULTS))


@pytest.mark.parametrize(
    "words", [["nothing"], ["--fault", "nothing"], ["--all-faults", RACE], ["--limit", "0"]], ids=str
)
def test_what_cannot_be_is_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, found = printed(capsys, *words)
    assert status == ExitCode.USAGE
    assert found["error"]["exit_code"] == ExitCode.USAGE


@pytest.mark.parametrize(
    ("actors", "expected"),
    [("aaa", "pre-faulting alone"), ("aabb", "one after the other"), ("aba", "a race, 2 switches")],
)
def test_a_race_is_told_from_what_shows_in_any_order(actors: str, expected: str) -> None:
    assert takes(Found("", tuple((actor, "step") for actor in actors))) == expected
