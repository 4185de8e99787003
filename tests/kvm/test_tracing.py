# SPDX-License-Identifier: Apache-2.0
"""Faults read from a trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefault.errors import CapabilityMissing, PrefaultError
from prefault.kvm import tracefs, tracing
from prefault.machine import FaultCounts

TRACE = """# tracer: nop
#
# entries-in-buffer/entries-written: 5/5   #P:2
#
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
         python3-141     [000] d..1.    12.345678: kvm_guest_fault: ipa 0x80000000, hsr 0x93820007, hxfar 0x80000000, pc 0x0000000040000034
         python3-141     [000] .....    12.345679: kvm_guest_fault: ipa 0x80001000, hsr 0x93800047, hxfar 0x80001000, pc 0x0000000040000034
    a b-c [1]-142     [001] d..1.    12.345680: kvm_guest_fault: ipa 0x80002000, hsr 0x82000007, hxfar 0x80002000, pc 0x0000000080002000
         python3-141     (   99) [000] d..1.    12.345681: kvm_guest_fault: ipa 0x80001000, hsr 0x9380004f, hxfar 0x80001000, pc 0x0000000040000034
         python3-141     [000] d..1.    12.345682: kvm_guest_fault: ipa 0x9000000, hsr 0x93830046, hxfar 0x9000000, pc 0x0000000040000034
"""  # noqa: E501


def test_every_line_is_read_whoever_it_is_of() -> None:
    assert list(tracing.ARM64.parse(TRACE)) == [
        (141, 0x8000_0000, 0x9382_0007),
        (141, 0x8000_1000, 0x9380_0047),
        (142, 0x8000_2000, 0x8200_0007),
        (141, 0x8000_1000, 0x9380_004F),
        (141, 0x900_0000, 0x9383_0046),
    ]


def test_faults_are_told_apart_by_their_syndrome() -> None:
    counts = FaultCounts()
    for _, ipa, esr in tracing.ARM64.parse(TRACE):
        tracing.add(counts, ipa, esr)
    assert (counts.read, counts.write, counts.execute) == (1, 3, 1)
    assert (counts.permission, counts.total) == (1, 5)
    assert counts.ipas == [0x8000_0000, 0x8000_1000, 0x8000_2000, 0x8000_1000, 0x900_0000]


X86_TRACE = """
         python3-116     [000] d..1.    12.345678: kvm_page_fault: vcpu 0 rip 0x40000054 address 0x0000000100020000 error_code 0x100000004
         python3-116     [000] d..1.    12.345679: kvm_page_fault: vcpu 0 rip 0x40000054 address 0x0000000100021000 error_code 0x100000006
         python3-117     [001] d..1.    12.345680: kvm_page_fault: vcpu 1 rip 0x40000054 address 0x0000000040000000 error_code 0x100000014
         python3-116     [000] d..1.    12.345681: kvm_page_fault: vcpu 0 rip 0x40000054 address 0x0000000100020000 error_code 0x100000007
"""  # noqa: E501


def test_faults_of_x86_are_told_apart_by_their_error_code() -> None:
    counts = FaultCounts()
    found = list(tracing.X86.parse(X86_TRACE))
    assert [thread for thread, *_ in found] == [116, 116, 117, 116]
    for _, ipa, code in found:
        tracing.add_x86(counts, ipa, code)
    assert (counts.read, counts.write, counts.execute, counts.permission) == (1, 2, 1, 1)
    assert counts.ipas == [0x1_0002_0000, 0x1_0002_1000, 0x4000_0000, 0x1_0002_0000]


def test_cache_maintenance_is_no_write() -> None:
    counts = FaultCounts()
    tracing.add(counts, 0, 0x9200_0147)
    assert (counts.read, counts.write) == (1, 0)


class FakeTracefs:
    """A folder that looks like tracefs, with a trace to be read."""

    def __init__(self, root: Path, stats: str) -> None:
        self.root = root
        (root / "events/kvm/kvm_guest_fault").mkdir(parents=True)
        (root / "instances").mkdir()
        self._stats = stats

    def fill(self) -> None:
        """What the kernel would put into the one instance that there is."""
        (instance,) = (self.root / "instances").iterdir()
        (instance / "per_cpu/cpu0").mkdir(parents=True, exist_ok=True)
        (instance / "per_cpu/cpu0/stats").write_text(self._stats)
        (instance / "trace").write_text(TRACE)


def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stats: str) -> FakeTracefs:
    fake = FakeTracefs(tmp_path, stats)
    monkeypatch.setattr(tracefs, "TRACEFS", tmp_path)
    make_folder = Path.mkdir

    def mkdir(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        make_folder(path, mode, parents, exist_ok)
        if path.parent.name == "instances":
            make_folder(path / "events/kvm/kvm_guest_fault", parents=True)
            make_folder(path / "options")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    return fake


def test_only_the_threads_that_ran_the_vm_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = make(tmp_path, monkeypatch, "entries: 5\noverrun: 0\ndropped events: 0\n")
    threads = {1, 2}
    with tracing.KvmFaultCounter(tracing.ARM64, 100, threads, lambda ipa: True) as counts:
        threads.add(142)
        fake.fill()
    assert (counts.execute, counts.total) == (1, 1)


def test_lost_events_are_not_kept_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = make(tmp_path, monkeypatch, "entries: 5\noverrun: 3\ndropped events: 1\n")
    with (
        pytest.raises(PrefaultError, match="4 trace events were lost"),
        tracing.KvmFaultCounter(tracing.ARM64, 100, set(), lambda ipa: True),
    ):
        fake.fill()


def test_a_host_without_the_tracepoint_says_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracefs, "TRACEFS", tmp_path)
    with (
        pytest.raises(CapabilityMissing, match="tracefs"),
        tracing.KvmFaultCounter(tracing.ARM64, 1, set(), lambda ipa: True),
    ):
        pass
