# SPDX-License-Identifier: Apache-2.0
"""Live recording on the real kernel: a guest takes faults, and the recording has exactly these."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefault.faults.convert import Converted, convert
from prefault.faults.syndrome import Access, Kind
from prefault.lab.job import Job, run_job

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

INSIDE = Path(__file__).parent / "inside"
DATA, PAGE, PAGES, VCPUS = 1 << 32, 4096, 60, 2


@dataclass(frozen=True)
class Recorded:
    """What came out of the lab."""

    ways: Mapping[str, Any]
    folder: Path

    def read(self, name: str) -> Converted:
        """A capture or a trace as a recording."""
        return convert(self.folder / name)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    names = ("record.py", "traced_vmm.py")
    files = {f"/{name}": (INSIDE / name).read_bytes() for name in names}
    result = run_job(Job(("python3", "/record.py"), files, collect=("/tmp/out",), timeout=150))
    assert result.status == 0, result.stderr.decode()
    folder = tmp_path_factory.mktemp("recorded")
    for name, data in result.files.items():
        (folder / Path(name).name).write_bytes(data)
    ways = [json.loads(line) for line in result.stdout.splitlines()]
    return Recorded({way["name"]: way for way in ways}, folder)


def test_a_recording_has_exactly_the_faults_that_another_instance_saw(recorded: Recorded) -> None:
    found, expected = recorded.read("pid").recording, recorded.read("pid.trace").recording
    assert len(found) == len(expected) > VCPUS * PAGES
    for tid in np.unique(expected.faults.tid):
        mine, theirs = (one.faults.take(one.faults.tid == tid) for one in (found, expected))
        for column in ("pid", "vcpu", "ipa", "kind", "access", "level", "syndrome"):
            assert getattr(mine, column).tolist() == getattr(theirs, column).tolist(), column
        assert np.abs(mine.time_ns - theirs.time_ns).max() < 50_000_000


def test_the_faults_are_those_that_the_guest_must_take(recorded: Recorded) -> None:
    faults = recorded.read("pid").recording.faults
    data = faults.take((faults.ipa >= DATA) & (faults.kind != Kind.MMIO))
    first = np.unique(data.ipa, return_index=True)[1]
    assert data.ipa[np.sort(first)].size == VCPUS * PAGES
    assert set(data.ipa.tolist()) == set(range(DATA, DATA + VCPUS * PAGES * PAGE, PAGE))
    assert set(data.kind[first].tolist()) == {Kind.TRANSLATION}
    assert set(data.access[first].tolist()) == {Access.READ}
    # Every other page is written: that breaks copy-on-write. A fault that lost against an invalidation is
    # taken again, so there may be more of them than pages.
    written = set((data.ipa[data.kind == Kind.PERMISSION] // PAGE * PAGE).tolist())
    assert written == set(range(DATA + PAGE, DATA + VCPUS * PAGES * PAGE, 2 * PAGE))
    devices = faults.take(faults.kind == Kind.MMIO)
    assert set(devices.ipa.tolist()) == {0x900_0000}
    assert len(devices) == VCPUS * 3  # two reports and the end


def test_every_fault_but_the_guests_last_has_a_duration(recorded: Recorded) -> None:
    found = recorded.read("pid").recording
    assert np.count_nonzero(found.faults.duration_ns < 0) == VCPUS
    assert np.median(found.faults.duration_ns) > 1000
    assert set(found.faults.vcpu.tolist()) == {0, 1}
    about = found.metadata
    assert (about.architecture, about.page_size, about.clock, about.lost_events) == (
        "aarch64",
        PAGE,
        "mono",
        0,
    )
    assert about.source == f"live, process {recorded.ways['pid']['pid']}"


def test_all_vms_of_the_host_are_recorded_if_none_is_named(recorded: Recorded) -> None:
    found = recorded.read("all").recording
    assert set(found.faults.pid.tolist()) == set(recorded.ways["all"]["pids"])
    assert set(found.faults.duration_ns.tolist()) == {-1}  # --no-durations
    for pid in recorded.ways["all"]["pids"]:
        of_one = found.faults.take(found.faults.pid == pid)
        pages = np.unique(of_one.ipa[of_one.ipa >= DATA])
        assert len(pages) == VCPUS * PAGES


def test_a_vm_at_rest_has_no_faults(recorded: Recorded) -> None:
    assert len(recorded.read("other").recording) == 0


def test_a_vmm_that_dies_ends_the_recording(recorded: Recorded) -> None:
    assert "(process)" in recorded.ways["killed"]["said"]
    assert not recorded.read("killed").cut_off


def test_lost_events_are_counted_and_sigterm_keeps_the_rest(recorded: Recorded) -> None:
    assert recorded.ways["small"]["status"] == 128 + 15
    found = recorded.read("small")
    assert not found.cut_off
    assert len(found.recording) > 0
    assert found.recording.metadata.lost_events > 0


def test_no_trace_instance_is_left_also_not_of_one_that_was_killed(recorded: Recorded) -> None:
    left = {name: way["left"] for name, way in recorded.ways.items() if "left" in way}
    (orphan,) = left.pop("orphan")
    assert orphan.startswith("prefault-")
    assert set(map(tuple, left.values())) == {()}
    assert recorded.read("orphan").cut_off


def test_a_process_without_a_vm_is_refused_and_those_with_one_are_named(recorded: Recorded) -> None:
    refused = recorded.ways["refused"]
    assert f"these have: {refused['pid']}" in refused["said"]


def test_a_capture_becomes_a_plan(recorded: Recorded, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "prefault"]
    target = tmp_path / "x.parquet"
    subprocess.run([*words, "record", "--from", str(recorded.folder / "pid"), "-o", str(target)], check=True)
    ended = subprocess.run(
        [*words, "plan", str(target), "--granule", "4K", "--json"], check=True, capture_output=True
    )
    plan = json.loads(ended.stdout)["plan"]
    ranges = [one for one in plan["ranges"] if one["ipa"] >= DATA]
    assert [(one["ipa"], one["size"]) for one in ranges] == [(DATA, VCPUS * PAGES * PAGE)]
    assert plan["pays"]
