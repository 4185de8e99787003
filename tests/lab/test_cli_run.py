# SPDX-License-Identifier: Apache-2.0
"""``prefault run`` and the program in the library's page, for real."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefault.lab.job import Job, run_job

pytestmark = pytest.mark.lab

TOP = Path(__file__).parents[2]
PREFAULT = (sys.executable, "-m", "prefault")


def run(*options: str) -> dict[str, dict[str, dict[str, int]]]:
    """``prefault run --json`` with options; its object."""
    command = (*PREFAULT, "run", "--machine", "lab", "--json", "--size", "4M", *options)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert isinstance(found, dict)
    return found


def faults(found: dict[str, dict[str, dict[str, int]]], which: str) -> int:
    """Stage-2 faults on memory of one of the two walks."""
    kinds = found[which]["faults"]
    return kinds["read"] + kinds["write"] + kinds["execute"]


@pytest.mark.parametrize("backing", ["private", "shared"])
def test_pre_faulted_pages_cost_the_guest_no_fault(backing: str) -> None:
    found = run("--backing", backing)
    assert faults(found, "without") == 1024
    assert faults(found, "with_prefault") == 0
    assert found["with_prefault"]["leaves"] == found["without"]["leaves"] == {"3": 1024}


def test_blocks_stay_blocks() -> None:
    found = run("--backing", "thp")
    assert faults(found, "with_prefault") == 0
    assert found["with_prefault"]["leaves"] == found["without"]["leaves"] == {"2": 2}


def test_half_pre_faulted_leaves_half_of_the_faults() -> None:
    assert faults(run("--prefault", "50"), "with_prefault") == 512


def test_an_l2_stopped_in_an_exit_is_pre_faulted_into_the_canonical_table_only() -> None:
    found = run("--nested", "--when", "while-running")
    # L2 takes a fault per page for its shadow table either way; L1 is spared its own.
    assert faults(found, "without") == 2 * 1024
    assert faults(found, "with_prefault") == 1024
    assert found["with_prefault"]["shadow_leaves"] == found["without"]["shadow_leaves"]


def test_two_runs_count_the_same_instructions() -> None:
    first, second = run(), run()
    for which in ("without", "with_prefault"):
        assert first[which]["walk_ns"] == pytest.approx(second[which]["walk_ns"], rel=0.02)


def test_copy_on_write_memory_faults_again_when_written() -> None:
    found = run("--resident", "nothing", "--writes", "100")
    assert found["with_prefault"]["faults"]["permission"] == 1024


def is_machine(pid: str) -> bool:
    """Whether a process is QEMU; between fork and exec it is still Python."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("qemu")
    except OSError:
        return False


def test_an_interrupted_run_leaves_no_machine_behind() -> None:
    argv = (*PREFAULT, "run", "--machine", "lab", "--size", "256M")
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as command:
        children = Path(f"/proc/{command.pid}/task/{command.pid}/children")
        deadline = time.monotonic() + 60
        machines: list[str] = []
        while not any(is_machine(pid) for pid in machines) and time.monotonic() < deadline:
            time.sleep(0.1)
            machines = children.read_text().split()
        assert any(is_machine(pid) for pid in machines)
        command.send_signal(signal.SIGINT)
        assert command.wait(30) == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in machines)


def test_the_program_in_the_librarys_page_prints_what_the_page_says() -> None:
    page = (TOP / "docs/library.md").read_text()
    program = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    printed = re.search(r"this prints\n\n```\n(.*?)```", page, re.DOTALL)
    assert program
    assert printed
    result = run_job(Job(("python3", "/root/example.py"), files={"/root/example.py": program[1].encode()}))
    assert (result.status, result.stdout.decode()) == (0, printed[1]), result.stderr.decode()
