# SPDX-License-Identifier: Apache-2.0
"""Whether a process may be touched at all; asked before anything is done to it.

Source: __ptrace_may_access(), Documentation/admin-guide/LSM/Yama.rst, seccomp(2)
"""

from __future__ import annotations

import os
from pathlib import Path

from prefault.errors import NotTraceable, UsageError
from prefault.faults.capture import check_process, threads_of

PROC = Path("/proc")
CGROUPS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
_CAP_SYS_PTRACE = 19
_CAP_SYS_ADMIN = 21
_FILTER = "2"
_ELF32 = 1


def status(pid: int, tid: int | None = None) -> dict[str, str]:
    """/proc/PID/status, or a thread's, as a mapping; empty if it is gone."""
    folder = PROC / str(pid) if tid is None else PROC / str(pid) / "task" / str(tid)
    try:
        lines = (folder / "status").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def check(pid: int, *, allow_seccomp: bool) -> None:
    """Refuse a process that cannot be worked on, or not without harm.

    :raises UsageError: it is not there, no VMM, or in no state for this
    :raises NotTraceable: it may not be traced, by whatever rule there is
    """
    if pid == os.getpid():
        raise UsageError("a process cannot trace itself; use prefault.inject.apply.apply() in one's own VMM")
    about = status(pid)
    if not about:
        raise UsageError(f"there is no process {pid}")
    if has_ended(about):
        _refuse_ended(pid)
    if about.get("Tgid") != str(pid):
        raise UsageError(f"{pid} is a thread of process {about.get('Tgid')}: give that process")
    check_rights(pid, about)
    check_process(pid)
    check_word_size(pid)
    if allow_seccomp:
        check_suspending()
    for tid in threads_of(pid):
        check_frozen(pid, tid)
        _check_thread(pid, tid, allow_seccomp=allow_seccomp)


def _refuse_ended(pid: int) -> None:
    alive = [tid for tid in threads_of(pid) if not has_ended(status(pid, tid))]
    if alive:
        raise UsageError(
            f"the main thread of process {pid} has ended, and {len(alive)} more go on: neither memory nor "
            "descriptors of such a process can be seen"
        )
    raise UsageError(f"process {pid} has ended, and its parent has not yet taken note (a zombie)")


def has_ended(about: dict[str, str]) -> bool:
    """Whether a process is gone, or a zombie."""
    return about.get("State", "X").startswith(("Z", "X"))


def check_rights(pid: int, about: dict[str, str]) -> None:
    """Refuse a process of somebody else."""
    mine = status(os.getpid())
    if _has(mine, _CAP_SYS_PTRACE):
        return
    own = (mine["Uid"].split()[1], mine["Gid"].split()[1])
    if {*about["Uid"].split()[:3]} != {own[0]} or {*about["Gid"].split()[:3]} != {own[1]}:
        raise NotTraceable(
            f"process {pid} is of another user (uid {about['Uid'].split()[0]}), and this one has no "
            "CAP_SYS_PTRACE: run as that user, or as root"
        )
    scope = _yama()
    if scope:
        who = (
            "nobody may trace"
            if scope > 2
            else "only who has CAP_SYS_PTRACE may trace a process not its child; run as root, or set it to 0"
        )
        raise NotTraceable(f"kernel.yama.ptrace_scope is {scope}: {who}")
    if not os.access(PROC / str(pid) / "mem", os.R_OK | os.W_OK):
        raise NotTraceable(f"process {pid} is not dumpable, so only CAP_SYS_PTRACE may trace it: run as root")


def check_suspending() -> None:
    """Refuse to suspend seccomp filters where the kernel will."""
    mine = status(os.getpid())
    if not _has(mine, _CAP_SYS_ADMIN):
        raise NotTraceable("a seccomp filter can be suspended with CAP_SYS_ADMIN only: run as root")
    if mine.get("Seccomp", "0") != "0":
        raise NotTraceable(
            "prefault itself has a seccomp filter, as everything in a container has, and who has one may not "
            "suspend another's: run it outside, or the container with seccomp=unconfined"
        )


def check_frozen(pid: int, tid: int) -> None:
    """Refuse a thread that is frozen: what it is stopped for, it does not go on to do."""
    try:
        lines = (PROC / str(pid) / "task" / str(tid) / "cgroup").read_text(errors="replace").split("\n")
    except OSError:
        return
    for path in (line[len("0::/") :] for line in lines if line.startswith("0::/")):
        for folder in (root / path for root in CGROUPS):
            if _reads(folder / "cgroup.freeze", "1") or _reads(folder / "cgroup.events", "frozen 1"):
                raise UsageError(f"process {pid} is frozen (cgroup /{path}): thaw it first")


def _reads(path: Path, line: str) -> bool:
    try:
        return line in path.read_text().splitlines()
    except OSError:
        return False


def _yama() -> int:
    try:
        return int((PROC / "sys/kernel/yama/ptrace_scope").read_text())
    except OSError:
        return 0


def _has(about: dict[str, str], capability: int) -> bool:
    return bool(int(about["CapEff"], 16) >> capability & 1)


def check_word_size(pid: int) -> None:
    """Refuse a 32-bit program."""
    try:
        with (PROC / str(pid) / "exe").open("rb") as file:
            head = file.read(5)
    except OSError:
        return  # deleted, or on a file system that is gone; the registers' size tells later
    if head[:4] == b"\x7fELF" and head[4] == _ELF32:
        raise NotTraceable(f"process {pid} is a 32-bit program: its system calls are others")


def _check_thread(pid: int, tid: int, *, allow_seccomp: bool) -> None:
    about = status(pid, tid)
    if about.get("TracerPid", "0") != "0":
        raise NotTraceable(
            f"thread {tid} of process {pid} is traced by process {about['TracerPid']}, and a thread has one "
            "tracer at most: end that one (a debugger, strace) first"
        )
    if about.get("Seccomp") == _FILTER and not allow_seccomp:
        raise NotTraceable(
            f"thread {tid} of process {pid} has a seccomp filter, which may kill the VMM for a system call "
            "that it does not expect; --allow-seccomp suspends the filter while a thread is stopped"
        )
