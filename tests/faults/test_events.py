# SPDX-License-Identifier: Apache-2.0
"""Faults in a stream of events: durations, devices and nested guests, each by what its own thread did."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.faults.events import Event, Events, faults_in, joined
from prefault.faults.recording import Columns
from prefault.faults.syndrome import Kind

READ = 0x9200_0007
EXIT, FAULT, ENTRY, MMIO = Event.EXIT, Event.FAULT_ARM64, Event.ENTRY, Event.MMIO
IN, OUT = Event.NESTED_IN, Event.NESTED_OUT

Row = tuple[int, Event, int]
"""Thread, event, address; the time is the place in the sequence."""


def events_of(rows: Sequence[Row], losses: Sequence[int] = ()) -> Events:
    """Events, a microsecond from one to the next; ``losses`` says before which places some were lost."""
    count = len(rows)
    return Events(
        time=np.arange(count, dtype=np.int64) * 1000,
        tid=np.array([tid for tid, _, _ in rows], np.int32),
        pid=np.full(count, -1, np.int32),
        event=np.array([event for _, event, _ in rows], np.uint8),
        address=np.array([address for _, _, address in rows], np.uint64),
        syndrome=np.full(count, READ, np.uint64),
        vcpu=np.full(count, -1, np.int16),
        epoch=np.array([sum(loss <= at for loss in losses) for at in range(count)], np.int32),
    )


def found(*rows: Row, losses: Sequence[int] = ()) -> Columns:
    return faults_in(events_of(rows, losses))


def test_a_duration_is_from_the_exit_before_to_the_entry_after() -> None:
    assert found((1, EXIT, 0), (1, FAULT, 0), (1, ENTRY, 0)).duration_ns.tolist() == [2000]


@given(st.permutations(range(6)))
def test_events_that_come_out_of_order_are_put_in_order(places: list[int]) -> None:
    """As in dumps of one CPU's buffer after the other, of a thread that moved between the two."""
    rows = [(1, EXIT, 0), (1, FAULT, 0x1000), (1, MMIO, 0x1000), (1, ENTRY, 0), (1, EXIT, 0), (1, FAULT, 0)]
    shuffled = faults_in(events_of(rows).take(np.array(places)))
    assert shuffled.duration_ns.tolist() == [3000, -1]
    assert shuffled.kind.tolist() == [Kind.MMIO, Kind.TRANSLATION]
    assert shuffled.time_ns.tolist() == [1000, 5000]


def test_other_threads_in_between_do_not_matter() -> None:
    rows = [(1, EXIT, 0), (2, EXIT, 0), (1, FAULT, 0), (2, ENTRY, 0), (1, ENTRY, 0), (2, FAULT, 0)]
    assert found(*rows).duration_ns.tolist() == [4000, -1]


@pytest.mark.parametrize(
    "rows",
    [
        [(1, FAULT, 0)],
        [(1, FAULT, 0), (1, ENTRY, 0)],
        [(1, EXIT, 0), (1, FAULT, 0)],
        [(1, ENTRY, 0), (1, FAULT, 0), (1, ENTRY, 0)],
        [(1, EXIT, 0), (1, FAULT, 0), (1, EXIT, 0), (1, ENTRY, 0)],
        [(2, EXIT, 0), (1, FAULT, 0), (2, ENTRY, 0)],
    ],
)
def test_without_an_exit_before_and_an_entry_after_it_is_not_known(rows: list[Row]) -> None:
    assert found(*rows).duration_ns.tolist() == [-1]


def test_of_two_faults_of_one_exit_the_first_has_the_duration() -> None:
    assert found((1, EXIT, 0), (1, FAULT, 0), (1, FAULT, 0), (1, ENTRY, 0)).duration_ns.tolist() == [3000, -1]


def test_a_fault_is_a_device_if_an_access_to_its_page_is_emulated_before_the_guest_goes_on() -> None:
    assert found((1, FAULT, 0x9000), (1, MMIO, 0x9010), (1, ENTRY, 0)).kind.tolist() == [Kind.MMIO]
    assert found((1, FAULT, 0x9000), (1, ENTRY, 0), (1, MMIO, 0x9010)).kind.tolist() == [Kind.TRANSLATION]
    assert found((1, FAULT, 0x9000), (1, MMIO, 0xA010), (1, ENTRY, 0)).kind.tolist() == [Kind.TRANSLATION]
    assert found((1, FAULT, 0x9000), (2, MMIO, 0x9010), (1, ENTRY, 0)).kind.tolist() == [Kind.TRANSLATION]
    assert found((1, FAULT, 0x9000), (1, MMIO, 0x9010), losses=[1]).kind.tolist() == [Kind.TRANSLATION]


def test_faults_between_entering_l2_and_leaving_it_are_nested() -> None:
    rows = [(1, FAULT, 0), (1, IN, 0), (1, FAULT, 0), (2, FAULT, 0), (1, OUT, 0), (1, FAULT, 0)]
    assert found(*rows).nested.tolist() == [0, 1, 0, 0]


def test_a_trace_without_such_events_does_not_tell() -> None:
    assert found((1, FAULT, 0)).nested.tolist() == [-1]


ROWS = st.lists(
    st.tuples(
        st.integers(1, 3), st.sampled_from(list(Event)), st.integers(0, 3).map(lambda page: page * 4096)
    ),
    max_size=30,
)


def slowly(rows: Sequence[Row]) -> list[tuple[int, int, bool]]:
    """(time, duration, device) of each fault, event by event."""
    result = []
    for at, (tid, event, address) in enumerate(rows):
        if event not in (Event.FAULT_ARM64, Event.FAULT_X86):
            continue
        before = [(i, one) for i, (other, one, _) in enumerate(rows[:at]) if other == tid]
        after = [(i, one, a) for i, (other, one, a) in enumerate(rows) if other == tid and i > at]
        left = [(i, one) for i, one in before if one in (EXIT, ENTRY, Event.FAULT_ARM64, Event.FAULT_X86)][
            -1:
        ]
        right = [(i, one) for i, one, _ in after if one in (EXIT, ENTRY)][:1]
        known = left and right and left[0][1] == EXIT and right[0][1] == ENTRY
        duration = (right[0][0] - left[0][0]) * 1000 if known else -1
        then = [(one, a) for _, one, a in after if one in (MMIO, ENTRY)][:1]
        result.append((at * 1000, duration, bool(then) and then[0] == (MMIO, address)))
    return result


@given(ROWS)
def test_all_of_it_is_what_a_slow_reading_finds(rows: list[Row]) -> None:
    faults = found(*rows)
    device = [one == Kind.MMIO for one in faults.kind.tolist()]
    assert list(zip(faults.time_ns.tolist(), faults.duration_ns.tolist(), device, strict=True)) == slowly(
        rows
    )


@given(ROWS, st.integers(0, 30))
def test_events_that_are_read_in_pieces_are_the_same(rows: list[Row], at: int) -> None:
    whole = events_of(rows)
    index = np.arange(len(rows))
    again = joined([whole.take(index[:at]), whole.take(index[at:])])
    assert again.time.tolist() == whole.time.tolist()
    assert again.event.dtype == whole.event.dtype
