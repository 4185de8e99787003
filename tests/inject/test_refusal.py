# SPDX-License-Identifier: Apache-2.0
"""What is refused before anything is touched, and with which reason."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefault.errors import NotTraceable, ProcessLost, UsageError
from prefault.inject import refusal
from prefault.inject.apply import Process
from tests.inject.children import python
from tests.inject.test_tracee import FILTER, traced

pytestmark = pytest.mark.timeout(60)
NOBODY = 65534


@pytest.fixture
def any_process_is_a_vmm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "check_process", lambda _: None)


def test_no_such_process() -> None:
    with pytest.raises(UsageError, match="there is no process 4000000"):
        refusal.check(4_000_000, allow_seccomp=False)


def test_oneself() -> None:
    with pytest.raises(UsageError, match="cannot trace itself"):
        refusal.check(os.getpid(), allow_seccomp=False)


def test_a_process_without_a_vm() -> None:
    with python("ready(); sys.stdin.read()") as child, pytest.raises(UsageError, match="has no VM"):
        refusal.check(child.pid, allow_seccomp=False)


def test_a_zombie() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    end = time.monotonic() + 10
    while not refusal.status(child.pid)["State"].startswith("Z"):
        assert time.monotonic() < end
        time.sleep(0.01)
    with pytest.raises(UsageError, match="zombie"):
        refusal.check(child.pid, allow_seccomp=False)
    child.wait()


@pytest.mark.usefixtures("any_process_is_a_vmm")
def test_a_thread_in_the_place_of_a_process() -> None:
    code = (
        "import threading\nt = threading.Thread(target=sys.stdin.read, daemon=True); t.start()\n"
        "ready(); print(t.native_id, flush=True); t.join()"
    )
    with python(code) as child:
        assert child.stdout is not None
        tid = int(child.stdout.readline())
        with pytest.raises(UsageError, match=f"is a thread of process {child.pid}"):
            refusal.check(tid, allow_seccomp=False)


@pytest.mark.usefixtures("any_process_is_a_vmm")
def test_another_tracer_is_named() -> None:
    with (
        python("ready(); sys.stdin.read()") as child,
        traced(child.pid),
        pytest.raises(NotTraceable, match=r"is traced by process \d+"),
    ):
        refusal.check(child.pid, allow_seccomp=False)


@pytest.mark.usefixtures("any_process_is_a_vmm")
def test_a_seccomp_filter_is_refused_unless_it_may_be_suspended() -> None:
    with python(FILTER) as child:
        with pytest.raises(NotTraceable, match="seccomp filter, which may kill"):
            refusal.check(child.pid, allow_seccomp=False)
        if os.geteuid() == 0:
            refusal.check(child.pid, allow_seccomp=True)
        else:
            with pytest.raises(NotTraceable, match="CAP_SYS_ADMIN"):
                refusal.check(child.pid, allow_seccomp=True)


def test_who_has_a_filter_may_not_suspend_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As everything in a container."""
    me = tmp_path / str(os.getpid())
    me.mkdir()
    monkeypatch.setattr(refusal, "PROC", tmp_path)
    for capabilities, mode, said in ((0, 0, "CAP_SYS_ADMIN"), (1 << 21, 2, "prefault itself has a seccomp")):
        (me / "status").write_text(f"CapEff:\t{capabilities:016x}\nSeccomp:\t{mode}\n")
        with pytest.raises(NotTraceable, match=said):
            refusal.check_suspending()
    (me / "status").write_text(f"CapEff:\t{1 << 21:016x}\nSeccomp:\t0\n")
    refusal.check_suspending()


