# SPDX-License-Identifier: Apache-2.0
"""``prefault run`` with the lab's machine replaced by a function that answers for it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from prefault.cli import run as command
from prefault.cli.main import main
from prefault.cli.run import StopWatch
from prefault.errors import ExitCode, JobTimeout, KvmMissing, LabLost
from prefault.lab.frames import Kind
from prefault.lab.job import Job, JobResult
from prefault.lab.machine import MachineOptions
from prefault.machine import Backing, FaultCounts, Resident
from prefault.scenarios.walk import CLOCK_STARTS, CLOCK_STOPS, Phase, WalkConfig, WalkResult, WalkRun, When

RUN = WalkRun(
    phases=(Phase("first half", 5_000, 2, FaultCounts(read=1)), Phase("second half", 5_000, 2)),
    prefault_ns=0,
    prefaulted_bytes=0,
    leaves={"3": 2},
    shadow_leaves={},
    bytes_checked=16,
)


def answer(stdout: bytes, status: int = 0, stderr: bytes = b"") -> JobResult:
    return JobResult(status, stdout, stderr, {}, "", 1.5, Path("runs/1"))


class FakeLab:
    """Stands in for ``run_job``: remembers what it was asked and gives what it was told to."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.options: list[MachineOptions] = []
        self.kernels: list[Path | None] = []
        self.reply: Callable[[WalkConfig], JobResult] = self.walk

    @staticmethod
    def walk(config: WalkConfig) -> JobResult:
        spared = dataclasses.replace(RUN, prefault_ns=4_000, prefaulted_bytes=8192)
        return answer(json.dumps(WalkResult(config, 4096, RUN, spared).to_json()).encode())

    def __call__(
        self,
        job: Job,
        options: MachineOptions,
        *,
        kernel: Path | None,
        on_output: Callable[[Kind, bytes], None],
    ) -> JobResult:
        self.jobs.append(job)
        self.options.append(options)
        self.kernels.append(kernel)
        for note in (CLOCK_STARTS, CLOCK_STOPS) * 2:
            on_output(Kind.STDERR, f"{note}\n".encode())
        return self.reply(self.config)

    @property
    def config(self) -> WalkConfig:
        """The walk that the last job was to do."""
        return WalkConfig.from_json(json.loads(self.jobs[-1].argv[-1]))


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> FakeLab:
    fake = FakeLab()
    monkeypatch.setattr(command, "run_job", fake)
    return fake


def test_the_options_become_the_walk_and_the_machine(lab: FakeLab) -> None:
    words = "run --machine lab --size 8M --backing thp --resident read --vcpus 2 --nested --writes 12.5"
    more = "--prefault 50 --when while-running --memory 1G --no-icount --timeout 7"
    assert main([*words.split(), *more.split()]) == 0
    assert lab.config == WalkConfig(
        size=8 << 20,
        backing=Backing.THP,
        resident=Resident.READ,
        vcpus=2,
        nested=True,
        write_permille=125,
        prefault_permille=500,
        when=When.WHILE_RUNNING,
    )
    assert lab.options == [MachineOptions(memory_mib=1024, cpus=2, mode="nested", icount=False)]
    assert lab.jobs[0].timeout == 7


