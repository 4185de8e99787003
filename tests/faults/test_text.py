# SPDX-License-Identifier: Apache-2.0
"""Traces that are text: what a writer wrote is what is read, and what is no trace is counted."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.faults import text
from prefault.faults.events import NAMES, Event, faults_in
from prefault.faults.syndrome import Access, Kind
from tests.faults.traces import TEXT_FORMATS, Line, guest_fault, heading, old_page_fault, render, traces

DATA = Path(__file__).parent / "data"
FAULT = (
    "CPU 0/KVM-7       [001] d..1.    12.345678: "
    "kvm_guest_fault: ipa 0x80000000, hsr 0x93820007, hxfar 0x8, pc 0x4\n"
)


def read(trace: str) -> text.Trace:
    return text.read(io.BytesIO(trace.encode()))


@pytest.mark.parametrize("form", TEXT_FORMATS)
@pytest.mark.parametrize("kernel", ["arm64", "x86"])
@given(data=st.data())
def test_what_a_writer_wrote_is_what_is_read(kernel: str, form: str, data: st.DataObject) -> None:
    lines: list[Line] = data.draw(traces(kernel))
    found = read(heading(form) + "".join(render(line, form) + "\n" for line in lines))
    assert (found.bad_lines, found.lost) == (0, 0), found.bad
    events = found.events
    assert events.time.tolist() == [line.time_us * 1000 for line in lines]
    assert events.tid.tolist() == [line.tid for line in lines]
    assert events.event.tolist() == [NAMES[line.event] for line in lines]
    assert events.address.tolist() == [line.ipa for line in lines]
    assert events.syndrome.tolist() == [line.syndrome for line in lines]
    assert events.vcpu.tolist() == [line.vcpu for line in lines]
    has_pid = "process" in form
    assert events.pid.tolist() == [line.pid if has_pid else -1 for line in lines]
    assert found.format == form.partition(" ")[0]
    assert {tid: name for tid, (_, name) in found.threads.items()}.keys() == {line.tid for line in lines}


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=80), max_size=6))
def test_lines_that_are_no_trace_never_break_it(junk: list[str]) -> None:
    lines = [one.replace("\n", " ").replace("\r", " ") for one in junk]
    found = read("".join(f"{line}\n{FAULT}" for line in [*lines, "#"]))
    assert len(found.events) >= len(lines) + 1
    assert found.lines == 2 * (len(lines) + 1)


@given(st.integers(0, len(FAULT) - 2))
def test_a_line_that_is_cut_off_is_bad_or_whole_but_never_another_fault(length: int) -> None:
    found = read(FAULT + FAULT[:length] + "\n" + FAULT)
    esr = found.events.syndrome.tolist()
    in_name = FAULT.index(" kvm_") < length < FAULT.index(" ipa")  # then it is another event
    assert found.bad_lines + len(esr) == 3 - (length == 0 or in_name)
    assert set(esr) == {0x9382_0007}


def test_bad_lines_are_shown_with_their_numbers() -> None:
    found = read("# tracer: nop\n" + FAULT + "what is this\n" + FAULT + FAULT.replace("ipa", "ipb") + "\n")
    assert found.bad_lines == 2
    assert [(bad.number, bad.text[:12]) for bad in found.bad] == [(3, "what is this"), (5, "CPU 0/KVM-7 ")]


def test_numbers_of_bad_lines_go_on_from_one_chunk_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "CHUNK", 300)
    found = read(FAULT * 10 + "bad\n" + FAULT)
    assert [bad.number for bad in found.bad] == [11]
    assert len(found.events) == 11


@pytest.mark.parametrize(
    ("line", "lost"),
    [
        ("CPU:2 [LOST 123 EVENTS]", 123),
        ("CPU:0 [LOST EVENTS]", 1),
        ("CPU:1 [7 EVENTS DROPPED]", 7),
        ("CPU:1 [EVENTS DROPPED]", 1),
        ("Warning:\nProcessed 5120 events and lost 3 chunks!\n\nCheck IO/CPU overload!", 3),
        ("Warning:\nProcessed 5120 samples and lost 12.50%!", 1),
        ("       CPU 0/KVM       7 [001]    12.345678: PERF_RECORD_LOST lost 5", 5),
        ("# entries-in-buffer/entries-written: 100/140   #P:2", 40),
    ],
)
def test_lost_events_are_counted_also_where_their_number_is_not_told(line: str, lost: int) -> None:
    found = read(f"{FAULT}{line}\n{FAULT}")
    assert (found.lost, found.bad_lines) == (lost, 0)


def test_cpus_without_an_event_are_not_bad() -> None:
    found = read("CPU 1 is empty\nCPU 12 is empty\ncpus=16\n" + FAULT)
    assert (len(found.events), found.bad_lines, found.format) == (1, 0, "trace-cmd")


@pytest.mark.parametrize("prefix", ["host.dat: ", "          "])
def test_several_files_or_buffers_in_one_report_are_read(prefix: str) -> None:
    """trace-cmd report -i host.dat -i guest.dat, or of trace-cmd record -B."""
    event = f"       {FAULT}".replace("d..1.", "")
    report = f"{prefix}cpus=2\nguest.dat: cpus=1\n{prefix}{event}{prefix}CPU:1 [7 EVENTS DROPPED]\n{event}"
    found = read(report)
    assert (len(found.events), found.lost, found.bad_lines, found.format) == (2, 7, 0, "trace-cmd")
    assert found.events.tid.tolist() == [7, 7]
    assert found.threads == {7: (0, "CPU 0/KVM")}


def test_a_bad_line_is_shown_without_what_a_terminal_would_obey() -> None:
    (bad,) = read(FAULT + "\x1b]0;title\x07\x1b[2Jgone\t\x9b1m\n").bad
    assert bad.text == "\ufffd]0;title\ufffd\ufffd[2Jgone \ufffd1m"


PAGE_FAULT = "CPU 0/KVM 7 [001] 12.345678: kvm:kvm_page_fault: vcpu 0 rip 0x4 address 0x1000 error_code "


def test_a_number_that_the_end_of_the_file_cuts_off_is_not_read() -> None:
    """Of 0x100000014 without its last digit, a permission fault would come."""
    found = read(f"{PAGE_FAULT}0x100000014\n{PAGE_FAULT}0x10000001")
    assert found.events.syndrome.tolist() == [0x1_0000_0014]
    assert [(bad.number, bad.text[-10:]) for bad in found.bad] == [(2, "0x10000001")]
    device = "CPU 0/KVM 7 [001] 12.345678: kvm:kvm_mmio: mmio write len 1 gpa 0xb8"
    assert read(FAULT + device).bad_lines == 1
    assert read(FAULT + device + "000 val 0x").bad_lines == 0


@pytest.mark.parametrize("frame", [" => el0_svc", "=> kvm_handle_guest_abort (ffff80008012d1a0)"])
def test_frames_of_kernel_stacks_are_not_bad(frame: str) -> None:
    found = read(FAULT + frame + "\n" + FAULT)
    assert (len(found.events), found.bad_lines) == (2, 0)


def test_a_time_that_no_clock_has_is_bad() -> None:
    found = read(FAULT + FAULT.replace("12.345678", "9999999999999.345678"))
    assert (found.events.time.tolist(), found.bad_lines) == ([12_345_678_000], 1)


def test_what_lies_on_two_sides_of_a_loss_does_not_belong_together() -> None:
    exit_ = FAULT[: FAULT.index("kvm_")] + "kvm_exit: TRAP: HSR_EC: 0x0024 (DABT_LOW), PC: 0x0\n"
    entry = exit_.replace("kvm_exit: TRAP", "kvm_entry: PC").replace("12.345678", "12.345700")
    assert faults_in(read(exit_ + FAULT + entry).events).duration_ns.tolist() == [22_000]
    assert faults_in(read(exit_ + FAULT + "CPU:0 [LOST 3 EVENTS]\n" + entry).events).duration_ns.tolist() == [
        -1
    ]


def test_other_events_are_not_bad_and_do_not_matter() -> None:
    other = FAULT.replace("kvm_guest_fault: ipa", "sched_switch: prev_comm")
    similar = FAULT.replace("kvm_guest_fault:", "kvm_guest_fault_x:")
    found = read(other + similar + FAULT)
    assert (len(found.events), found.seen, found.bad_lines) == (1, 3, 0)


def test_of_perf_the_period_is_passed_over() -> None:
    perf = FAULT.replace("-7 ", " 7 ").replace("d..1.", "").replace("kvm_", "kvm:kvm_")
    found = read(perf + "".join(perf.replace(": kvm", f": {period:>10} kvm") for period in (1, 10**19)))
    assert (found.events.address.tolist(), found.bad_lines) == ([0x8000_0000] * 3, 0)


def test_an_event_of_no_thread_is_bad() -> None:
    """perf calls a thread that it does not know -1."""
    found = read(FAULT + FAULT.replace("KVM-7 ", "KVM      -1 "))
    assert (found.events.tid.tolist(), found.bad_lines) == ([7], 1)


def test_tracefs_is_known_by_its_heading_where_it_leaves_out_its_flags() -> None:
    """With options/irq-info off, its lines look like those of trace-cmd."""
    assert read("# tracer: nop\n#\n" + 3 * FAULT.replace("d..1.", "")).format == "tracefs"


def test_a_thread_is_called_as_it_was_last_and_its_other_names_are_known() -> None:
    names = ["<...>", "qemu-system-aar", "CPU 0/KVM", "<...>"]
    found = read("".join(FAULT.replace("CPU 0/KVM", name) for name in names))
    assert found.threads == {7: (0, "CPU 0/KVM")}
    assert found.renamed == {7: {"qemu-system-aar", "CPU 0/KVM"}}


def test_windows_line_ends_and_a_missing_last_one_are_read() -> None:
    found = read((FAULT + FAULT).replace("\n", "\r\n").rstrip())
    assert (len(found.events), found.bad_lines) == (2, 0)


def test_nanoseconds_are_read() -> None:
    found = read(FAULT.replace("12.345678", "12.345678901"))
    assert found.events.time.tolist() == [12_345_678_901]


def test_an_ipa_of_zero_has_no_prefix() -> None:
    assert guest_fault(0, 0x9200_0007, 0, 0).startswith("ipa 0, hsr 0x92000007,")
    assert old_page_fault(0, 0) == "address 0 error_code 0"


@pytest.mark.parametrize("name", ["walk.tracefs", "walk-no-tgid.tracefs", "walk.trace-cmd"])
def test_a_real_walk_is_read(name: str) -> None:
    """Two vCPUs read 30 pages each of memory that was never touched, and write every other one."""
    with (DATA / name).open("rb") as file:
        found = text.read(file)
    assert (found.bad_lines, found.lost, found.format) == (0, 0, name.partition(".")[2])
    assert sorted(name for _, name in found.threads.values()) == ["CPU 0/KVM", "CPU 1/KVM"]
    assert {pid for pid, _ in found.threads.values()} == ({0} if name != "walk.tracefs" else {56})
    faults = faults_in(found.events)
    memory = faults.take((faults.ipa >= 1 << 32) & (faults.kind != Kind.MMIO))
    counts = Counter(zip(memory.kind.tolist(), memory.access.tolist(), strict=True))
    # Breaking copy-on-write takes the leaf away, so that a translation fault follows each permission fault.
    # Some faults were taken twice: KVM lets the guest try again when the host was changing something.
    assert counts == {
        (Kind.TRANSLATION, Access.READ): 85,
        (Kind.PERMISSION, Access.WRITE): 30,
        (Kind.TRANSLATION, Access.WRITE): 59,
    }
    assert set(np.unique(memory.ipa)) == set(range(1 << 32, (1 << 32) + 60 * 4096, 4096))
    assert np.count_nonzero(faults.kind == Kind.MMIO) == 6
    assert np.count_nonzero(faults.duration_ns < 0) == 2  # the guests' last exits
    assert set(found.events.event.tolist()) == {Event.FAULT_ARM64, Event.EXIT, Event.ENTRY, Event.MMIO}


def test_faults_of_an_l2_are_told_apart() -> None:
    with (DATA / "nested.tracefs").open("rb") as file:
        faults = faults_in(text.read(file).events)
    of_l2 = faults.take(faults.nested == 1)
    assert len(of_l2) > 0
    assert set(faults.take(faults.nested == 0).ipa.tolist()) <= {0x4000_0000, 0x4020_0000, 0x900_0000} | {
        ipa for ipa in faults.ipa.tolist() if ipa >> 20 == 0x400 or ipa >> 20 == 0x402
    }
    assert 1 << 32 in of_l2.ipa.tolist()
