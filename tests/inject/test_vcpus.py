# SPDX-License-Identifier: Apache-2.0
"""Which thread of a process runs which vCPU, by a /proc that is made up."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from prefault.abi import ioctls
from prefault.faults import capture
from prefault.inject import cpu, vcpus
from prefault.inject.vcpus import Descriptors, VcpuThread

PID = 10
USER_WORKER, ORDINARY = 0x404040, 0x400040


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(capture, "PROC", tmp_path)
    monkeypatch.setattr(vcpus, "PROC", tmp_path)
    monkeypatch.setattr(vcpus, "WATCH_S", 0.01)
    return tmp_path


def thread(proc: Path, tid: int, syscall: str, *, name: str = "vmm", flags: int = ORDINARY) -> None:
    folder = proc / str(PID) / "task" / str(tid)
    folder.mkdir(parents=True)
    (folder / "comm").write_text(f"{name}\n")
    (folder / "syscall").write_text(f"{syscall}\n")
    state = "R" if syscall == "running" else "S"
    (folder / "stat").write_text(f"{tid} ({name} (x)) {state} 1 {PID} {PID} 0 -1 {flags} 1 0 0 0\n")


def in_run(fd: int) -> str:
    return f"{cpu.host().ioctl} {fd:#x} {ioctls.KVM_RUN:#x} 0x0 0x0 0x0 0x0 0x7ffc 0x7f00"


def test_a_thread_in_kvm_run_is_known_by_its_descriptor(proc: Path) -> None:
    thread(proc, 11, in_run(5))
    thread(proc, 12, in_run(6))
    thread(proc, 13, "0 0x0 0x0")
    found = vcpus.find(PID, Descriptors(3, {0: 6, 1: 5}), None)
    assert found == [VcpuThread(0, 6, 12, certain=True), VcpuThread(1, 5, 11, certain=True)]


def test_names_that_are_no_text_are_read(proc: Path) -> None:
    thread(proc, 11, "0 0x0 0x0")
    for name in ("comm", "stat"):
        file = proc / str(PID) / "task/11" / name
        file.write_bytes(file.read_bytes().replace(b"vmm", b"\xff\x85 vcpu0"))
    thread(proc, 12, "0 0x0 0x0", name="vcpu0")
    assert vcpus.find(PID, Descriptors(3, {0: 5}), None) == [VcpuThread(0, 5, 12, certain=False)]
    threads = capture._Threads(PID)
    threads.look(0)
    assert threads.seen == {11: (PID, "\ufffd\ufffd vcpu0"), 12: (PID, "vcpu0")}


def test_a_thread_of_the_kernels_own_is_no_vcpus(proc: Path) -> None:
    """That of KVM on x86 has a copy of a vCPU thread's registers, and so seems to be in KVM_RUN."""
    thread(proc, 11, "running")
    thread(proc, 12, in_run(5), flags=USER_WORKER)
    asked: list[int] = []

    def ask(tid: int) -> int:
        asked.append(tid)
        return 5

    assert vcpus.find(PID, Descriptors(3, {0: 5}), ask) == [VcpuThread(0, 5, 11, certain=True)]
    assert asked == [11]


def test_names_count_where_nothing_runs_and_each_is_of_one_thread(proc: Path) -> None:
    thread(proc, 11, "202 0x0 0x0", name="CPU 0/KVM")
    thread(proc, 12, "202 0x0 0x0", name="fc_vcpu 1")
    thread(proc, 13, "202 0x0 0x0", name="vcpu2")
    thread(proc, 14, "202 0x0 0x0", name="vcpu2")
    found = vcpus.find(PID, Descriptors(3, {0: 5, 1: 6, 2: 7}), None)
    assert found == [VcpuThread(0, 5, 11, certain=False), VcpuThread(1, 6, 12, certain=False)]


@pytest.mark.parametrize(
    "name",
    ["CPU 3/KVM", "fc_vcpu 3", "vcpu3", "crosvm_vcpu3", "kvm-vcpu-3", "vcpu-3", "vcpu 3"],
    ids=lambda one: one,
)
def test_thread_names_of_vmms_are_known(proc: Path, name: str) -> None:
    """QEMU's, Firecracker's, Cloud Hypervisor's, crosvm's and kvmtool's."""
    thread(proc, 11, "202 0x0 0x0", name=name)
    found = vcpus.find(PID, Descriptors(3, {3: 8, 13: 9}), None)
    assert found == [VcpuThread(3, 8, 11, certain=False)]


@pytest.mark.parametrize("name", ["vhost-cpu3", "CPU 3/TCG", "CPU 3", "my vcpu3", "vcpu3x"])
def test_names_that_only_look_like_a_vcpus_do_not_count(proc: Path, name: str) -> None:
    thread(proc, 11, "202 0x0 0x0", name=name)
    assert vcpus.find(PID, Descriptors(3, {3: 8}), None) == []


def test_a_thread_is_asked_only_while_it_runs(proc: Path) -> None:
    """One that has gone to wait meanwhile would see its wait interrupted."""
    thread(proc, 11, "running")
    thread(proc, 12, "running")
    asked: list[int] = []

    def ask(tid: int) -> int:
        asked.append(tid)
        stat = proc / str(PID) / "task/12/stat"
        stat.write_text(stat.read_text().replace(" R ", " S "))
        return -1

    assert vcpus.find(PID, Descriptors(3, {0: 5}), ask) == []
    assert asked == [11, 11, 11]


def test_nobody_who_wants_it_ended_waits_for_the_search(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thread(proc, 11, "running")
    thread(proc, 12, "running")
    asked: list[int] = []

    def ask(tid: int) -> int:
        asked.append(tid)
        return -1

    assert vcpus.find(PID, Descriptors(3, {0: 5}), ask, lambda: bool(asked)) == []
    assert asked == [11]
    monkeypatch.setattr(vcpus, "WATCH_S", 1000)
    assert vcpus.find(PID, Descriptors(3, {0: 5}), None, lambda: True) == []


def test_the_search_ends_though_something_is_always_at_work(
    proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = itertools.count(11)
    monkeypatch.setattr(vcpus, "SEARCH_S", 0.1)
    monkeypatch.setattr(vcpus, "_busy", lambda *_: [next(new)])
    assert vcpus.find(PID, Descriptors(3, {0: 5}), lambda _: -1) == []


def test_a_thread_that_seldom_works_is_found(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = itertools.count()
    monkeypatch.setattr(vcpus, "_busy", lambda *_: [11] if next(looks) == 60 else [])
    assert vcpus.find(PID, Descriptors(3, {0: 5}), lambda _: 5) == [VcpuThread(0, 5, 11, certain=True)]


def test_a_thread_that_runs_no_vcpu_is_not_stopped_for_ever(proc: Path) -> None:
    thread(proc, 11, "running")
    asked: list[int] = []

    def ask(tid: int) -> int:
        asked.append(tid)
        return -1

    assert vcpus.find(PID, Descriptors(3, {0: 5}), ask) == []
    assert len(asked) == 3  # each time may interrupt a wait
