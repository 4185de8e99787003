# SPDX-License-Identifier: Apache-2.0
"""What to do with a plan: the steps fit what the plan says, and each command is one that prefault takes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.cli.main import root
from prefault.faults.costs import Given
from prefault.faults.planning import PlanConfig, make_plan
from prefault.faults.recording import Recording
from prefault.faults.syndrome import Access, Kind
from prefault.report.next_steps import Files, Step, next_steps
from tests.faults.recordings import RECORDINGS, Fault, recording_of

DENSE = [Fault(page, 9000 * page, 5000, access=Access.WRITE) for page in range(2000)]
UNKNOWN, DEFAULT = Files(), PlanConfig()
NOTHING = PlanConfig(given=Given("private/nothing"))


def steps_of(*recordings: Recording, files: Files = UNKNOWN, config: PlanConfig = DEFAULT) -> list[Step]:
    return list(next_steps(make_plan(recordings, config).plan, recordings, files))


def commands_of(steps: Sequence[Step]) -> list[str]:
    return [one.command for one in steps if one.command]


def check(command: str) -> None:
    """Parse it as the shell and prefault would."""
    for part in command.split(" && "):
        name, *arguments = shlex.split(part.replace("PID", "4711"))
        assert name == "prefault"
        _, found, rest = root.resolve_command(click.Context(root), arguments)
        assert found is not None
        found.make_context(found.name, rest)


@given(RECORDINGS, st.sampled_from([None, 4096 * 100]), st.sampled_from([4096, 65536]))
def test_there_is_something_to_do_and_prefault_takes_the_commands(
    recording: Recording, cap: int | None, granule: int
) -> None:
    steps = steps_of(recording, config=PlanConfig(granule, cap=cap and max(cap, granule)))
    assert steps
    for one in commands_of(steps):
        check(one)


def test_a_plan_that_pays_is_written_tried_applied_and_compared() -> None:
    commands = commands_of(steps_of(recording_of(DENSE)))
    assert commands[0] == "prefault plan RECORDING -o plan.json"
    assert commands[2:4] == [
        "prefault apply plan.json --pid PID --dry-run",
        "prefault apply plan.json --pid PID",
    ]
    for one in commands:
        check(one)


def test_a_plan_that_is_written_is_called_by_its_name() -> None:
    commands = commands_of(steps_of(recording_of(DENSE), files=Files(("a.parquet",), "my plan.json")))
    assert "prefault apply 'my plan.json' --pid PID" in commands
    assert not [one for one in commands if "-o plan.json" in one]


def test_the_command_has_the_options_that_the_plan_was_made_with() -> None:
    one = recording_of(DENSE)
    config = PlanConfig(8192, "2-of-2", 1 << 22, given=Given("shared/write"))
    command = commands_of(steps_of(one, one, config=config))[0]
    assert command == (
        "prefault plan RECORDING1 RECORDING2 --granule 8192 --cap 4194304 --over 2-of-2 "
        "--memory shared/write -o plan.json"
    )
    check(command)


def test_names_of_files_are_quoted() -> None:
    command = commands_of(steps_of(recording_of(DENSE), files=Files(("a b; rm -r .parquet",))))[0]
    assert shlex.split(command)[2] == "a b; rm -r .parquet"


def test_if_writes_fault_again_memory_is_populated_first() -> None:
    steps = steps_of(recording_of(DENSE), config=NOTHING)
    assert "MADV_POPULATE_WRITE" in steps[0].text
    assert commands_of(steps) == ["prefault plan RECORDING"]  # private/write is what it takes if not told


def test_a_guest_with_nested_guests_is_populated_for_writing_before_the_plan_is_applied() -> None:
    steps = steps_of(recording_of([*DENSE, Fault(1, nested=1)]))
    assert "populate" in steps[0].text
    assert commands_of(steps) == commands_of(steps_of(recording_of(DENSE)))


@pytest.mark.parametrize(
    "faults", [[], [Fault(1, 0, 900)], [Fault(page, page, 900, kind=Kind.PERMISSION) for page in range(99)]]
)
def test_where_nothing_is_gained_nothing_is_applied(faults: list[Fault]) -> None:
    commands = commands_of(steps_of(recording_of(faults)))
    assert len(commands) == 1
    assert commands[0].startswith("prefault record")


def test_of_several_vms_one_is_planned_for_and_nothing_applied_before() -> None:
    recording = recording_of(DENSE)
    recording.faults.pid[:] = [10] * 500 + [11] * 1500
    assert commands_of(steps_of(recording)) == ["prefault plan RECORDING --pid 11 -o plan.json"]


def test_several_vms_without_process_ids_are_recorded_again() -> None:
    recording = recording_of([*DENSE, *(Fault(1, 10**8, 9, tid=one) for one in (3, 11))])
    recording.faults.pid[:] = -1
    assert commands_of(steps_of(recording)) == ["prefault record --pid PID --seconds 10 -o one.parquet"]


def test_addresses_that_no_guest_has_make_a_plan_useless() -> None:
    steps = steps_of(recording_of([*DENSE, Fault(1 << 41, 10**8, 900)]))
    assert not commands_of(steps)
    assert "nothing" in steps[0].text
