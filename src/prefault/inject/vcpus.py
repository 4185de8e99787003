# SPDX-License-Identifier: Apache-2.0
"""The vCPUs of a process that is not one's own, and the threads that run them.

A thread that is in KVM_RUN says so in /proc, with the descriptor, unless it is in the guest at that moment:
"running". So /proc is watched for a while; then threads that run at the moment are stopped once, and their
registers tell; and last, of a guest that is paused, names count ("CPU 0/KVM", "fc_vcpu 0", "vcpu0").
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prefault.abi import ioctls
from prefault.errors import UsageError
from prefault.faults.capture import threads_of
from prefault.inject import cpu

PROC = Path("/proc")

WATCH_S = 0.25
_LOOK_S = 0.002
SEARCH_S = 10.0
"""The longest that threads are looked at, of a process in which something else is always at work."""
_ASK_TIMES = 3
"""How often one thread is stopped to be asked: each time may cost a thread that runs no vCPU an EINTR."""
_QUIET_LOOKS = 100
"""After so many in a row that see nobody at work, the guest is paused."""
_USER_WORKER = 0x4000 | 0x10
"""PF_USER_WORKER and PF_IO_WORKER (include/linux/sched.h): the kernel's own threads in a process.

KVM on x86 has one for each VM. Its registers are a copy of those of the thread that made it, so that it
seems to be in KVM_RUN.
"""
_VCPU = re.compile(r"anon_inode:kvm-vcpu:(\d+)")
_NAME = re.compile(r"CPU (\d+)/KVM|(?:fc_vcpu |crosvm_vcpu|kvm-vcpu-|vcpu[ _:-]?)(\d+)")
"""QEMU's, Firecracker's, crosvm's, kvmtool's; Cloud Hypervisor's, and others like it."""


@dataclass(frozen=True)
class Descriptors:
    """A process's descriptors of one VM.

    :ivar vm: of the VM
    :ivar vcpus: of each vCPU, by its index
    """

    vm: int
    vcpus: dict[int, int]

    @property
    def index_of(self) -> dict[int, int]:
        """The index of each vCPU, by its descriptor."""
        return {fd: index for index, fd in self.vcpus.items()}


@dataclass(frozen=True)
class VcpuThread:
    """A vCPU, and the thread that runs it.

    :ivar certain: the kernel has said so; otherwise it has only the name
    """

    index: int
    fd: int
    tid: int
    certain: bool

    @property
    def run_fd(self) -> int:
        """What an interrupted KVM_RUN of this thread may go on with; -1 if that is not certain."""
        return self.fd if self.certain else -1


def descriptors(pid: int) -> Descriptors:
    """Those of a process.

    :raises OSError: they may not be seen
    :raises UsageError: it has no VM with vCPUs, or more than one
    """
    vms, vcpus = [], dict[int, list[int]]()
    for link in sorted((PROC / str(pid) / "fd").iterdir(), key=lambda one: int(one.name)):
        try:
            target = str(link.readlink())
        except FileNotFoundError:
            continue
        if target == "anon_inode:kvm-vm":
            vms.append(int(link.name))
        elif found := _VCPU.fullmatch(target):
            vcpus.setdefault(int(found[1]), []).append(int(link.name))
    if not vms or not vcpus:
        raise UsageError(f"process {pid} has no VM with vCPUs")
    if any(len(fds) > 1 for fds in vcpus.values()):
        raise UsageError(f"process {pid} has more than one VM: which of them the plan is for cannot be told")
    return Descriptors(vms[0], {index: fds[0] for index, fds in sorted(vcpus.items())})


def running(text: str) -> int:
    """The vCPU descriptor that a thread is in KVM_RUN with, from its /proc/…/syscall; -1 for none."""
    words = text.split()
    if len(words) < 3 or words[0] != str(cpu.host().ioctl) or int(words[2], 16) != ioctls.KVM_RUN:
        return -1
    return int(words[1], 16)


def find(
    pid: int,
    known: Descriptors,
    ask: Callable[[int], int] | None,
    wanted: Callable[[], bool] = lambda: False,
) -> list[VcpuThread]:
    """The vCPUs whose threads can be told.

    :param ask: stops a thread and says which vCPU it was running, -1 for none; None: stop none
    :param wanted: asked now and then; True ends the search
    """
    seen = _watched(pid, known, wanted)
    if ask is not None:
        _ask_busy(pid, known, seen, ask, wanted)
    taken = set(seen.values())
    named = {
        index: tid for index, tid in _named(pid, known).items() if index not in seen and tid not in taken
    }
    found = [VcpuThread(index, known.vcpus[index], tid, certain=True) for index, tid in seen.items()]
    found += [VcpuThread(index, known.vcpus[index], tid, certain=False) for index, tid in named.items()]
    return sorted(found, key=lambda one: one.index)


def _watched(pid: int, known: Descriptors, wanted: Callable[[], bool]) -> dict[int, int]:
    index_of = known.index_of
    found: dict[int, int] = {}
    end = time.monotonic() + WATCH_S
    while len(found) < len(known.vcpus) and time.monotonic() < end and not wanted():
        for tid in threads_of(pid):
            fd = running(_read(pid, tid, "syscall"))
            if fd in index_of and _is_ordinary(_read(pid, tid, "stat")):
                found[index_of[fd]] = tid
        time.sleep(_LOOK_S)
    return found


def _ask_busy(
    pid: int, known: Descriptors, seen: dict[int, int], ask: Callable[[int], int], wanted: Callable[[], bool]
) -> None:
    """Add to ``seen`` what threads say that run now and then, until all are known."""
    index_of = known.index_of
    asked: Counter[int] = Counter()
    quiet = 0
    end = time.monotonic() + SEARCH_S
    while time.monotonic() < end:
        quiet += 1
        for tid in _busy(pid, seen):
            if len(seen) == len(known.vcpus) or wanted():
                return
            if asked[tid] == _ASK_TIMES:
                continue
            quiet = 0
            asked[tid] += 1
            fd = ask(tid)
            if fd in index_of:
                seen[index_of[fd]] = tid
        if len(seen) == len(known.vcpus) or quiet == _QUIET_LOOKS or wanted():
            return
        time.sleep(_LOOK_S)


def _named(pid: int, known: Descriptors) -> dict[int, int]:
    """By name, where a name is of one thread only."""
    found: dict[int, list[int]] = {}
    for tid in threads_of(pid):
        match = _NAME.fullmatch(_read(pid, tid, "comm").strip())
        index = int(match[1] or match[2]) if match else -1
        if index in known.vcpus:
            found.setdefault(index, []).append(tid)
    return {index: tids[0] for index, tids in found.items() if len(tids) == 1}


def _busy(pid: int, seen: dict[int, int]) -> Iterator[int]:
    """Threads that run at the very moment, but for those whose vCPU is known: a stop interrupts no wait."""
    for tid in threads_of(pid):
        stat = "" if tid in seen.values() else _read(pid, tid, "stat")
        if stat.rpartition(")")[2].startswith(" R") and _is_ordinary(stat):
            yield tid


def _is_ordinary(stat: str) -> bool:
    """Whether a thread runs in user space, too, by its /proc/…/stat."""
    words = stat.rpartition(")")[2].split()
    return len(words) > 6 and not int(words[6]) & _USER_WORKER


def _read(pid: int, tid: int, name: str) -> str:
    try:
        return (PROC / str(pid) / "task" / str(tid) / name).read_text(errors="replace")
    except OSError:
        return ""
