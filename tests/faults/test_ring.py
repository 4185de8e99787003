# SPDX-License-Identifier: Apache-2.0
"""Captures: pages of ring buffers are read as the kernel wrote them."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import UsageError
from prefault.faults import captured, ring, text
from prefault.faults.captured import Head, Kind, Page, Tail
from prefault.faults.events import Event, faults_in

DATA = Path(__file__).parent / "data"
HEADER_PAGE = """\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: char overwrite;\toffset:8;\tsize:1;\tsigned:0;
\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;
"""
FORMAT = """name: kvm_guest_fault
ID: 77
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:unsigned long vcpu_pc;\toffset:8;\tsize:8;\tsigned:0;
\tfield:unsigned long hsr;\toffset:16;\tsize:8;\tsigned:0;
\tfield:unsigned long hxfar;\toffset:24;\tsize:8;\tsigned:0;
\tfield:unsigned long long ipa;\toffset:32;\tsize:8;\tsigned:0;
"""
HEAD = Head(
    "aarch64", "7.3.4", 4096, "mono", "2026-01-01T00:00:00+00:00", 1, {"kvm_guest_fault": FORMAT}, HEADER_PAGE
)
OTHER_EVENT = 12


def event(kind: int, tid: int, ipa: int, esr: int) -> bytes:
    return struct.pack("<HBBiQQQQ", kind, 0, 0, tid, 0x4000_0000, esr, 0, ipa)


def entry(delta: int, data: bytes, *, counted: bool) -> bytes:
    """One event in a page, its length in its head or a word of its own; a long delta is one before it."""
    extend = b""
    if delta >= 1 << 27:
        extend = struct.pack("<II", 30 | (delta & (1 << 27) - 1) << 5, delta >> 27)
        delta = 0
    if counted:
        return extend + struct.pack("<II", delta << 5, len(data) + 4) + data
    return extend + struct.pack("<I", len(data) // 4 | delta << 5) + data


def page(cpu: int, time: int, entries: list[bytes], *, missed: bool = False) -> Page:
    data = b"".join(entries)
    return Page(cpu, struct.pack("<QQ", time, len(data) | missed << 31) + data)


FAULTS = st.tuples(
    st.integers(0, 1 << 35),
    st.integers(1, 1 << 22),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.booleans(),
)
PAGES = st.lists(
    st.tuples(
        st.integers(0, 7), st.integers(0, 1 << 50), st.lists(st.one_of(FAULTS, st.none()), max_size=12)
    ),
    max_size=12,
)


@given(PAGES)
def test_what_a_kernel_would_write_is_what_is_read(
    pages: list[tuple[int, int, list[tuple[int, int, int, int, bool] | None]]],
) -> None:
    written, expected = [], []
    for cpu, start, events in pages:
        time, entries = start, []
        for one in events:
            if one is None:  # an event that does not matter, and padding in place of one that was discarded
                entries.append(entry(5, struct.pack("<HBBi", OTHER_EVENT, 0, 0, 1), counted=False))
                entries.append(struct.pack("<II", 29 | 3 << 5, 12) + bytes(8))
                time += 8
                continue
            delta, tid, ipa, esr, counted = one
            time += delta
            entries.append(entry(delta, event(77, tid, ipa, esr), counted=counted))
            expected.append((time, tid, ipa, esr))
        written.append(page(cpu, start, entries))
    found = ring.Decoder(HEAD).decode(written)
    columns = (found.time, found.tid, found.address, found.syndrome)
    assert sorted(zip(*(column.tolist() for column in columns), strict=True)) == sorted(expected)


def test_an_absolute_time_stamp_keeps_the_top_of_the_pages() -> None:
    top = 3 << 59
    stamp = struct.pack("<II", 31 | 9 << 5, 2)
    events = [entry(1, event(77, 5, 0, 0), counted=False), stamp, entry(4, event(77, 5, 0, 0), counted=False)]
    found = ring.Decoder(HEAD).decode([page(0, top | 100, events)])
    assert found.time.tolist() == [top + 101, top + (2 << 27) + 9 + 4]


def test_a_page_behind_a_loss_begins_a_new_epoch() -> None:
    fault = [entry(1, event(77, 5, 0, 0), counted=False)]
    found = ring.Decoder(HEAD).decode([page(0, 0, fault), page(0, 9, fault, missed=True), page(0, 20, fault)])
    assert found.epoch.tolist() == [0, 1, 1]


@given(st.binary(min_size=16, max_size=200))
def test_pages_that_are_damaged_break_nothing(data: bytes) -> None:
    whole = page(0, 0, [entry(1, event(77, 5, 0, 0), counted=False)])
    found = ring.Decoder(HEAD).decode([whole, Page(1, data)])
    assert found.time.tolist()[0] == 1


@pytest.mark.parametrize("name", ["walk", "nested"])
def test_a_capture_has_the_faults_that_the_text_of_the_same_run_has(name: str) -> None:
    with (DATA / f"{name}.capture").open("rb") as file, (DATA / f"{name}.tracefs").open("rb") as trace:
        capture, expected = ring.read(file, name), faults_in(text.read(trace).events)
    found = faults_in(capture.events)
    for tid in np.unique(expected.tid):
        mine, theirs = found.take(found.tid == tid), expected.take(expected.tid == tid)
        for column in ("ipa", "kind", "access", "level", "nested", "syndrome"):
            assert getattr(mine, column).tolist() == getattr(theirs, column).tolist(), column
    assert len(found) == len(expected)
    assert capture.tail is not None
    assert capture.tail.lost == 0
    assert capture.head.machine == "aarch64"


def test_exits_that_are_no_faults_are_not_in_a_capture() -> None:
    with (DATA / "walk.capture").open("rb") as file:
        events = ring.read(file, "walk").events
    aborts = np.count_nonzero(events.event == Event.EXIT)
    assert aborts == np.count_nonzero(events.event == Event.FAULT_ARM64)


def whole() -> bytes:
    frames = [captured.head_frame(HEAD), captured.frame(Kind.PAGE, page(0, 0, []).data)]
    return captured.MAGIC + b"".join(frames) + captured.tail_frame(Tail(3, 1.5, {7: (6, "vcpu 0")}))


def test_a_capture_is_read_back() -> None:
    found = ring.read(io.BytesIO(whole()), "x")
    assert found.head == HEAD
    assert found.tail == Tail(3, 1.5, {7: (6, "vcpu 0")})


@given(st.integers(0, len(whole()) - 1))
def test_a_capture_that_is_cut_off_is_read_up_to_there_or_refused(length: int) -> None:
    try:
        found = ring.read(io.BytesIO(whole()[:length]), "x")
    except UsageError as error:
        assert length < len(captured.MAGIC + captured.head_frame(HEAD)), error
    else:
        assert found.tail is None


@given(st.binary(max_size=64))
def test_what_is_no_capture_is_refused(data: bytes) -> None:
    with pytest.raises(UsageError):
        ring.read(io.BytesIO(captured.MAGIC + b"\x09" + data), "x")


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("machine", None),
        ("page_size", 0),
        ("page_size", 4096.0),
        ("pid", "7"),
        ("pid", 1 << 40),
        ("formats", ["x"]),
        ("formats", {"kvm_guest_fault": 7}),
        ("formats", {"kvm_guest_fault": FORMAT.replace("size:8", "size:3")}),
        ("formats", {"kvm_guest_fault": FORMAT.replace("offset:32", "offset:99999")}),
        ("header_page", None),
        ("header_page", HEADER_PAGE.replace("offset:8;\tsize:8", "offset:8;\tsize:3")),
        ("header_page", HEADER_PAGE.replace("offset:8", "offset:99999")),
        ("header_page", HEADER_PAGE.replace("size:4080", "size:0")),
        ("header_page", HEADER_PAGE.replace("size:4080", "size:99999999999")),
    ],
)
def test_a_head_that_makes_no_sense_is_refused(fact: str, value: object) -> None:
    head = captured.frame(Kind.HEAD, json.dumps({**vars(HEAD), fact: value}).encode())
    fault = page(0, 0, [entry(1, event(77, 5, 0, 0), counted=False)])
    data = captured.MAGIC + head + captured.frame(Kind.PAGE, fault.data)
    with pytest.raises(UsageError):
        ring.read(io.BytesIO(data), "x")


@pytest.mark.parametrize("threads", [None, [7], {"x": [1, "a"]}, {"7": [1]}, {"7": [1 << 40, "a"]}])
def test_a_tail_that_makes_no_sense_is_refused(threads: object) -> None:
    tail = json.dumps({"lost": 0, "seconds": 1.5, "threads": threads}).encode()
    data = captured.MAGIC + captured.head_frame(HEAD) + captured.frame(Kind.TAIL, tail)
    with pytest.raises(UsageError, match="its tail cannot be read"):
        ring.read(io.BytesIO(data), "x")
