# SPDX-License-Identifier: Apache-2.0
"""``prefault plan``: recordings in, numbers and a plan out."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefault.cli.main import main
from prefault.errors import ExitCode
from prefault.faults import plan as plans
from prefault.faults import recording
from prefault.faults.syndrome import Access
from tests.faults.recordings import Fault, recording_of


@pytest.fixture(autouse=True)
def boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording of a guest that reads 1,000 pages, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    faults = [Fault(0x40000 + 2 * page, 20_000 * page, 5000) for page in range(1000)]
    recording.write(recording_of(faults), Path("boot.parquet"))


def test_numbers_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "boot.parquet", "--granule", "4K"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("In 20 ms, your guest took 1,000 stage-2 faults")
    assert "saves 1,000 of these faults: 5 ms" in shown
    assert "It pays:" in shown


def test_a_plan_is_written_and_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "boot.parquet", "-o", "plan.json", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads(Path("plan.json").read_text())
    assert printed["plan"] == written
    assert plans.load(Path("plan.json")).ranges[0].ipa == 0x4000_0000


def test_that_it_does_not_pay_is_said_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "boot.parquet", "--prefault-cost", "9000"]) == 0
    assert "It does NOT pay" in capsys.readouterr().out


def test_what_is_there_is_not_overwritten_unless_asked() -> None:
    Path("plan.json").write_text("precious")
    assert main(["plan", "boot.parquet", "-o", "plan.json"]) == ExitCode.USAGE
    assert Path("plan.json").read_text() == "precious"
    assert main(["plan", "boot.parquet", "-o", "plan.json", "--force"]) == 0


def test_memslots_leave_devices_out(capsys: pytest.CaptureFixture[str]) -> None:
    slot = ["--memslot", "0x40000000:1M"]
    assert main(["plan", "boot.parquet", "--granule", "4K", "--json", *slot]) == 0
    ranges = json.loads(capsys.readouterr().out)["plan"]["ranges"]
    assert len(ranges) == 128
    assert all(0x4000_0000 <= one["ipa"] < 0x4010_0000 for one in ranges)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memslot", "x:1M"], "not IPA:SIZE"),
        (["--memslot", "0x40000001:1M"], "whole pages"),
        (["--memslot", "0:1M", "--memslot", "0x1000:1M"], "overlap"),
        (["--granule", "6K"], "no multiple"),
        (["--over", "some"], "none of union"),
        (["--memory", "tape/write"], "there are figures for"),
        (["-o", "nowhere/plan.json"], "no folder"),
        (["-o", "-"], "not written to standard output"),
        (["-o", "x" * 300], "File name too long"),
        (["-o", "one", "--html", "./one"], "--output and --html are one file"),
        (["--fault-cost", "nan"], "no number that can be reckoned with"),
        (["--prefault-cost", "inf"], "is not in the range"),
        (["--granule", "99999999T"], "largest block"),
        (["--pid", "4711"], "has no fault of that process; it has those of 1"),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "boot.parquet", *words]) == ExitCode.USAGE
    assert message in capsys.readouterr().err


def test_one_vm_of_several_is_planned_by_its_process(capsys: pytest.CaptureFixture[str]) -> None:
    one = recording_of([Fault(page, page) for page in range(100)])
    one.faults.pid[50:] = 2
    recording.write(one, Path("host.parquet"))
    assert main(["plan", "host.parquet"]) == 0
    assert "plan for one of them with --pid" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", "host.parquet", "--pid", "2", "--granule", "4K", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert min(one["ipa"] for one in plan["ranges"]) == 50 * 4096
    assert "several-vms" not in {one["kind"] for one in plan["advice"]}


def test_a_folder_that_may_not_be_written_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: path != Path("locked"))  # root may write anywhere
    assert main(["plan", "boot.parquet", "-o", "locked/plan.json"]) == ExitCode.USAGE
    assert "nothing may be written into the folder locked" in capsys.readouterr().err


def test_a_file_that_is_no_recording_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("trace.txt").write_text("hello")
    assert main(["plan", "trace.txt"]) == ExitCode.USAGE
    assert "prefault record --from trace.txt" in capsys.readouterr().err


def test_populating_is_advised_where_writes_would_fault_again(capsys: pytest.CaptureFixture[str]) -> None:
    faults = [Fault(page, 20_000 * page, 5000, access=Access.WRITE) for page in range(1000)]
    recording.write(recording_of(faults), Path("w.parquet"))
    assert main(["plan", "w.parquet", "--memory", "private/nothing"]) == 0
    shown = capsys.readouterr().out
    assert "It does NOT pay" in shown
    assert "MADV_POPULATE_WRITE" in shown


def test_all_files_are_written_or_none(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--html", "x.html", "--perfetto", "x.json.gz", "-o", "plan.json"]
    Path("x.html").write_text("precious")
    assert main(["plan", "boot.parquet", *names]) == ExitCode.USAGE
    assert {path.name for path in Path.cwd().iterdir()} == {"boot.parquet", "x.html"}
    assert main(["plan", "boot.parquet", *names, "--force"]) == 0
    assert "your guest took 1,000" in Path("x.html").read_text()
    with gzip.open("x.json.gz") as file:
        assert len(json.load(file)["traceEvents"]) > 1000
    assert "written: x.json.gz" in capsys.readouterr().out


def test_the_page_names_the_files_that_it_was_given() -> None:
    assert main(["plan", "boot.parquet", "--html", "x.html", "-o", "the plan.json"]) == 0
    shown = Path("x.html").read_text()
    assert "prefault apply &#x27;the plan.json&#x27; --pid PID" in shown
    assert main(["plan", "boot.parquet", "--html", "y.html"]) == 0
    assert "prefault plan boot.parquet -o plan.json" in Path("y.html").read_text()


def test_a_terminal_that_knows_ascii_only_is_enough() -> None:
    command = [sys.executable, "-m", "prefault", "plan", "boot.parquet", "--cap", "64K"]
    told = subprocess.run(
        command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, timeout=60
    )
    assert (told.returncode, "\\xb5s" in told.stdout) == (0, True), told.stderr


def test_a_source_that_is_no_text_does_not_stop_the_page() -> None:
    one = recording_of([Fault(1, 5, 9000)], source="\udcff.txt")
    recording.write(one, Path("x.parquet"))
    assert main(["plan", "x.parquet", "--html", "x.html", "--perfetto", "x.json", "-o", "x.plan"]) == 0
    assert "\\udcff.txt" in Path("x.html").read_text(encoding="utf-8")
    assert plans.load(Path("x.plan")).sources == ("\udcff.txt",)


@pytest.mark.parametrize("option", ["-o", "--html", "--perfetto"])
def test_a_full_disk_is_told_with_the_file_that_it_would_have_been(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert main(["plan", "boot.parquet", option, "wanted"]) == ExitCode.OPERATING_ERROR
    assert "No space left on device: wanted; make room or name another place" in capsys.readouterr().err
    assert [path.name for path in Path.cwd().iterdir()] == ["boot.parquet"]


@pytest.mark.parametrize("option", ["--output", "--html", "--perfetto"])
def test_a_recording_is_not_written_over_even_with_force(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path("boot.parquet").read_bytes()
    assert main(["plan", "boot.parquet", option, "./boot.parquet", "--force"]) == ExitCode.USAGE
    assert "is a recording that the plan is made from" in capsys.readouterr().err
    assert Path("boot.parquet").read_bytes() == before


def test_one_recording_is_not_taken_for_two_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "boot.parquet", "./boot.parquet"]) == ExitCode.USAGE
    assert "given twice" in capsys.readouterr().err


def test_commands_of_the_page_have_the_options_that_it_was_made_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--memslot", "0x40000000:16M", "--fault-cost", "4000", "--prefault-cost", "70"]
    assert main(["plan", "boot.parquet", "--html", "boot.html", *options]) == 0
    command = "prefault plan boot.parquet --memslot 0x40000000:16777216 --fault-cost 4000 --prefault-cost 70"
    assert f"{command} -o plan.json" in Path("boot.html").read_text()
    assert command in capsys.readouterr().out


def test_a_cost_is_in_the_command_to_its_last_digit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "boot.parquet", "--fault-cost", "1234567.5"]) == 0
    assert "--fault-cost 1234567.5 " in capsys.readouterr().out


def test_what_the_memory_is_taken_for_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "boot.parquet"]) == 0
    assert "has populated for writing before" in capsys.readouterr().out
    assert main(["plan", "boot.parquet", "--memory", "private/nothing"]) == 0
    assert "has not populated (private/nothing)" in capsys.readouterr().out
