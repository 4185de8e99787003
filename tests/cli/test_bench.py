# SPDX-License-Identifier: Apache-2.0
"""``prefault bench`` with the lab's machine replaced by a function that answers for it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefault.bench.cases import Case
from prefault.bench.measure import Measured
from prefault.bench.pairs import WAYS, Pair, PairAsk
from prefault.bench.waits import KINDS, Ask, Waits
from prefault.cli import bench as command
from prefault.cli.interrupt import INTERRUPTED
from prefault.cli.main import main
from prefault.errors import ExitCode, LabLost
from prefault.lab import bench as in_lab
from prefault.lab import compare, stock
from prefault.lab.frames import Kind
from prefault.lab.job import Job, JobResult
from prefault.lab.machine import MachineOptions
from prefault.report.profile import MMU_LOCK, Profile

OLD = Path("page-at-a-time/Image")


class FakeLab:
    """Stands in for ``run_job``: every page costs as much as it is told."""

    def __init__(self) -> None:
        self.boots: list[tuple[str, Path | None]] = []
        self.options: list[MachineOptions] = []
        self.cost = 60
        self.fail: Callable[[int], None] = lambda count: None
        """Called before each result with how many there were, to raise what goes wrong."""
        self._told = 0

    def __call__(
        self,
        job: Job,
        options: MachineOptions,
        *,
        kernel: Path | None,
        on_output: Callable[[Kind, bytes], None],
    ) -> JobResult:
        self.boots.append((options.mode, kernel))
        self.options.append(options)
        data = next(iter(job.files.values()))
        assert isinstance(data, bytes)
        lines = [json.loads(line) for line in data.splitlines()]
        assert job.argv[-1] == str(len(lines))
        for line in lines:
            self.fail(self._told)
            self._told += 1
            on_output(Kind.STDOUT, self._measure(Case.from_json(line["case"]), line["ioctl_only"]))
        return JobResult(0, b"", b"", {}, "", 1.5, Path("runs/1"))

    def _measure(self, case: Case, ioctl_only: bool) -> bytes:
        pages = case.size // 4096
        cost = 4000 if ioctl_only else self.cost
        samples = {"demand": [5000 * pages], "prefault": [cost * pages], "again": [pages]}
        found = Measured(case.name, case.size, 4096, 4096, samples, {"3": pages}, 0.0)
        return json.dumps(vars(found)).encode() + b"\n"


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> FakeLab:
    fake = FakeLab()
    monkeypatch.setattr(in_lab, "run_job", fake)
    monkeypatch.setattr(compare, "page_at_a_time", lambda variant, progress: OLD)
    monkeypatch.setenv("PREFAULT_LAB_KERNEL", __file__)
    return fake


def reported(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]  # an object was written


def test_both_kernels_are_measured_in_each_mode(lab: FakeLab) -> None:
    assert main(["bench", "private/resident", "private/resident/nested"]) == ExitCode.DONE
    modes = ("nested", "protected")
    assert lab.boots == [*((mode, None) for mode in modes), *((mode, OLD) for mode in modes)]


def test_json_has_the_costs_of_both_kernels(lab: FakeLab, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--json", "--mode", "nested", "private/resident"]) == ExitCode.DONE
    (row,) = reported(capsys)["rows"]
    assert (row["cost"]["prefault"], row["page_at_a_time"]["prefault"], row["must_reach"]) == (60, 4000, 210)
    assert row["does_not_hold"] == []


def test_without_comparison_one_kernel_is_booted(lab: FakeLab) -> None:
    assert main(["bench", "--no-compare", "--mode", "nested", "thp/*"]) == ExitCode.DONE
    assert lab.boots == [("nested", None)]


def test_a_peer_is_measured_in_the_same_table(
    lab: FakeLab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "current", lambda arch: None)
    names = ["private/resident", "private/resident/nested", "hugetlb-32M/*"]
    assert main(["bench", "--json", "--peer", "--mode", "nested", *names]) == ExitCode.DONE
    rows = [(row["mode"], row["case"]["name"]) for row in reported(capsys)["rows"]]
    assert [name for mode, name in rows if mode == "x86_64"] == ["private/resident"]
    assert [options.arch.name for options in lab.options] == ["arm64", "x86_64", "arm64"]


def test_a_peer_that_was_not_fetched_is_told_before_anything_is_measured(
    lab: FakeLab, capsys: pytest.CaptureFixture[str], own_cache: Path
) -> None:
    assert main(["bench", "--peer", "private/resident"]) == ExitCode.MISSING
    assert "prefault lab build --arch x86_64" in capsys.readouterr().err
    assert lab.boots == []


def test_what_is_too_dear_is_named_and_ends_with_1_if_asked(
    lab: FakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.cost = 300
    assert main(["bench", "--mode", "nested", "private/resident"]) == ExitCode.DONE
    assert "does not hold: private/resident: pre-faulting costs 300" in capsys.readouterr().out
    assert main(["bench", "--mode", "nested", "--check", "private/resident"]) == ExitCode.DOES_NOT_HOLD


def test_an_interruption_keeps_what_was_measured(lab: FakeLab, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(count: int) -> None:
        if count == 2:
            raise KeyboardInterrupt

    lab.fail = interrupt
    assert main(["bench", "--json", "--mode", "nested", "private/*"]) == INTERRUPTED
    assert len(reported(capsys)["rows"]) == 2


def test_a_lost_machine_keeps_what_was_measured(lab: FakeLab, capsys: pytest.CaptureFixture[str]) -> None:
    def lose(count: int) -> None:
        if count == 1:
            raise LabLost("it is gone")

    lab.fail = lose
    assert main(["bench", "--json", "--mode", "nested", "private/*"]) == ExitCode.LAB_LOST
    found = reported(capsys)
    assert (len(found["rows"]), found["problem"]) == (1, "it is gone")


def test_a_machine_that_ends_early_is_told(lab: FakeLab, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = JobResult(1, b"", b"Traceback\nMemoryError", {}, "", 1.5, Path("runs/1"))
    monkeypatch.setattr(in_lab, "run_job", lambda *_, **__: silent)
    assert main(["bench", "--mode", "nested", "private/resident"]) == ExitCode.OPERATING_ERROR


def test_nested_guests_are_left_out_of_other_modes(lab: FakeLab, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--json", "--mode", "nvhe", "private/resident*"]) == ExitCode.DONE
    assert not [row for row in reported(capsys)["rows"] if row["case"]["context"] != "ordinary"]
    assert main(["bench", "--mode", "nvhe", "private/resident/nested"]) == ExitCode.USAGE


def test_sizes_are_measured_each(lab: FakeLab, capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench --json --mode nested --size 32M --size 4G private/resident"
    assert main(words.split()) == ExitCode.DONE
    assert [row["case"]["size"] for row in reported(capsys)["rows"]] == [32 << 20, 4 << 30]
    assert lab.options[0].memory_mib >= 5120


def test_large_huge_pages_are_set_aside_at_boot(lab: FakeLab) -> None:
    assert main(["bench", "--mode", "nested", "hugetlb-*/resident"]) == ExitCode.DONE
    assert lab.options[0].append == ("hugepagesz=32M", "hugepages=2", "hugepagesz=1024M", "hugepages=1")


def test_another_cpu_is_booted_and_need_not_reach_what_the_usual_one_must(
    lab: FakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.cost = 10_000
    words = "bench --json --check --no-compare --mode nested --cpu cortex-a76 private/resident"
    assert main(words.split()) == ExitCode.DONE
    assert lab.options[0].cpu == "cortex-a76"
    assert reported(capsys)["rows"][0]["must_reach"] is None


def test_the_list_measures_nothing(lab: FakeLab, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "private/*"]) == ExitCode.DONE
    assert "private/resident/logged" in capsys.readouterr().out
    assert not lab.boots


def test_a_plot_is_drawn_into_the_file(lab: FakeLab, tmp_path: Path) -> None:
    file = tmp_path / "cost.svg"
    assert main(["bench", "--mode", "nested", "--plot", str(file), "private/resident"]) == ExitCode.DONE
    assert "private/resident" in file.read_text()


@pytest.mark.parametrize(
    "words",
    [
        "--plot cost.txt",
        "--plot nowhere/cost.svg",
        "--no-compare --page-at-a-time IMAGE",
        "--variant 6.12",
        "--size 1M",
        "nobody",
        "--waits thp/*",
        "--pairs thp/*",
        "--pairs --waits",
        "--by-function --pairs private/resident",
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(lab: FakeLab, tmp_path: Path, words: str) -> None:
    image = tmp_path / "Image"
    image.write_bytes(bytes(56) + b"ARM\x64" + bytes(8))
    assert main(["bench", *words.replace("IMAGE", str(image)).split()]) == ExitCode.USAGE
    assert not lab.boots


def test_by_function_shows_each_call_and_how_long_the_lock_is_held(
    monkeypatch: pytest.MonkeyPatch, lab: FakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, int, Path | None]] = []

    def fake(case: Case, call: str, boot: in_lab.Boot, settings: in_lab.Settings) -> Profile:
        asked.append((call, case.size, boot.kernel))
        return Profile(Counter({f"does_{call}": 512 * len(asked)}), Counter({MMU_LOCK: 10_001}))

    monkeypatch.setattr(command, "profile", fake)
    assert main(["bench", "--by-function", "private/resident"]) == ExitCode.DONE
    assert asked == [("demand", 2 << 20, None), ("prefault", 2 << 20, OLD), ("prefault", 2 << 20, None)]
    text = capsys.readouterr().out
    assert "does not hold: the mmu_lock is held for 10,001 instructions at most; 10,000" in text
    assert next(line.split()[1:] for line in text.splitlines() if "does_demand" in line) == ["1.0"]


def test_by_function_wants_to_know_which_cases(lab: FakeLab) -> None:
    assert main(["bench", "--by-function"]) == ExitCode.USAGE
    assert main(["bench", "--by-function", "--mode", "protected", "private/resident"]) == ExitCode.USAGE


def test_waits_are_shown_of_both_kernels(
    monkeypatch: pytest.MonkeyPatch, lab: FakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels: list[Path | None] = []

    def fake(boot: in_lab.Boot, settings: in_lab.Settings, ask: Ask) -> list[Waits]:
        kernels.append(boot.kernel)
        return [Waits(kind, busy, [1000, 2000, 9000]) for kind in KINDS for busy in (False, True)]

    monkeypatch.setattr(in_lab, "waits", fake)
    assert main(["bench", "--waits"]) == ExitCode.DONE
    assert kernels == [None, OLD]
    text = capsys.readouterr().out
    assert text.count("2 µs") == 2 * 2 * len(KINDS)
    assert "page at a time: pre-faulting" in text


def test_what_two_vcpus_take_is_shown_as_a_share_of_what_one_does(
    monkeypatch: pytest.MonkeyPatch, lab: FakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    took = {"one": (100, 100), "halves": (60, 110), "both all": (90, 170)}

    def fake(
        boot: in_lab.Boot, settings: in_lab.Settings, ask: PairAsk, *, icount: bool = False
    ) -> list[Pair]:
        rounds = range(1, 1 + ask.rounds)
        if icount:
            return [Pair(way, 70 + len(way), 1) for _ in rounds for way in WAYS]
        return [Pair(way, took[way][0] * slow, took[way][1] * slow) for slow in rounds for way in WAYS]

    monkeypatch.setattr(in_lab, "pairs", fake)
    assert main(["bench", "--pairs", "--no-compare"]) == ExitCode.DONE
    text = capsys.readouterr().out
    for line, shares in (
        ("a half each", ["1.04", "0.60", "1.10"]),
        ("all of it each", ["1.07", "0.90", "1.70"]),
    ):
        assert next(found for found in text.splitlines() if line in found).split()[-3:] == shares
