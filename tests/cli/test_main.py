# SPDX-License-Identifier: Apache-2.0
"""The frame: what each way to end becomes."""

from __future__ import annotations

import errno
import importlib.abc
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from prefault import __version__
from prefault.__main__ import run
from prefault.cli import output
from prefault.cli.interrupt import INTERRUPTED
from prefault.cli.main import BROKEN_PIPE, main, root
from prefault.errors import (
    CapabilityMissing,
    JobTimeout,
    KvmError,
    LabLost,
    Mismatch,
    PrefaultError,
    Splat,
    UsageError,
)

Plant = Callable[[Callable[[], None]], None]


@pytest.fixture
def plant() -> Iterator[Plant]:
    """Adds the subcommand ``planted``, which calls what it is given."""

    def add(body: Callable[[], None]) -> None:
        @click.command()
        @click.option("--number", type=int)
        @output.json_option
        def planted(number: int | None) -> None:
            body()

        root.add_command(planted)

    terminate = signal.getsignal(signal.SIGTERM)
    yield add
    signal.signal(signal.SIGTERM, terminate)
    root.commands.pop("planted", None)


def raising(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Mismatch("wrong byte"), 1),
        (Splat("WARNING"), 1),
        (UsageError("cannot be"), 2),
        (KvmError("KVM_RUN", 14), 3),
        (CapabilityMissing("no capability"), 77),
        (JobTimeout("too long"), 124),
        (LabLost("panic"), 125),
    ],
)
def test_an_error_becomes_its_message_and_its_exit_code(
    plant: Plant, capsys: pytest.CaptureFixture[str], error: PrefaultError, status: int
) -> None:
    plant(raising(error))
    assert main(["planted"]) == status
    printed = capsys.readouterr()
    assert printed.err == f"prefault: {error}\n"
    assert printed.out == ""


def test_an_error_under_json_is_one_object_with_its_attributes(
    plant: Plant, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(raising(KvmError("KVM_PRE_FAULT_MEMORY", 2, gpa=0x1000, size=0x2000)))
    assert main(["planted", "--json"]) == 3
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["version"], found["command"]) == (1, "planted")
    assert found["error"]["type"] == "KvmError"
    assert (found["error"]["errno"], found["error"]["gpa"], found["error"]["size"]) == (2, 0x1000, 0x2000)
    assert found["error"]["exit_code"] == 3
    assert "KVM_PRE_FAULT_MEMORY" in printed.err


def test_an_attribute_that_json_cannot_hold_is_left_out(
    plant: Plant, capsys: pytest.CaptureFixture[str]
) -> None:
    error = LabLost("gone")
    error.process = object()  # type: ignore[attr-defined]  # as an error with a live object would have it
    plant(raising(error))
    assert main(["planted", "--json"]) == 125
    assert "process" not in json.loads(capsys.readouterr().out)["error"]


def test_an_unexpected_exception_shows_its_traceback(
    plant: Plant, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(raising(ZeroDivisionError("a bug")))
    assert main(["planted", "--json"]) == 3
    printed = capsys.readouterr()
    assert "Traceback" in printed.err
    assert json.loads(printed.out)["error"]["type"] == "ZeroDivisionError"


def test_a_full_disk_is_a_message_and_no_traceback(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    plant(raising(OSError(errno.ENOSPC, "No space left on device", "cache/Image")))
    assert main(["planted", "--json"]) == 3
    printed = capsys.readouterr()
    assert printed.err.startswith("prefault: No space left on device: cache/Image; ")
    assert json.loads(printed.out)["error"]["errno"] == errno.ENOSPC


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", ["'--help'", "'probe', '--json'"])
def test_a_full_standard_output_is_a_message_and_no_traceback(words: str) -> None:
    program = f"import sys; from prefault.cli.main import main; sys.exit(main([{words}]))"
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", program]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 3
    assert "prefault: No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_ends_as_a_shell_expects(
    plant: Plant, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    plant(raising(error))
    assert main(["planted"]) == INTERRUPTED == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["planted", "--number", "x"], ["planted", "--nothing"], ["planted", "more"]]
)
def test_wrong_usage_is_exit_2_and_an_object_under_json(
    plant: Plant, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    plant(raising(AssertionError("not reached")))
    assert main(words) == 2
    assert capsys.readouterr().out == ""
    assert main([*words, "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["type"] == "UsageError"
    assert "planted" in printed.err


def test_no_subcommand_is_wrong_usage_and_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "probe" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_notes_of_an_error_are_shown(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    error = LabLost("gone")
    error.add_note("last line of the console")
    plant(raising(error))
    main(["planted"])
    assert "last line of the console" in capsys.readouterr().err


def test_a_reader_that_went_away_is_no_traceback() -> None:
    program = "import sys; from prefault.cli.main import main; sys.exit(main(['run', '--help']))"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (BROKEN_PIPE, b"")


def test_a_terminated_command_cleans_up(tmp_path: Path) -> None:
    program = f"""
import sys, time
from pathlib import Path
from prefault.cli.main import main, root
import click

@click.command()
def sleep():
    try:
        Path({str(tmp_path / "started")!r}).touch()
        while True:  # a signal that comes just before a sleep begins does not end it
            time.sleep(0.1)
    finally:
        Path({str(tmp_path / "cleaned")!r}).touch()

root.add_command(sleep)
sys.exit(main(["sleep"]))
"""
    with subprocess.Popen([sys.executable, "-c", program]) as child:
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        child.terminate()
        assert child.wait(30) == 128 + signal.SIGTERM
    assert (tmp_path / "cleaned").exists()


class InterruptsImports(importlib.abc.MetaPathFinder):
    """Ctrl-C, at the moment that a module is looked for."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "prefault.cli.main":
            raise KeyboardInterrupt


def test_ctrl_c_while_it_begins_has_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "prefault.cli.main")
    monkeypatch.setattr(sys, "meta_path", [InterruptsImports(), *sys.meta_path])
    assert run() == 128 + signal.SIGINT
    assert capsys.readouterr().err == "prefault: interrupted\n"


def test_the_installed_command_is_the_module() -> None:
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        scripts = tomllib.load(file)["project"]["scripts"]
    assert scripts == {"prefault": f"{run.__module__}:{run.__name__}"}
