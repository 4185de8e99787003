# SPDX-License-Identifier: Apache-2.0
"""The trace for Perfetto: valid JSON events, one for each fault, none overlapping another of its vCPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import given

from prefault.faults.planning import PlanConfig, make_plan
from prefault.faults.recording import Recording
from prefault.report.perfetto import trace
from tests.faults.recordings import RECORDINGS, Fault, recording_of


def events_of(*recordings: Recording, **config: object) -> Sequence[dict[str, Any]]:
    made = make_plan(recordings, PlanConfig(4096, **config))  # type: ignore[arg-type]
    return list(json.loads("".join(trace(made, recordings)))["traceEvents"])


@given(RECORDINGS)
def test_each_fault_is_an_event_with_its_time_and_place(recording: Recording) -> None:
    found = [one for one in events_of(recording) if one["ph"] in "Xi"]
    faults = recording.faults
    assert [int(one["args"]["ipa"], 16) for one in found] == faults.ipa.tolist()
    start = int(faults.time_ns[0]) if len(faults) else 0
    assert [round(one["ts"] * 1000) for one in found] == [time - start for time in faults.time_ns.tolist()]
    assert [one["ph"] == "X" for one in found] == [one >= 0 for one in faults.duration_ns.tolist()]


@given(RECORDINGS)
def test_slices_of_a_track_do_not_overlap_and_every_track_has_a_name(recording: Recording) -> None:
    events = events_of(recording)
    ends: dict[int, int] = {}
    for one in events:
        if one["ph"] == "X":
            assert round(one["ts"] * 1000) >= ends.get(one["tid"], 0)
            ends[one["tid"]] = round((one["ts"] + one["dur"]) * 1000)
    named = {one["tid"] for one in events if one["name"] == "thread_name"}
    assert {one["tid"] for one in events if one["ph"] in "Xi"} == named


def test_the_working_set_is_a_counter_that_ends_at_all_of_it() -> None:
    faults = [Fault(2 * page, page * 1000) for page in range(5000)]
    counters = [one for one in events_of(recording_of(faults), cap=4096 * 100) if one["ph"] == "C"]
    assert len(counters) <= 2000
    assert counters[-1]["args"] == {"needed": 5000 * 4096 / 2**20, "of that in the plan": 100 * 4096 / 2**20}
    values = [one["args"]["needed"] for one in counters]
    assert values == sorted(values)


def test_vcpus_of_two_vms_are_two_tracks_though_their_numbers_are_one() -> None:
    recording = recording_of([Fault(1, 0, 5000, tid=4), Fault(1, 1000, 5000, tid=8)])
    recording.faults.pid[:] = [10, 11]
    events = events_of(recording)
    names = [one["args"]["name"] for one in events if one["name"] == "thread_name"]
    assert names == ["vCPU 0 of process 10", "vCPU 0 of process 11"]
    assert [one["dur"] for one in events if one["ph"] == "X"] == [5, 5]


def test_runs_are_processes() -> None:
    events = events_of(recording_of([Fault(1)], source="a"), recording_of([Fault(2)], source="b"))
    names = [one["args"]["name"] for one in events if one["name"] == "process_name"]
    assert names == ["run 1: a", "run 2: b"]
    assert {one["pid"] for one in events if one["ph"] == "i"} == {1, 2}
