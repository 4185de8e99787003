# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from prefault.errors import LabError, ToolMissing
from prefault.lab import process


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_an_interrupted_block_ends_the_whole_group() -> None:
    script = "sleep 60 & echo $!; wait"
    with (
        pytest.raises(KeyboardInterrupt),
        process.running(["sh", "-c", script], stdout=subprocess.PIPE) as child,
    ):
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        assert alive(grandchild)
        raise KeyboardInterrupt
    time.sleep(0.1)
    assert not alive(grandchild)
    assert not alive(child.pid)


def test_an_interruption_while_a_program_starts_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = os.getpid()
    note = tmp_path / "pid"

    def interrupt_before_exec() -> None:
        note.write_text(str(os.getpid()))
        os.kill(parent, signal.SIGINT)

    monkeypatch.setattr(process, "_die_with_parent", interrupt_before_exec)
    with pytest.raises(KeyboardInterrupt), process.running(["sleep", "60"]):
        pytest.fail("the block was entered all the same")
    assert not alive(int(note.read_text()))


def test_a_child_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    pid = os.fork()
    if pid == 0:
        with process.running(["sleep", "60"]) as child:
            note.write_text(str(child.pid))
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    time.sleep(0.1)
    assert not alive(int(note.read_text()))


def test_output_comes_by_line_and_as_a_whole() -> None:
    lines: list[str] = []
    status, output = process.run(["sh", "-c", "echo a; echo b >&2; exit 3"], on_line=lines.append)
    assert (status, output, lines) == (3, "a\nb\n", ["a", "b"])


def test_a_failure_quotes_the_command_and_its_last_lines() -> None:
    with pytest.raises(LabError, match=r"(?s)`sh -c 'echo why; exit 3'` ended with status 3:\nwhy"):
        process.check(["sh", "-c", "echo why; exit 3"])


def test_a_program_that_is_not_there_is_a_missing_tool() -> None:
    with pytest.raises(ToolMissing, match=r"no-such-program is not installed.*lab doctor"):
        process.run(["no-such-program"])
