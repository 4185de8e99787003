# SPDX-License-Identifier: Apache-2.0
"""The lab's own promises: what comes back, and how each way to fail is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefault.errors import JobTimeout, LabLost
from prefault.lab import job as lab_job
from prefault.lab.frames import Kind
from prefault.lab.job import Job, JobFile, JobSplat, run_job
from prefault.lab.machine import MODES, MachineOptions

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

CRASH = "/sys/kernel/debug/provoke-crash/DIRECT"


def provoke(what: str) -> Job:
    """A job that makes the kernel misbehave."""
    code = f"import time; open({CRASH!r}, 'w').write({what!r}); time.sleep(20)"
    return Job(("python3", "-c", code), timeout=60)


def provoke_once(what: str) -> Job:
    """A job that goes on after the kernel misbehaved."""
    code = f"open({CRASH!r}, 'w').write({what!r}); print('went on')"
    return Job(("python3", "-c", code), timeout=60)


def test_an_empty_job_is_back_within_five_seconds() -> None:
    run_job(Job(("true",)))  # the root file system may have to be read from disk the first time
    assert min(run_job(Job(("true",))).seconds for _ in range(2)) <= 5


def test_status_output_and_files_come_back() -> None:
    script = b"""#!/bin/sh
cat /data/in
echo err >&2
mkdir -p /tmp/o/d
head -c 3000000 /dev/zero >/tmp/o/d/z
exit 7
"""
    pieces: list[tuple[Kind, bytes]] = []
    result = run_job(
        Job(
            ("/data/run",),
            {"/data/run": JobFile(script, 0o755), "/data/in": b"hello\n"},
            collect=("/tmp/o", "/nowhere"),
        ),
        on_output=lambda kind, piece: pieces.append((kind, piece)),
    )
    assert (result.status, result.stdout, result.stderr) == (7, b"hello\n", b"err\n")
    assert result.files == {"/tmp/o/d/z": bytes(3000000)}
    assert set(pieces) == {(Kind.STDOUT, b"hello\n"), (Kind.STDERR, b"err\n")}
    assert "Run /init as init process" in result.kernel_log
    kept = {path.name for path in result.run_dir.iterdir()}
    assert {"command", "console.log", "kernel.log"} <= kept
    assert "initrd.cpio" not in kept


def test_the_package_is_there_without_what_needs_more_than_the_standard_library() -> None:
    modules = "prefault.abi, prefault.errors, prefault.guest.program, prefault.kvm, prefault.machine"
    assert run_job(Job(("python3", "-c", f"import {modules}"))).stderr == b""
    assert run_job(Job(("python3", "-c", "import prefault.cli"))).status == 1


@pytest.mark.parametrize("mode", MODES)
def test_kvm_comes_up_in_the_mode_asked_for(mode: str) -> None:
    says = {"nested": "VHE+NV2 mode", "protected": "Protected hVHE mode", "nvhe": "Hyp nVHE mode"}
    result = run_job(Job(("test", "-c", "/dev/kvm")), MachineOptions(mode=mode))
    assert result.status == 0
    assert f"{says[mode]} initialized successfully" in result.kernel_log


def test_memory_cpus_and_kernel_arguments_arrive() -> None:
    script = "nproc; cat /proc/cmdline; grep MemTotal /proc/meminfo"
    options = MachineOptions(memory_mib=512, cpus=3, append=("hello=world",))
    cpus, arguments, memory = run_job(Job(("sh", "-c", script)), options).stdout.decode().splitlines()
    assert cpus == "3"
    assert "hello=world" in arguments.split()
    assert 400_000 < int(memory.split()[1]) < 512 * 1024


REPEATS = b"""
import time

def once():
    start = time.monotonic_ns()
    sum(range(100000))
    return time.monotonic_ns() - start

# The least of some: now and then the lab's own pulse falls into one of them.
print(min(once() for _ in range(10)))
"""


def test_under_icount_a_run_costs_the_same_every_time() -> None:
    job = Job(("python3", "/repeats.py"), {"/repeats.py": REPEATS})
    first, second = (int(run_job(job, MachineOptions(icount=True)).stdout) for _ in range(2))
    assert abs(first - second) < first / 1000


def test_a_warning_in_the_kernel_fails_a_job_that_went_well() -> None:
    with pytest.raises(JobSplat) as caught:
        run_job(provoke_once("WARNING"))
    assert any(line.startswith("WARNING: ") for line in caught.value.lines)
    assert (caught.value.result.status, caught.value.result.stdout) == (0, b"went on\n")


def test_a_bug_in_the_kernel_is_a_splat() -> None:
    with pytest.raises(JobSplat, match="kernel BUG at"):
        run_job(provoke_once("BUG"))


def test_a_panic_is_a_lost_lab_and_the_console_is_quoted() -> None:
    began = time.monotonic()
    with pytest.raises(LabLost, match=r"(?s)ended with QEMU's status.*Kernel panic - not syncing"):
        run_job(provoke("PANIC"))
    assert time.monotonic() - began < 30


def test_a_hang_is_a_lost_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lab_job._PULSE, False, lab_job._Pulse(1, 6))
    with pytest.raises(LabLost, match="no sign of life for 6 s"):
        run_job(provoke("HARDLOCKUP"), MachineOptions(cpus=1))


def test_a_silent_job_that_lives_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lab_job._PULSE, False, lab_job._Pulse(1, 4))
    assert run_job(Job(("sleep", "8"))).status == 0


def test_a_job_over_its_time_is_a_timeout() -> None:
    with pytest.raises(JobTimeout, match=r"`sleep 60` is not done after 1 s"):
        run_job(Job(("sleep", "60"), timeout=1))


def test_a_machine_that_does_not_start_is_lost_with_qemus_own_words() -> None:
    with pytest.raises(LabLost, match=r"(?s)ended with QEMU's status 1.*memory"):
        run_job(Job(("true",)), MachineOptions(memory_mib=1 << 40))


def test_a_kernel_that_is_none_is_a_lost_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_job, "BOOT_SECONDS", 3.0)
    (tmp_path / "Image").write_bytes(b"not a kernel" * 1000)
    with pytest.raises(LabLost, match=r"did not come up|QEMU's status"):
        run_job(Job(("true",)), kernel=tmp_path / "Image")


def children_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in children.split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_machine_running(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "long.py"
    script.write_text("import time\nprint('started', flush=True)\ntime.sleep(100)\n")
    command = [sys.executable, "-m", "prefault", "lab", "run", str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"started\n"
        machines = children_of(run.pid)
        assert len(machines) == 1
        os.kill(run.pid, number)
        run.wait(20)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{machines[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{machines[0]}").exists()
