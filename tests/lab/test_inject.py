# SPDX-License-Identifier: Apache-2.0
"""System calls in threads of arm64 processes, which must not notice; tests/inject has x86-64."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from prefault.lab.job import Job, JobFile, run_job

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

INSIDE = Path(__file__).parent / "inside"
KILLER = Path(__file__).parents[1] / "inject" / "killed_tracers.py"
COMPILER = shutil.which("aarch64-linux-gnu-gcc") or "aarch64-linux-gnu-gcc"
TIMED = ("nanosleep", "clock_nanosleep", "ppoll", "pselect", "futex")
EXACT = ("nanosleep", "clock_nanosleep", "futex")
"""Their end is a time; what ppoll and pselect have left stands still while they are stopped."""
SECONDS = 0.8
RESULTS = {
    "futex": [-1, errno.ETIMEDOUT],
    "read": [3, 0],
    "sigsuspend": [-1, errno.EINTR],
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    program = tmp_path_factory.mktemp("registers") / "registers"
    subprocess.run([COMPILER, "-O1", "-static", "-o", program, INSIDE / "registers.c"], check=True)
    files = {
        "/inject.py": JobFile((INSIDE / "inject.py").read_bytes()),
        "/killed_tracers.py": JobFile(KILLER.read_bytes()),
        "/registers": JobFile(program.read_bytes(), 0o755),
    }
    result = run_job(Job(("python3", "/inject.py"), files, timeout=200))
    assert result.status == 0, result.stderr.decode()
    return {one["name"]: one for one in map(json.loads, result.stdout.splitlines())}


@pytest.mark.parametrize("name", [*TIMED, "read", "sigsuspend"])
def test_a_wait_goes_on_and_ends_as_it_would_have(told: Mapping[str, Any], name: str) -> None:
    one = told[name]
    assert one["pids"] == [one["pid"]]
    assert one["told"][:2] == RESULTS.get(name, [0, 0])
    if name in TIMED:
        assert one["told"][2] >= SECONDS


@pytest.mark.parametrize("name", EXACT)
def test_a_wait_ends_at_its_time(told: Mapping[str, Any], name: str) -> None:
    assert told[name]["told"][2] < SECONDS + 0.5


def test_signals_that_come_meanwhile_are_delivered_afterwards_once(told: Mapping[str, Any]) -> None:
    assert told["signals"]["results"] == [0] * 5  # none was interrupted
    assert told["signals"]["told"] == [5, [0]]


def test_registers_flags_and_vectors_are_as_they_were(told: Mapping[str, Any]) -> None:
    good, bad, _ = told["registers"]["told"]
    assert told["registers"]["results"] == [0]
    assert bad == 0
    assert good > 100


def test_a_thread_whose_tracers_are_killed_has_its_registers(told: Mapping[str, Any]) -> None:
    good, bad, _ = told["killed registers"]["told"]
    assert (told["killed registers"]["status"], bad) == (0, 0)
    assert good > 100


def test_a_wait_whose_tracers_are_killed_goes_on_and_no_signal_stays_blocked(told: Mapping[str, Any]) -> None:
    assert told["killed wait"]["status"] == 0
    assert told["killed wait"]["told"] == [5, [0], "abc\n"]
