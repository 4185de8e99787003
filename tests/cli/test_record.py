# SPDX-License-Identifier: Apache-2.0
"""``prefault record`` on files; live recording is in tests/lab."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from prefault.cli import record as command
from prefault.cli.main import main
from prefault.errors import ExitCode
from prefault.faults import captured, recording
from prefault.faults.capture import CaptureConfig, Captured, Listener, State
from prefault.faults.captured import Head, Page
from prefault.kvm import tracefs

DATA = Path(__file__).parents[1] / "faults/data"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def left() -> list[str]:
    """What is in the folder."""
    return [path.name for path in Path.cwd().iterdir()]


def test_a_trace_becomes_a_recording(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "--from", str(DATA / "walk.trace-cmd"), "-o", "x.parquet"]) == 0
    shown = capsys.readouterr()
    assert "182 stage-2 faults" in shown.out
    assert "next: prefault plan x.parquet" in shown.out
    assert len(recording.read(Path("x.parquet"))) == 182


def test_json_has_what_was_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "--json", "--from", str(DATA / "walk.capture")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["command"], found["output"]) == ("record", "faults.parquet")
    assert found["summary"]["kinds"]["mmio"] == {"write": 6}
    assert found["metadata"]["architecture"] == "aarch64"
    assert found["read"]["bad_lines"] == []


def test_a_capture_has_the_page_size_that_it_was_made_with(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["record", "--from", str(DATA / "walk.capture"), "--page-size"]
    assert main([*argv, "64K"]) == ExitCode.USAGE
    assert "is of a host with pages of 4 KiB" in " ".join(capsys.readouterr().err.split())
    assert not Path("faults.parquet").exists()
    assert main([*argv, "4K"]) == 0


def test_standard_input_is_read() -> None:
    command = [sys.executable, "-m", "prefault", "record", "--from", "-"]
    with (DATA / "walk.tracefs").open("rb") as file:
        subprocess.run(command, stdin=file, check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert recording.read(Path("faults.parquet")).metadata.source == "standard input"


def test_a_closed_standard_input_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["record", "--from", "-"]) == ExitCode.USAGE
    assert "standard input is closed" in capsys.readouterr().err


def test_a_damaged_capture_from_a_pipe_is_told_as_from_a_file() -> None:
    data = (DATA / "walk.capture").read_bytes()
    damaged = captured.MAGIC + b"\xff" * 64 + data
    Path("x.capture").write_bytes(damaged)
    command = [sys.executable, "-m", "prefault", "record", "--from"]
    of_file = subprocess.run([*command, "x.capture"], capture_output=True, text=True, timeout=60)
    of_pipe = subprocess.run([*command, "-"], input=damaged, capture_output=True, timeout=60)
    assert (of_file.returncode, of_pipe.returncode) == (2, 2)
    assert f"damaged at byte {len(captured.MAGIC)}" in of_file.stderr
    assert f"damaged at byte {len(captured.MAGIC)}" in of_pipe.stderr.decode()


@pytest.mark.parametrize("name", [b"[", b"]x", b"[x].d", b"[red]", b"\xff\x80"])
def test_any_name_of_a_file_will_do(name: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.fsdecode(name + b"[")) / "b]"
    folder.mkdir(parents=True)
    source, target = folder / os.fsdecode(name), folder / "x [1].parquet"
    source.write_bytes((DATA / "walk.trace-cmd").read_bytes())
    assert main(["record", "--from", str(source), "-o", str(target)]) == 0
    shown = str(target).encode(errors="backslashreplace").decode()
    assert f"next: prefault plan '{shown}'" in capsys.readouterr().out
    assert (
        main(["plan", str(target), "--html", str(folder / "x.html"), "--perfetto", str(folder / "x.json")])
        == 0
    )
    json.loads((folder / "x.json").read_text())


def test_what_to_do_about_a_compressed_pipe_names_no_file_that_is_not_there() -> None:
    command = [sys.executable, "-m", "prefault", "record", "--from", "-"]
    done = subprocess.run(command, input=b"\x1f\x8b\x08" + bytes(99), capture_output=True, timeout=60)
    assert (done.returncode, b"run `zcat FILE > trace.txt`" in done.stderr) == (ExitCode.USAGE, True)


def test_a_trace_is_not_replaced_by_its_recording() -> None:
    Path("trace").write_bytes((DATA / "walk.tracefs").read_bytes())
    assert main(["record", "--from", "./trace", "-o", "trace", "--force"]) == ExitCode.USAGE
    assert Path("trace").read_bytes() == (DATA / "walk.tracefs").read_bytes()


def test_bad_lines_and_losses_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DATA / "walk.tracefs").read_text() + "garbage\nCPU:1 [LOST 12 EVENTS]\n"
    Path("trace").write_text(text)
    assert main(["record", "--from", "trace"]) == 0
    told = capsys.readouterr().err
    assert "12 events were LOST" in told
    assert f"line {len(text.splitlines()) - 1}: garbage" in told


def test_what_is_there_is_not_overwritten_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    Path("faults.parquet").write_text("precious")
    arguments = ["record", "--from", str(DATA / "walk.tracefs")]
    assert main(arguments) == ExitCode.USAGE
    assert "--force" in capsys.readouterr().err
    assert Path("faults.parquet").read_text() == "precious"
    assert main([*arguments, "--force"]) == 0


def test_a_file_that_is_no_trace_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x").write_text("hello\n")
    assert main(["record", "--from", "x"]) == ExitCode.USAGE
    assert "hello" in capsys.readouterr().err
    assert left() == ["x"]


@pytest.mark.parametrize(
    "option", [["--pid", "1"], ["--seconds", "1"], ["--no-durations"], ["--buffer", "1M"]]
)
def test_options_of_live_recording_are_refused_with_a_file(option: list[str]) -> None:
    assert main(["record", "--from", str(DATA / "walk.tracefs"), *option]) == ExitCode.USAGE


def test_a_process_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "--pid", str(2**22 + 1)]) == ExitCode.USAGE
    assert "no such process" in capsys.readouterr().err
    assert left() == []


def test_a_process_without_a_vm_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "--pid", str(os.getpid())]) == ExitCode.USAGE
    assert "has no VM" in capsys.readouterr().err


def test_a_machine_without_tracefs_is_told_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracefs, "TRACEFS", tmp_path / "nowhere")
    assert main(["record", "--seconds", "1"]) == ExitCode.MISSING
    assert "root, a mounted tracefs" in capsys.readouterr().err
    assert left() == []


def test_who_may_not_look_into_tracefs_is_told_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may look everywhere, so that it is a name that nobody can look up."""
    monkeypatch.setattr(tracefs, "TRACEFS", tmp_path / ("x" * 300))
    assert main(["record", "--seconds", "1"]) == ExitCode.MISSING
    assert "root, a mounted tracefs" in capsys.readouterr().err


