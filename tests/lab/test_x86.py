# SPDX-License-Identifier: Apache-2.0
"""The lab with Debian's own x86 kernel: a boot each for what its KVM answers, shows, and costs.

On a new machine all of this takes a minute and a half, fetching included.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prefault.bench.cases import MIB, choose
from prefault.bench.measure import Measured
from prefault.cli.main import main
from prefault.conform import peers
from prefault.errors import ExitCode
from prefault.faults.convert import Converted, convert
from prefault.faults.syndrome import Access, Kind
from prefault.lab import bench
from prefault.lab.arch import X86_64
from prefault.lab.bench import Boot, Settings
from prefault.lab.job import Job, run_job
from prefault.lab.machine import MachineOptions
from prefault.report.bench import per_leaf

pytestmark = [pytest.mark.lab, pytest.mark.lab_x86, pytest.mark.timeout(300)]

ABI = (
    "bad_ranges_are_einval",
    "no_memslot_is_enoent_at_any_ipa",
    "deleted_slot_is_enoent",
    "memory_*_efault",
    "range_*",
    "capability_is_reported_where_it_works",
    "vcpu_that_never_ran_can_prefault",
    "pending_device_read_survives[2-True-64]",
    "registers_do_not_change",
    "read_only_slots_are_mapped_read_only[private]",
    "a_signal_ends_the_wait_with_progress_or_eintr",
    "a_slot_that_is_going_away_is_eagain",
    "prefaulted_memory_costs_the_guest_no_fault",
    "vcpu_that_never_ran_can_prefault_beside_one_that_did",
)
"""Scenarios about the ABI; the last has a case for arm64 alone."""


def test_the_abi_is_ours_but_for_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    differing = [name for entry in peers.X86_64 if not entry.hangs for name in entry.scenarios]
    assert main(["conform", "--arch", "x86_64", "--json", *ABI, *differing]) == ExitCode.DONE
    found = json.loads(capsys.readouterr().out)
    verdicts = {one["name"]: one["verdict"] for one in found["scenarios"]}
    known = {name for name, verdict in verdicts.items() if verdict == "known"}
    assert {name.partition("[")[0] for name in known} == set(differing)
    assert [name for name, verdict in verdicts.items() if verdict == "skipped"] == [
        "vcpu_that_never_ran_can_prefault_beside_one_that_did[True]"
    ]
    assert found["counts"]["equal"] >= 30


INSIDE = Path(__file__).parent / "inside"
DATA, PAGE, PAGES, VCPUS = 1 << 32, 4096, 60, 2


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a capture of a VMM's guests, and what another trace instance saw of them as text."""
    files = {f"/{name}": (INSIDE / name).read_bytes() for name in ("record.py", "traced_vmm.py")}
    job = Job(("python3", "/record.py", "--usual"), files, collect=("/tmp/out",), timeout=150)
    result = run_job(job, MachineOptions(arch=X86_64))
    assert result.status == 0, result.stderr.decode()
    folder = tmp_path_factory.mktemp("recorded")
    for name, data in result.files.items():
        (folder / Path(name).name).write_bytes(data)
    return folder


def read(folder: Path, name: str = "pid") -> Converted:
    return convert(folder / name)


def test_a_live_recording_has_exactly_the_faults_that_another_instance_saw(recorded: Path) -> None:
    found, expected = read(recorded).recording, read(recorded, "pid.trace").recording
    assert len(found) == len(expected) > VCPUS * PAGES
    for tid in np.unique(expected.faults.tid):
        mine, theirs = (one.faults.take(one.faults.tid == tid) for one in (found, expected))
        for column in ("pid", "vcpu", "ipa", "kind", "access", "syndrome"):
            assert getattr(mine, column).tolist() == getattr(theirs, column).tolist(), column
    assert (found.metadata.architecture, found.metadata.lost_events) == ("x86_64", 0)


def test_the_faults_are_those_that_the_guest_must_take(recorded: Path) -> None:
    faults = read(recorded).recording.faults
    data = faults.take((faults.ipa >= DATA) & (faults.kind != Kind.MMIO))
    first = np.unique(data.ipa // PAGE, return_index=True)[1]
    assert sorted(set((data.ipa // PAGE * PAGE).tolist())) == list(
        range(DATA, DATA + VCPUS * PAGES * PAGE, PAGE)
    )
    assert set(data.kind[first].tolist()) == {Kind.TRANSLATION}
    assert set(data.access[first].tolist()) == {Access.READ}
    # Every other page is written: that breaks copy-on-write. A fault that lost against an invalidation is
    # taken again, so there may be more of them than pages.
    written = set((data.ipa[data.kind == Kind.PERMISSION] // PAGE * PAGE).tolist())
    assert written == set(range(DATA + PAGE, DATA + VCPUS * PAGES * PAGE, 2 * PAGE))
    devices = faults.take(faults.kind == Kind.MMIO)
    assert {ipa // PAGE * PAGE for ipa in devices.ipa.tolist()} == {0x900_0000}
    assert np.count_nonzero(faults.duration_ns < 0) == VCPUS  # the last of each


def test_a_recording_becomes_a_plan(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "x.parquet"
    assert main(["record", "--from", str(recorded / "pid"), "-o", str(target)]) == ExitCode.DONE
    capsys.readouterr()
    assert main(["plan", str(target), "--granule", "4K", "--json"]) == ExitCode.DONE
    plan = json.loads(capsys.readouterr().out)["plan"]
    ranges = [(one["ipa"], one["size"]) for one in plan["ranges"] if one["ipa"] >= DATA]
    assert ranges == [(DATA, VCPUS * PAGES * PAGE)]
    assert plan["pays"]


def test_its_ioctl_costs_most_of_a_demand_fault_and_spares_the_guest_all_of_it() -> None:
    found: list[Measured] = []
    # An interrupt costs as much as two blocks: many of them, and the median of several figures.
    cases = choose(["private/resident", "thp/resident"], sizes=(16 * MIB,))
    bench.measure(Boot("nested", cases, arch=X86_64), Settings(), found.append)
    for one in found:
        demand, cost, touch = (per_leaf(one, name) for name in ("demand", "prefault", "touch"))
        assert demand and cost and touch is not None
        assert 0.5 < cost / demand < 1
        assert touch < 20
    assert [one.unit for one in found] == [PAGE, 2 * MIB]
