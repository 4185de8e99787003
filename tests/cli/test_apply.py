# SPDX-License-Identifier: Apache-2.0
"""``prefault apply`` as a command; what it does to a VMM is in tests/lab and tests/inject."""

from __future__ import annotations

import json
import os
import platform
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import pytest

from prefault.cli import apply as command
from prefault.cli.main import main
from prefault.errors import CapabilityMissing, PrefaultError, ProcessLost
from prefault.faults.plan import Plan, Prediction, Range, dumps
from prefault.inject.apply import Applied, FailedRange, Found, VcpuShare
from prefault.inject.vcpus import VcpuThread

MIB = 1 << 20
RANGES = (Range(1 << 32, MIB, 0, 256, 0), Range(1 << 30, MIB, 5, 256, 9))
NO_PREDICTION = Prediction(0, 0, 0, 0, 0, 0, 0, 0, "given", "private/write")
PLAN = Plan(platform.machine(), 4096, 4096, "union", 1, RANGES, NO_PREDICTION, True)


@dataclass
class Vmm:
    """A process that has its answer ready."""

    done: Applied
    error: PrefaultError | None = None
    asked: dict[str, object] = field(default_factory=dict)

    def __call__(self, pid: int, *, allow_seccomp: bool) -> Vmm:
        self.asked |= {"pid": pid, "allow_seccomp": allow_seccomp}
        return self

    def __enter__(self) -> Vmm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.asked["closed"] = True

    def find(self, *, stop: bool) -> Found:
        """Two vCPUs, and one that nobody knows."""
        self.asked["stop"] = stop
        threads = (VcpuThread(0, 6, 100, certain=True), VcpuThread(1, 7, 101, certain=False))
        return Found(4711, 5, threads, (2,))

    def apply(
        self,
        found: Found,
        ranges: Iterable[tuple[int, int]],
        *,
        slice_s: float,
        on_bytes: Callable[[int], None],
    ) -> Applied:
        """What is ready."""
        self.asked |= {"ranges": list(ranges), "slice_s": slice_s}
        if self.error is not None:
            raise self.error
        on_bytes(self.done.bytes)
        return self.done


@pytest.fixture
def plan(tmp_path: Path) -> str:
    path = tmp_path / "plan.json"
    path.write_text(dumps(PLAN))
    return str(path)


@pytest.fixture
def vmm(monkeypatch: pytest.MonkeyPatch) -> Vmm:
    share = VcpuShare(0, 3, 2 * MIB, 0.012, 0.005)
    one = Vmm(Applied(2 * MIB, 2 * MIB, 3, 0.5, vcpus=[share]))
    monkeypatch.setattr(command, "Process", one)
    return one


def test_what_was_done_is_told(plan: str, vmm: Vmm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", plan, "--pid", "4711", "--slice", "2", "--allow-seccomp"]) == 0
    shown = capsys.readouterr()
    assert (
        "pre-faulted 2.0 MiB of 2.0 MiB in 0.50 s, with 3 calls; longest stop of a vCPU 5.0 ms" in shown.out
    )
    assert "vCPU 2: no thread was seen running it" in shown.err
    assert vmm.asked == {
        "pid": 4711,
        "allow_seccomp": True,
        "stop": True,
        "slice_s": 0.002,
        "ranges": [(one.ipa, one.size) for one in RANGES],
        "closed": True,
    }


def test_json_has_the_result(plan: str, vmm: Vmm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", plan, "--pid", "4711", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["command"], told["bytes"], told["ended"]) == ("apply", 2 * MIB, "done")
    assert told["longest_stop_s"] == 0.005
    assert told["vcpus"][0]["calls"] == 3


def test_a_dry_run_stops_nothing(plan: str, vmm: Vmm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", plan, "--pid", "4711", "--dry-run"]) == 0
    assert vmm.asked["stop"] is False
    assert "ranges" not in vmm.asked
    shown = capsys.readouterr().out
    assert "vCPU 0: thread 100 is stopped for 5 ms at a time\n" in shown
    assert "vCPU 1: thread 101 is stopped for 5 ms at a time, by its name" in shown
    assert main(["apply", plan, "--pid", "4711", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["dry_run"], told["unknown_vcpus"]) == (True, [2])


def test_a_dry_run_that_sees_no_vcpu_says_what_that_means(
    plan: str, vmm: Vmm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Vmm, "find", lambda *_, **__: Found(4711, 5, (), (0, 1)))
    assert main(["apply", plan, "--pid", "4711", "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "vCPU 0, 1: no thread was seen running it; without --dry-run, threads at work are asked" in said
    assert "others" not in said


@pytest.mark.parametrize(("error", "status"), [("ENOENT", 0), ("EFAULT", 3)])
def test_holes_are_reported_and_other_failures_are_errors(
    error: str, status: int, plan: str, vmm: Vmm, capsys: pytest.CaptureFixture[str]
) -> None:
    vmm.done.failed.append(FailedRange(0x4000, 0x1000, 2, error, "why"))
    assert main(["apply", plan, "--pid", "4711"]) == status
    assert f"not done: 0x4000+0x1000, {error}: why" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_shows_what_was_done_and_ends_as_shells_expect_it(
    number: signal.Signals, plan: str, vmm: Vmm, capsys: pytest.CaptureFixture[str]
) -> None:
    vmm.done.ended, vmm.done.signal = "interrupted", number
    assert main(["apply", plan, "--pid", "4711"]) == 128 + number
    shown = capsys.readouterr()
    assert "pre-faulted" in shown.out
    assert "interrupted; all vCPUs were let go" in shown.err


@pytest.mark.parametrize(("error", "status"), [(CapabilityMissing("no"), 77), (ProcessLost("gone"), 3)])
def test_errors_have_their_exit_codes(error: PrefaultError, status: int, plan: str, vmm: Vmm) -> None:
    vmm.error = error
    assert main(["apply", plan, "--pid", "4711"]) == status
    assert vmm.asked["closed"]


def test_a_process_without_a_vm_is_refused(plan: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", plan, "--pid", str(os.getppid())]) == 2
    assert "has no VM" in capsys.readouterr().err


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, vmm: Vmm) -> None:
    (tmp_path / "x.json").write_text("{}")
    assert main(["apply", str(tmp_path / "x.json"), "--pid", "4711"]) == 2
    assert not vmm.asked


def test_a_plan_of_another_architecture_is_refused(
    tmp_path: Path, vmm: Vmm, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text(dumps(replace(PLAN, architecture="riscv64")))
    assert main(["apply", str(tmp_path / "x.json"), "--pid", "4711"]) == 2
    assert "is of a host with riscv64" in capsys.readouterr().err
    assert not vmm.asked


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_slice_is_a_number(number: str, plan: str, vmm: Vmm) -> None:
    assert main(["apply", plan, "--pid", "4711", "--slice", number]) == 2
    assert not vmm.asked
