# SPDX-License-Identifier: Apache-2.0
"""A walk's values: JSON there and back, and what is refused before anything runs."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import ExitCode, UsageError
from prefault.machine import Backing, FaultCounts, Resident
from prefault.scenarios.walk import Phase, WalkConfig, WalkResult, WalkRun, When, main

counts = st.builds(
    FaultCounts, read=st.integers(0), write=st.integers(0), permission=st.integers(0), mmio=st.integers(0)
)
configs = st.builds(
    WalkConfig,
    size=st.integers(1, 1 << 40),
    backing=st.sampled_from(Backing),
    resident=st.sampled_from(Resident),
    vcpus=st.integers(1, 8),
    nested=st.booleans(),
    when=st.sampled_from(When),
)
phases = st.builds(Phase, name=st.text(), ns=st.integers(0), exits=st.integers(0), faults=counts)
runs = st.builds(
    WalkRun,
    phases=st.lists(phases, max_size=3).map(tuple),
    prefault_ns=st.integers(0),
    prefaulted_bytes=st.integers(0),
    leaves=st.dictionaries(st.sampled_from(["1", "2", "3"]), st.integers(1)),
    shadow_leaves=st.just({}),
    bytes_checked=st.integers(0),
)


@given(
    result=st.builds(WalkResult, config=configs, page_size=st.just(4096), without=runs, with_prefault=runs)
)
def test_a_result_survives_json(result: WalkResult) -> None:
    assert WalkResult.from_json(json.loads(json.dumps(result.to_json()))) == result


@given(run=runs)
def test_totals_are_the_sums_of_the_phases(run: WalkRun) -> None:
    assert run.exits == sum(phase.exits for phase in run.phases)
    assert run.faults.total == sum(phase.faults.total for phase in run.phases)
    assert run.faults.permission == sum(phase.faults.permission for phase in run.phases)


def test_what_is_not_said_has_its_default() -> None:
    assert WalkConfig.from_json({}) == WalkConfig()


@pytest.mark.parametrize("values", [{"backing": "paper"}, {"sizes": 1}, {"when": 3}])
def test_what_is_no_walk_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="not a walk"):
        WalkConfig.from_json(values)


@pytest.mark.parametrize(
    "argv",
    [[], ["--json"], ["--text", "{}"], ["--json", '{"backing": "paper"}'], ["--json", "{"], ["--json", "[]"]],
)
def test_the_module_says_its_errors_as_json(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == ExitCode.USAGE
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["exit_code"] == ExitCode.USAGE and error["message"]