@pytest.mark.parametrize(
    ("file", "text"), [("cgroup.freeze", "1\n"), ("cgroup.events", "populated 1\nfrozen 1\n")]
)
def test_a_frozen_process(file: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "7/task/8").mkdir(parents=True)
    (tmp_path / "7/task/8/cgroup").write_text("2:cpu:/\n0::/vms/one\n")
    (tmp_path / "vms/one").mkdir(parents=True)
    monkeypatch.setattr(refusal, "PROC", tmp_path)
    monkeypatch.setattr(refusal, "CGROUPS", (tmp_path / "none", tmp_path))
    refusal.check_frozen(7, 8)
    (tmp_path / "vms/one" / file).write_text(text.replace("1\n", "0\n"))
    refusal.check_frozen(7, 8)
    (tmp_path / "vms/one" / file).write_text(text)
    with pytest.raises(UsageError, match=r"is frozen .cgroup /vms/one."):
        refusal.check_frozen(7, 8)


@pytest.mark.usefixtures("any_process_is_a_vmm")
def test_a_process_whose_main_thread_has_ended() -> None:
    code = (
        "import threading; t = threading.Thread(target=sys.stdin.read); t.start(); ready()\n"
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    with python(code) as child:
        end = time.monotonic() + 10
        while not refusal.status(child.pid)["State"].startswith("Z"):
            assert time.monotonic() < end
            time.sleep(0.01)
        with pytest.raises(UsageError, match=r"main thread of process .* has ended, and 1 more go on"):
            refusal.check(child.pid, allow_seccomp=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_process_of_another_user() -> None:
    code = (
        "import os, sys\nfrom prefault.inject import refusal\nfrom prefault.errors import NotTraceable\n"
        f"os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "try:\n    refusal.check(int(sys.argv[1]), allow_seccomp=False)\n"
        "except NotTraceable as error:\n    print(error)\n"
    )
    with python("ready(); sys.stdin.read()") as child:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
        said = subprocess.run(
            [sys.executable, "-c", code, str(child.pid)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
    assert "is of another user (uid 0)" in said
    assert "CAP_SYS_PTRACE" in said


@pytest.mark.parametrize(("scope", "said"), [(1, "only who has CAP_SYS_PTRACE"), (3, "nobody may trace")])
def test_yama(scope: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc as it is where Yama is: that of this machine need not have it."""
    (tmp_path / "sys/kernel/yama").mkdir(parents=True)
    (tmp_path / "sys/kernel/yama/ptrace_scope").write_text(f"{scope}\n")
    me = tmp_path / str(os.getpid())
    me.mkdir()
    (me / "status").write_text("Uid:\t7\t7\t7\t7\nGid:\t7\t7\t7\t7\nCapEff:\t0000000000000000\n")
    monkeypatch.setattr(refusal, "PROC", tmp_path)
    with pytest.raises(NotTraceable, match=said):
        refusal.check_rights(99, {"Uid": "7 7 7 7", "Gid": "7 7 7 7"})


@pytest.mark.usefixtures("any_process_is_a_vmm")
def test_a_32_bit_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "77").mkdir()
    (tmp_path / "77/exe").write_bytes(b"\x7fELF\x01\x01\x01")
    monkeypatch.setattr(refusal, "PROC", tmp_path)
    with pytest.raises(NotTraceable, match="32-bit"):
        refusal.check_word_size(77)


UNNAMEABLE = b"vcpu \xc3\x9c\xff\x85 0"
"""A name of 15 bytes is cut off where it is, in the middle of a character, too."""


@pytest.mark.usefixtures("any_process_is_a_vmm")
def test_a_thread_may_have_any_name() -> None:
    code = f"import ctypes; ctypes.CDLL(None).prctl(15, {UNNAMEABLE!r}, 0, 0, 0); ready(); sys.stdin.read()"
    with python(code) as child:
        refusal.check(child.pid, allow_seccomp=False)
        assert not refusal.has_ended(refusal.status(child.pid))


@pytest.mark.usefixtures("any_process_is_a_vmm")
def test_a_vmm_that_ends_after_it_was_looked_at_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "check", lambda *_, **__: None)
    with pytest.raises(ProcessLost, match="4000000 ended before anything was done"):
        Process(4_000_000)
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()  # its number is not given to another in so short a time
        with pytest.raises(ProcessLost, match="ended"):
            Process(child.pid)
