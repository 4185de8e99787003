# SPDX-License-Identifier: Apache-2.0
"""A plan applied to a VMM that runs and knows nothing of it, on the real kernel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from prefault.lab.arch import ARM64, X86_64
from prefault.lab.job import Job, run_job
from prefault.lab.machine import MachineOptions

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]

INSIDE = Path(__file__).parent / "inside"
DATA, MIB, PAGE, ROUNDS = 1 << 32, 1 << 20, 4096, 100
SIZE = 16 * MIB
SUMS = [[sum(range(start, start + SIZE, PAGE))] for start in (DATA, DATA + SIZE)]
"""What the guests must have read: each page begins with its address."""


@pytest.fixture(
    scope="module", params=[ARM64, pytest.param(X86_64, marks=pytest.mark.lab_x86)], ids=lambda one: one.name
)
def ways(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    names = ("apply.py", "busy_vmm.py")
    files = {f"/{name}": (INSIDE / name).read_bytes() for name in names}
    result = run_job(Job(("python3", "/apply.py"), files, timeout=300), MachineOptions(arch=request.param))
    assert result.status == 0, result.stderr.decode()
    return {one["name"]: one for one in map(json.loads, result.stdout.splitlines())}


def assert_guests_are_well(vmm: Mapping[str, Any]) -> None:
    """All answers of the device came right (a guest that gets another stops), and all that was read."""
    assert vmm["ended"] == ["Done()", "Done()"]
    assert all(rounds and rounds % ROUNDS == 0 for rounds in vmm["rounds"])


def test_guests_take_no_fault_on_what_the_plan_has(ways: Mapping[str, Any]) -> None:
    assert ways["nothing"]["vmm"]["faults"] >= 2 * SIZE // PAGE
    assert ways["whole"]["vmm"]["faults"] == 0


@pytest.mark.parametrize("name", ["whole", "nothing", "kicked", "interrupted", "killers"])
def test_guests_compute_what_they_must(ways: Mapping[str, Any], name: str) -> None:
    assert_guests_are_well(ways[name]["vmm"])
    assert ways[name]["vmm"]["values"] == SUMS


def test_the_plan_was_applied_while_guests_ran(ways: Mapping[str, Any]) -> None:
    assert min(ways["whole"]["during"]) > 30


def test_both_vcpus_were_found_and_have_worked(ways: Mapping[str, Any]) -> None:
    assert [(index, certain) for index, _, certain in ways["whole"]["threads"]] == [(0, True), (1, True)]
    assert [one["index"] for one in ways["whole"]["applied"]["vcpus"]] == [0, 1]
    assert all(one["bytes"] > 0 for one in ways["whole"]["applied"]["vcpus"])


def test_all_bytes_are_accounted_for_and_the_hole_is_told(ways: Mapping[str, Any]) -> None:
    applied = ways["whole"]["applied"]
    assert applied["bytes"] == 2 * SIZE
    assert [(one["ipa"], one["size"], one["error"]) for one in applied["failed"]] == [
        (DATA + 64 * MIB, 4 * MIB, "ENOENT")
    ]


def test_the_vmm_sees_no_eintr_but_for_the_one_that_tells_which_vcpu_a_thread_runs(
    ways: Mapping[str, Any],
) -> None:
    """Each vCPU was stopped many times; a thread that never rests in the kernel is asked once or twice."""
    stops = [one["calls"] for one in ways["whole"]["applied"]["vcpus"]]
    assert min(stops) > 30
    assert sum(ways["whole"]["vmm"]["interrupted"]) <= 2 + 2


def test_a_signal_of_the_vmms_own_arrives_every_time(ways: Mapping[str, Any]) -> None:
    vmm = ways["kicked"]["vmm"]
    assert sum(vmm["signals"]) > 20
    assert sum(vmm["interrupted"]) > 0


def test_nobody_traces_the_vmm_afterwards(ways: Mapping[str, Any]) -> None:
    assert [ways[name]["traced"] for name in ("whole", "kicked", "interrupted")] == [[], [], []]


def test_a_vmm_that_dies_is_told_with_what_was_done(ways: Mapping[str, Any]) -> None:
    assert "ended after" in ways["killed"]["said"]


def test_an_interrupted_run_lets_go_at_once_and_has_its_result(ways: Mapping[str, Any]) -> None:
    one = ways["interrupted"]
    assert one["applied"]["ended"] == "interrupted"
    assert 0 < one["applied"]["bytes"] < one["applied"]["size"]
    assert one["seconds"] < 5


def test_guests_do_not_notice_that_who_applied_was_killed(ways: Mapping[str, Any]) -> None:
    one = ways["killers"]
    assert one["traced"] == []
    assert one["applied"]["bytes"] == 2 * SIZE
    assert one["vmm"]["faults"] == 0


def test_a_kernel_that_cannot_is_told_before_anything_is_done(ways: Mapping[str, Any]) -> None:
    assert "KVM_CAP_PRE_FAULT_MEMORY" in ways["unsupported"]["said"]
    assert_guests_are_well(ways["unsupported"]["vmm"])
