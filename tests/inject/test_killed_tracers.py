# SPDX-License-Identifier: Apache-2.0
"""Whatever ends the tracer, even SIGKILL in the middle of a call: the thread goes on as it was."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.inject import children
from tests.inject.children import pipe, python, wait_for_call

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="arm64 is tested in the lab"),
]

KILLER = Path(__file__).with_name("killed_tracers.py")
ROUNDS = 150


def kill_tracers(pid: int, *words: str, rounds: int = ROUNDS) -> int:
    """Have tracers of a process killed; 0, or 3 if that has ended."""
    return subprocess.run(
        (sys.executable, str(KILLER), str(pid), str(rounds), *words), check=False
    ).returncode


AT_ANY_MOMENT_AND_AFTER_EACH_REQUEST = pytest.mark.parametrize("words", [(), ("each",)], ids=["any", "each"])


@AT_ANY_MOMENT_AND_AFTER_EACH_REQUEST
@pytest.mark.skipif(children.compiler() is None, reason="no C compiler: apt install gcc")
def test_registers_vectors_and_red_zone_are_as_they_were(tmp_path: Path, words: tuple[str, ...]) -> None:
    with children.running(str(children.registers_program(tmp_path))) as child:
        assert kill_tracers(child.pid, *words) == 0
        child.terminate()
        good, bad, _ = map(int, pipe(child.stdout).readline().split())
        assert bad == 0
        assert good > 100


@pytest.mark.skipif(children.compiler() is None, reason="no C compiler: apt install gcc")
def test_without_the_frame_it_would_not_be_so(tmp_path: Path) -> None:
    with children.running(str(children.registers_program(tmp_path))) as child:
        ended = kill_tracers(child.pid, "bare")
        child.terminate()
        line = pipe(child.stdout).readline()
        assert ended != 0 or not line or int(line.split()[1]) > 0


WAITS = """
import select, threading
lock = threading.Lock()
lock.acquire()
ready()
began = time.monotonic()
for _ in range(3):
    {wait}
seconds = time.monotonic() - began
blocked = [int(l.split()[1], 16) for l in open('/proc/self/status') if l.startswith('SigBlk')]
print(json.dumps([seconds, blocked]), flush=True)
"""


@pytest.mark.parametrize(
    "wait",
    ["time.sleep(0.7)", "lock.acquire(timeout=0.7)", "select.select((), (), (), 0.7)"],
    ids=["sleep", "futex", "select"],
)
def test_waits_are_as_long_as_they_must_and_no_signal_stays_blocked(wait: str) -> None:
    """Of a program that goes on waiting after EINTR, as Python does."""
    with python(WAITS.format(wait=wait)) as child:
        began = time.monotonic()
        kill_tracers(child.pid, rounds=60)  # on a busy machine, it is done before they are
        killing = time.monotonic() - began
        seconds, blocked = json.loads(pipe(child.stdout).readline())
        assert blocked == [0]
        # A select does not count the time in which it is stopped; the rest is a busy machine's.
        assert 2.1 <= seconds < 2.1 + killing + 0.5


@AT_ANY_MOMENT_AND_AFTER_EACH_REQUEST
def test_a_read_goes_on(words: tuple[str, ...]) -> None:
    with python("ready()\nprint(os.read(0, 9).decode(), flush=True)") as child:
        wait_for_call(child.pid, 0)
        assert kill_tracers(child.pid, *words) == 0
        threading.Timer(0.05, lambda: (pipe(child.stdin).write("abc"), pipe(child.stdin).flush())).start()
        assert pipe(child.stdout).readline() == "abc\n"