def test_instructions_are_counted_unless_asked_not_to(
    lab: FakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--machine", "lab"]) == 0
    assert lab.options[0].icount
    printed = capsys.readouterr().out
    assert "instructions" in printed
    assert "time, emulated" in printed


def test_without_icount_the_table_has_time(lab: FakeLab, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--machine", "lab", "--no-icount"]) == 0
    assert "instructions" not in capsys.readouterr().out


def test_json_is_the_result_and_how_the_lab_ran(lab: FakeLab, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--machine", "lab", "--json", "--size", "8K"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["version"], found["command"], found["machine"]) == (1, "run", "lab")
    assert found["config"]["size"] == 8192
    assert found["without"]["faults"]["read"] == 1
    assert found["with_prefault"]["prefault_ns"] == 4_000
    assert found["lab"]["icount"] is True
    assert set(found["lab"]["wall_seconds"]) == {"without", "with_prefault"}


@pytest.mark.parametrize(
    "words",
    [
        ["--size", "12345"],
        ["--size", "4K"],  # two halves of a page each are 8 KiB
        ["--size", "24K", "--vcpus", "2"],
        ["--size", "0"],
        ["--size", "1G", "--memory", "2G"],
        ["--memory", "64M", "--size", "8K"],
        ["--nested", "--mode", "protected"],
        ["--nested", "--mode", "nvhe"],
        ["--writes", "101"],
        ["--prefault", "-1"],
        ["--vcpus", "0"],
        ["--timeout", "0"],
        ["--backing", "paper"],
        ["--machine", "kvm", "--dry-run"],
        ["--machine", "spec", "--mode", "nvhe"],
        ["--machine", "spec", "--no-icount"],
        ["--kernel", "no/such/Image"],
    ],
)
def test_what_cannot_be_is_refused_before_the_lab_starts(lab: FakeLab, words: list[str]) -> None:
    assert main(["run", "--machine", "lab", *words]) == ExitCode.USAGE
    assert lab.jobs == []


@pytest.mark.parametrize("code", [1, 2, 3, 77])
def test_an_error_of_the_walk_ends_the_command_as_it_would_have_here(
    lab: FakeLab, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    error = json.dumps({"error": {"message": "what the walk said", "exit_code": code}})
    lab.reply = lambda _: answer(error.encode(), code)
    assert main(["run", "--machine", "lab"]) == code
    assert capsys.readouterr().err.endswith("prefault: what the walk said\n")


def test_a_walk_without_a_result_shows_its_last_words(
    lab: FakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.reply = lambda _: answer(b"", 1, b"Traceback\nMemoryError\n")
    assert main(["run", "--machine", "lab"]) == ExitCode.OPERATING_ERROR
    assert "MemoryError" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(LabLost("panic"), 125), (JobTimeout("late"), 124)])
def test_a_lost_lab_is_not_a_failed_walk(
    lab: FakeLab, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def lose(config: WalkConfig) -> JobResult:
        raise error

    lab.reply = lose
    assert main(["run", "--machine", "lab"]) == code


def test_the_specification_is_the_default_and_needs_no_lab(
    lab: FakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--size", "64K"]) == 0
    printed = capsys.readouterr().out
    assert "instructions, estimated" in printed
    assert "On the real kernel: prefault run --size 64K --machine lab" in printed
    assert lab.jobs == []


def test_json_says_where_the_costs_of_the_specification_are_from(
    lab: FakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--json", "--size", "64K", "--machine=spec"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"] == "spec"
    assert found["costs"]["unit"] == "instructions"
    assert "measured in the lab on Linux 7.3" in found["costs"]["estimated_from"]
    assert found["without"]["faults"]["write"] == 8
    assert found["with_prefault"]["faults"]["write"] == 0


def test_machine_kvm_does_not_start_the_lab(
    lab: FakeLab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_kvm() -> None:
        raise KvmMissing("/dev/kvm is not there")

    monkeypatch.setattr(command, "open_kvm", no_kvm)
    assert main(["run", "--machine", "kvm"]) == ExitCode.MISSING
    assert "/dev/kvm" in capsys.readouterr().err
    assert lab.jobs == []


def test_a_dry_run_prints_the_command_line_and_starts_nothing(
    lab: FakeLab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[MachineOptions] = []

    def line(job: Job, options: MachineOptions, *, kernel: Path | None) -> tuple[str, ...]:
        asked.append(options)
        return ("qemu-system-aarch64", "-append", "two words")

    monkeypatch.setattr(command, "command_line", line)
    assert main(["run", "--machine", "lab", "--dry-run"]) == 0
    assert capsys.readouterr().out == "qemu-system-aarch64 -append 'two words'\n"
    assert main(["run", "--machine", "lab", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["command_line"][-1] == "two words"
    assert lab.jobs == []
    assert len(asked) == 2


def test_the_stop_watch_finds_notes_however_they_are_cut() -> None:
    watch = StopWatch()
    text = f"something else\n{CLOCK_STARTS}\n{CLOCK_STOPS}\n{CLOCK_STARTS}\n{CLOCK_STOPS}\n".encode()
    for index in range(0, len(text), 3):
        watch(Kind.STDERR, text[index : index + 3])
        watch(Kind.STDOUT, f"{CLOCK_STARTS}\n".encode())
    seconds = watch.seconds()
    assert seconds is not None
    assert min(seconds) >= 0


def test_the_stop_watch_says_nothing_if_it_saw_half() -> None:
    watch = StopWatch()
    watch(Kind.STDERR, f"{CLOCK_STARTS}\n".encode())
    assert watch.seconds() is None
