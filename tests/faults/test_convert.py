# SPDX-License-Identifier: Apache-2.0
"""Recordings of files that people have."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from prefault.errors import UsageError
from prefault.faults import recording
from prefault.faults.convert import convert, convert_bytes
from prefault.faults.syndrome import Access, Kind
from tests.faults.traces import Line, old_page_fault, page_fault, render

DATA = Path(__file__).parent / "data"
FAULT = (
    b"CPU 0/KVM-7 [001] d..1. 12.345678: kvm_guest_fault: ipa 0x80000000, hsr 0x93820007, hxfar 0x8, pc 0x4\n"
)


@pytest.mark.parametrize(
    ("begin", "remedy"),
    [
        (b"", "is empty"),
        (b"\x17\x08Dtracing", "trace-cmd report -i"),
        (b"PERFILE2....", "perf script -i"),
        (b"PAR1....", "a recording already"),
        (b"\x1f\x8b\x08", "zcat"),
        (b"hello\nworld\n", "its first line is 'hello'"),
        (b"# tracer: nop\n", "no line of 1 is one of a trace"),
        (b"  a-7 [001] 1.123456: sched_switch: x\n", "1 event, but none is a stage-2 fault"),
        (FAULT.replace(b"ipa 0x", b"vcpu_pc=0x"), "1 line could not be read .the first: 'CPU 0/KVM-7"),
        (b"2ELIFREP", "big-endian machine; run `perf script -i"),
        (b"BZh91AY", "bzcat"),
        (b"\x04\x22\x4d\x18", "lz4cat"),
        (FAULT.decode().encode("utf-16"), "iconv -f UTF-16"),
        (
            b"# tracer: nop\n#\n# nop latency trace v1.1.5 on 7.3\n CPU 0/KV-1 2d..1. 1us : x: y\n",
            "latency-format",
        ),
        (b"prefault-capture 1\n", "cut off before it began"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_what_to_do(
    tmp_path: Path, begin: bytes, remedy: str
) -> None:
    (tmp_path / "x").write_bytes(begin)
    with pytest.raises(UsageError, match=remedy):
        convert(tmp_path / "x")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        convert(tmp_path / "x")


def lines(*payloads: tuple[str, str]) -> str:
    return "".join(render(Line(9, 7, 7, "CPU 3/KVM", 0, *one), "perf") + "\n" for one in payloads)


def test_faults_of_two_architectures_are_two_recordings(tmp_path: Path) -> None:
    arm64 = ("kvm_guest_fault", "ipa 0x1000, hsr 0x92000007, hxfar 0x1000, pc 0x1000")
    (tmp_path / "x").write_text(lines(arm64, ("kvm_page_fault", page_fault(0, 0, 0x1000, 0x182))))
    with pytest.raises(UsageError, match="of arm64 and of x86"):
        convert(tmp_path / "x")


def test_bytes_are_as_good_as_a_file(tmp_path: Path) -> None:
    data = lines(("kvm_page_fault", page_fault(0, 0, 0x1000, 0x182))).encode()
    (tmp_path / "x").write_bytes(data)
    of_file, of_bytes = convert(tmp_path / "x").recording, convert_bytes(data, "x").recording
    assert recording.table(of_bytes).to_pydict() == recording.table(of_file).to_pydict()
    with pytest.raises(UsageError, match="x: is empty"):
        convert_bytes(b"", "x")


def test_x86_faults_have_the_vcpu_that_the_event_names_or_else_the_thread(tmp_path: Path) -> None:
    events = (page_fault(5, 0, 0x1000, 0x182), old_page_fault(0x2000, 0x181))
    (tmp_path / "x").write_text(lines(*(("kvm_page_fault", one) for one in events)))
    found = convert(tmp_path / "x").recording
    assert found.metadata.architecture == "x86_64"
    assert found.faults.vcpu.tolist() == [5, 3]


@pytest.mark.parametrize(
    ("comm", "vcpu"),
    [
        ("CPU 12/KVM", 12),
        ("fc_vcpu 0", 0),
        ("vcpu7", 7),
        ("crosvm_vcpu3", 3),
        ("kvm-vcpu-1", 1),
        ("python3", -1),
        ("<...>", -1),
    ],
)
def test_threads_of_common_vmms_are_known_by_name(tmp_path: Path, comm: str, vcpu: int) -> None:
    line = Line(9, 7, 7, comm, 0, "kvm_guest_fault", "ipa 0x1000, hsr 0x92000007, hxfar 0x1000, pc 0x1000")
    (tmp_path / "x").write_text(render(line, "tracefs") + "\n")
    found = convert(tmp_path / "x").recording
    assert found.faults.vcpu.tolist() == [vcpu]
    assert found.vcpu_labels().tolist() == [vcpu if vcpu >= 0 else -7]


def test_a_process_that_becomes_known_late_is_that_of_all_faults_of_its_threads() -> None:
    """trace_pipe knows neither name nor process of a thread until it was switched to while tracing."""
    unknown = FAULT.replace(b"CPU 0/KVM-7", b"     <...>-7       (-------)")
    named = FAULT.replace(b"CPU 0/KVM-7", b" CPU 0/KVM-7       (      5)")
    found = convert_bytes(unknown + named + unknown + unknown.replace(b"-7 ", b"-8 "), "x").recording
    assert found.faults.pid.tolist() == [5, 5, 5, -1]
    assert found.faults.vcpu.tolist() == [0, 0, 0, -1]
    assert found.metadata.threads == {7: (5, "CPU 0/KVM"), 8: (0, "")}


ARM64 = "CPU {}/KVM {} [001] {}: kvm:kvm_{}: ipa 0x1000, hsr 0x92000007, hxfar 0x1000, pc 0x1000"


def vcpu_lines(number: int, thread: str) -> str:
    events = zip(("1.000001", "1.000002", "1.000003"), ("exit", "guest_fault", "entry"), strict=True)
    return "".join(ARM64.format(number, thread, *one) + "\n" for one in events)


def test_a_trace_with_processes_in_place_of_threads_is_told_and_has_no_durations() -> None:
    mixed = convert_bytes((vcpu_lines(0, "5") + vcpu_lines(1, "5")).encode(), "x")
    assert mixed.mixed == {5: (0, 1)}
    assert mixed.recording.faults.duration_ns.tolist() == [-1, -1]
    told = convert_bytes((vcpu_lines(0, "5/6") + vcpu_lines(1, "5/7")).encode(), "x")
    assert not told.mixed
    assert told.recording.faults.duration_ns.tolist() == [2000, 2000]
    assert told.recording.faults.vcpu.tolist() == [0, 1]


def test_x86_vcpus_of_one_process_are_told_by_their_events() -> None:
    data = lines(*(("kvm_page_fault", page_fault(vcpu, 0, 0x1000, 0x182)) for vcpu in (0, 1)))
    assert convert_bytes(data.encode(), "x").mixed == {7: (0, 1)}


def test_a_capture_becomes_a_recording_that_says_where_it_is_from() -> None:
    found = convert(DATA / "walk.capture").recording
    about = found.metadata
    assert (about.architecture, about.page_size, about.format, about.clock) == (
        "aarch64",
        4096,
        "capture",
        "mono",
    )
    assert about.source.startswith("live, process ")
    assert about.recorded
    assert set(found.faults.pid.tolist()) == {int(about.source.split()[-1])}


@pytest.mark.parametrize("name", ["walk.tracefs", "walk.trace-cmd", "walk.capture"])
def test_real_traces_survive_parquet(tmp_path: Path, name: str) -> None:
    one = convert(DATA / name).recording
    recording.write(one, tmp_path / "x.parquet")
    found = recording.read(tmp_path / "x.parquet")
    assert np.array_equal(found.faults.ipa, one.faults.ipa)
    assert np.all(np.diff(found.faults.time_ns) >= 0)


X86 = ("x86.tracefs", "x86.trace-cmd", "x86.perf", "x86-pid.perf", "x86.capture")


@pytest.mark.parametrize("name", X86)
def test_a_real_x86_guest_is_read_alike_in_every_format(name: str) -> None:
    """Two vCPUs read 32 pages each that were never touched, write them, and use a device."""
    found = convert(DATA / name)
    about, faults = found.recording.metadata, found.recording.faults
    assert (about.architecture, about.lost_events, about.bad_lines) == ("x86_64", 0, 0)
    assert about.format == name.partition(".")[2]
    assert set(faults.vcpu.tolist()) == {0, 1}
    data = faults.take((faults.ipa >= 0x20000) & (faults.ipa < 0x60000))
    counts = Counter(zip(data.kind.tolist(), data.access.tolist(), strict=True))
    assert counts == {
        (Kind.TRANSLATION, Access.READ): 66,  # twice, KVM let the guest try again
        (Kind.PERMISSION, Access.WRITE): 64,
        (Kind.TRANSLATION, Access.WRITE): 72,
    }
    device = faults.take(faults.ipa == 0xB8000)
    assert Counter(zip(device.kind.tolist(), device.access.tolist(), strict=True)) == {
        (Kind.MMIO, Access.READ): 2,
        (Kind.MMIO, Access.WRITE): 2,
    }
    assert np.count_nonzero(faults.duration_ns < 0) == 0


def test_all_formats_of_one_x86_run_agree_fault_by_fault() -> None:
    one, *others = (convert(DATA / name).recording.faults for name in X86)
    for other in others:
        for vcpu in (0, 1):
            mine, theirs = one.take(one.vcpu == vcpu), other.take(other.vcpu == vcpu)
            for column in ("tid", "ipa", "kind", "access", "level", "syndrome"):
                assert getattr(mine, column).tolist() == getattr(theirs, column).tolist(), column
