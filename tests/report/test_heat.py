# SPDX-License-Identifier: Apache-2.0
"""The bins of a recording: no fault is lost in them, and there are never too many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.faults.planning import Made, PlanConfig, make_plan
from prefault.faults.recording import Recording
from prefault.faults.syndrome import Kind
from prefault.faults.working_set import DEVICE_FAULTS, WorkingSet
from prefault.report import heat as module
from prefault.report.heat import KIND_GROUPS, LEAST_NS, MOST_VCPUS, ROWS, Grid, Heat, groups, heat, regions
from tests.faults.recordings import PAGE, RECORDINGS, Fault, recording_of


def heat_of(recording: Recording, **config: object) -> tuple[Heat | None, Made]:
    made = make_plan([recording], PlanConfig(**config))  # type: ignore[arg-type]
    return heat(recording, made.sets[0], made.plan, "x"), made


def check(grid: Grid, recording: Recording, vcpus: int, needed: WorkingSet) -> None:
    column, row, vcpu, group, count, _ = grid.cells
    assert sum(count) == len(recording)
    assert all(count)
    assert all(0 <= one < grid.columns for one in column)
    assert all(0 <= one < vcpus for one in vcpu)
    assert all(0 <= one < len(KIND_GROUPS) for one in group)
    assert len(grid.rows) <= ROWS
    assert grid.rows == sorted(grid.rows)
    found = {(grid.rows[one], kind) for one, kind in zip(row, group, strict=True)}
    rows = [int(ipa) // grid.row_bytes * grid.row_bytes for ipa in recording.faults.ipa]
    assert found == set(zip(rows, groups(recording, needed).tolist(), strict=True))


@given(RECORDINGS, st.sampled_from([4, 30, 10**6]))
def test_every_fault_is_in_one_cell_of_each_grid_however_coarse(recording: Recording, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_CELLS", most)
        found, made = heat_of(recording)
    if found is None:
        assert not len(recording)
        return
    check(found.all, recording, 1, made.sets[0])
    check(found.by_vcpu, recording, len(found.vcpus), made.sets[0])
    assert len(found.all.cells[0]) <= max(most, len(KIND_GROUPS))
    assert found.working_set[-1] == len(made.sets[0].page)
    assert found.planned == found.working_set  # a plan without a cap covers all of it


@given(RECORDINGS)
def test_the_shares_of_the_plan_add_up_to_it(recording: Recording) -> None:
    found, made = heat_of(recording, granule=PAGE)
    if found is not None:
        bytes_ = sum(share * found.all.row_bytes for share in found.all.in_plan)
        assert bytes_ == pytest.approx(made.plan.size, rel=0.01, abs=0.001 * ROWS * found.all.row_bytes)


def test_more_vcpus_than_fit_are_put_together() -> None:
    faults = [Fault(page, page, tid=page % 40 + 1) for page in range(400)]
    recording = recording_of(faults)
    recording.faults.vcpu[:] = -1
    found, _ = heat_of(recording)
    assert found is not None
    assert len(found.vcpus) == MOST_VCPUS
    assert found.vcpus[-1] == "25 others"
    assert sum(found.by_vcpu.cells[4]) == 400


def test_a_few_late_faults_do_not_squeeze_the_rest() -> None:
    faults = [Fault(page, page * 1000) for page in range(1000)]
    found, _ = heat_of(recording_of([*faults, Fault(2000, 10**9)]))
    assert found is not None
    assert found.end_ns < 2_000_000
    assert found.last_ns == 10**9
    assert max(found.all.cells[0]) == found.all.columns - 1


def test_the_costliest_parts_come_first() -> None:
    faults = [Fault(512 + page, page, 100) for page in range(10)] + [Fault(5000, 99, 7)]
    recording = recording_of(faults)
    made = make_plan([recording], PlanConfig(PAGE))
    one, other = regions(recording, made.sets[0], made.plan)
    assert (one.ipa, one.faults, one.wait_ns, one.pages, one.planned) == (512 * PAGE, 10, 1000, 10, 10)
    assert (other.faults, other.pages) == (1, 1)


@given(RECORDINGS)
def test_what_is_shown_as_not_mapped_is_what_the_plan_counts(recording: Recording) -> None:
    found, made = heat_of(recording)
    if found is not None:
        _, _, _, group, count, _ = found.all.cells
        shown = sum(number for number, kind in zip(count, group, strict=True) if not kind)
        assert shown == made.plan.prediction.faults


def test_what_is_taken_for_a_device_is_shown_as_one_and_is_no_part_of_memory() -> None:
    device = [Fault(3, time) for time in range(DEVICE_FAULTS)]
    others = [Fault(512, 99), Fault(512, 100, kind=Kind.PERMISSION), Fault(7, 101, nested=1)]
    recording = recording_of([*device, *others])
    _, made = heat_of(recording)
    names = [KIND_GROUPS[one] for one in groups(recording, made.sets[0])]
    assert names == ["device"] * DEVICE_FAULTS + ["not mapped", "write to read-only", "other"]
    assert [one.ipa for one in regions(recording, made.sets[0], made.plan)] == [512 * PAGE]


def test_a_single_fault_has_a_time_axis_that_can_be_read() -> None:
    found, _ = heat_of(recording_of([Fault(1)]))
    assert found is not None
    assert found.end_ns == LEAST_NS


def test_the_same_vcpu_number_of_several_vms_is_named_so() -> None:
    recording = recording_of([Fault(1, 0, tid=1), Fault(1, 1, tid=1)])
    recording.faults.pid[:] = [10, 11]
    assert module.names_of(np.array([1]), recording) == ["vCPU 1, all VMs"]


def test_faults_all_over_are_a_small_grid_all_the_same() -> None:
    count = 200_000
    recording = recording_of([Fault(0)])
    chance = np.random.default_rng(1)
    faults = recording.faults.take(np.zeros(count, np.int64))
    faults.time_ns = np.sort(chance.integers(0, 10**9, count))
    faults.ipa = chance.integers(0, 1 << 20, count).astype(np.uint64) * np.uint64(PAGE)
    faults.kind = chance.integers(0, 5, count).astype(np.int8)
    faults.vcpu = chance.integers(0, 64, count).astype(np.int16)
    found, _ = heat_of(Recording(recording.metadata, faults))
    assert found is not None
    assert max(len(found.all.cells[0]), len(found.by_vcpu.cells[0])) <= module.MOST_CELLS