def test_a_process_of_somebody_else_is_not_said_to_have_no_vm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = os.access
    monkeypatch.setattr(os, "access", lambda path, how: not str(path).endswith("/fd") and mine(path, how))
    assert main(["record", "--pid", "1"]) == ExitCode.MISSING
    assert "run as root" in capsys.readouterr().err


def standalone(*words: str) -> subprocess.CompletedProcess[str]:
    """The part that needs the standard library only."""
    argv = [sys.executable, "-m", "prefault.faults.capture", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


def test_capturing_by_itself_overwrites_nothing() -> None:
    Path("boot.capture").write_text("precious")
    done = standalone("--output", "boot.capture")
    assert (done.returncode, "is there already" in done.stderr) == (ExitCode.USAGE, True), done.stderr
    assert Path("boot.capture").read_text() == "precious"


def test_capturing_by_itself_fails_with_a_message(tmp_path: Path) -> None:
    done = standalone("--output", "nowhere/boot.capture")
    assert (done.returncode, done.stderr.count("\n")) == (ExitCode.OPERATING_ERROR, 1), done.stderr
    assert "nowhere/boot.capture: No such file or directory" in done.stderr
    assert standalone("--output", "x", "--seconds", "nan").returncode == ExitCode.USAGE
    assert standalone("--output", "x", "--pid", str(os.getpid())).returncode == ExitCode.USAGE
    assert left() == []


class FakeCapture:
    """Plays a capture that is there, as if it were live; then ends, or fails."""

    def __init__(self, why: str = "time", error: BaseException | None = None) -> None:
        self._why = why
        self._error = error
        self.config: CaptureConfig | None = None

    def __call__(self, sink: BinaryIO, config: CaptureConfig, listener: Listener) -> Captured:
        self.config = config
        whole = (DATA / "walk.capture").read_bytes()
        for frame in captured.read(io.BytesIO(whole), "walk"):
            if isinstance(frame, Head):
                listener.begins(frame)
            elif isinstance(frame, Page):
                listener.page(frame)
        listener.state(State(1.0, 557, 3))
        sink.write(whole)
        if self._error:
            raise self._error
        return Captured(self._why, 1.0, 557, 3)


def live(monkeypatch: pytest.MonkeyPatch, fake: FakeCapture, *words: str) -> int:
    monkeypatch.setattr(command, "capture", fake)
    return main(["record", *words])


def test_a_live_recording_counts_and_leaves_only_the_recording(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeCapture()
    assert live(monkeypatch, fake, "--seconds", "1", "--no-durations", "--buffer", "1M", "--pid", "7") == 0
    assert fake.config == CaptureConfig(7, 1.0, False, 1 << 20)
    told = capsys.readouterr()
    assert "1 s  182 faults, 3 events LOST" in told.err
    assert "182 stage-2 faults" in told.out
    assert left() == ["faults.parquet"]


@pytest.mark.parametrize(("words", "status"), [((), 0), (("--seconds", "9"), 130)])
def test_ctrl_c_keeps_the_recording(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], status: int
) -> None:
    assert live(monkeypatch, FakeCapture("interrupted"), *words) == status
    assert len(recording.read(Path("faults.parquet"))) == 182


def test_a_full_disk_leaves_what_was_captured_and_says_how_to_read_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = FakeCapture(error=OSError(errno.ENOSPC, "No space left on device"))
    assert live(monkeypatch, full) == ExitCode.OPERATING_ERROR
    assert "record --from faults.parquet.capture" in capsys.readouterr().err
    assert left() == ["faults.parquet.capture"]
    assert main(["record", "--from", "faults.parquet.capture"]) == 0


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_an_end_in_the_middle_says_where_the_capture_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int
) -> None:
    try:
        found = live(monkeypatch, FakeCapture(error=error))
    except SystemExit as leave:
        found = int(str(leave.code))
    assert found == status
    assert "`prefault record --from faults.parquet.capture` reads it" in capsys.readouterr().err
    assert left() == ["faults.parquet.capture"]


def test_a_capture_that_is_still_there_is_not_overwritten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("faults.parquet.capture").write_text("precious")
    assert live(monkeypatch, FakeCapture()) == ExitCode.USAGE
    assert "record --from faults.parquet.capture" in capsys.readouterr().err
    assert Path("faults.parquet.capture").read_text() == "precious"


def test_times_that_are_differences_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        f" CPU 0/KVM 112/112 [000] {delta:.9f}: kvm:kvm_page_fault: "
        f"vcpu 0 rip 0x1 address {page:#x}000 error_code 0x4\n"
        for page, delta in enumerate([0.5, 0.1, 0.3, 0.2, 0.4, 0.1])
    ]
    Path("delta.perf").write_text("".join(lines))
    assert main(["record", "--from", "delta.perf", "-o", "delta.parquet"]) == 0
    assert "--deltatime" in capsys.readouterr().err
