# SPDX-License-Identifier: Apache-2.0
"""Trace events in columns, whatever they were read from, and the stage-2 faults in them.

Source: arch/arm64/kvm/trace_arm.h, arch/x86/kvm/trace.h, include/trace/events/kvm.h
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from prefault.faults import syndrome
from prefault.faults.recording import Arrays, Columns

Int64 = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class Event(enum.IntEnum):
    """What happened."""

    FAULT_ARM64 = 1
    FAULT_X86 = 2
    EXIT = 3
    ENTRY = 4
    MMIO = 5
    NESTED_IN = 6
    NESTED_OUT = 7


NAMES = {
    "kvm_guest_fault": Event.FAULT_ARM64,
    "kvm_page_fault": Event.FAULT_X86,
    "kvm_exit": Event.EXIT,
    "kvm_entry": Event.ENTRY,
    "kvm_mmio": Event.MMIO,
    "kvm_nested_eret": Event.NESTED_IN,
    "kvm_inject_nested_exception": Event.NESTED_OUT,
    "kvm_nested_vmenter": Event.NESTED_IN,
    "kvm_nested_vmrun": Event.NESTED_IN,
    "kvm_nested_vmexit_inject": Event.NESTED_OUT,
}
"""Names of the events that matter."""


@dataclass
class Events(Arrays):
    """Events as they were read.

    :ivar time: in ns of the trace's clock
    :ivar tid: thread id
    :ivar pid: process id, -1 if the trace does not say
    :ivar event: an ``Event``
    :ivar address: IPA, or address of an MMIO access
    :ivar syndrome: ESR_EL2, error code, or EPT exit qualification
    :ivar vcpu: -1 if the event does not say
    :ivar epoch: how many losses of events came before it: what lies on two sides of one belongs not together
    """

    time: Int64
    tid: npt.NDArray[np.int32]
    pid: npt.NDArray[np.int32]
    event: npt.NDArray[np.uint8]
    address: npt.NDArray[np.uint64]
    syndrome: npt.NDArray[np.uint64]
    vcpu: npt.NDArray[np.int16]
    epoch: npt.NDArray[np.int32]


def joined(parts: Sequence[Events]) -> Events:
    """All of several, one after the other."""
    if not parts:
        return Events(
            np.empty(0, np.int64),
            np.empty(0, np.int32),
            np.empty(0, np.int32),
            np.empty(0, np.uint8),
            np.empty(0, np.uint64),
            np.empty(0, np.uint64),
            np.empty(0, np.int16),
            np.empty(0, np.int32),
        )
    return Events(*(np.concatenate([getattr(part, one.name) for part in parts]) for one in fields(Events)))


def faults_in(events: Events) -> Columns:
    """The faults, each with its duration, its kind, and whether it was taken for a nested guest.

    A fault's duration is the time from the ``kvm_exit`` before it to the ``kvm_entry`` after it, on the same
    thread and with nothing lost in between; of an access that a device served, the device's time is in it.
    """
    if np.any(events.time[1:] < events.time[:-1]):  # perf and dumps of one CPU after the other
        events = events.take(np.argsort(events.time, kind="stable"))
    by_thread = events.take(np.argsort(events.tid, kind="stable"))
    event = by_thread.event
    is_fault = (event == Event.FAULT_ARM64) | (event == Event.FAULT_X86)
    at = np.flatnonzero(is_fault)
    mine = _Neighbours(by_thread, at)
    duration = _durations(by_thread, at, mine)
    nested = mine.before((event == Event.NESTED_IN) | (event == Event.NESTED_OUT))
    told = np.isin(event, (Event.NESTED_IN, Event.NESTED_OUT)).any()
    arm64 = event[at] == Event.FAULT_ARM64
    meaning = syndrome.decode(by_thread.syndrome[at], arm64)
    kind = np.where(_served_by_a_device(by_thread, at, mine), syndrome.Kind.MMIO, meaning.kind)
    columns = Columns(
        time_ns=by_thread.time[at],
        duration_ns=duration,
        pid=by_thread.pid[at],
        tid=by_thread.tid[at],
        vcpu=by_thread.vcpu[at],
        ipa=by_thread.address[at],
        kind=kind.astype(np.int8),
        access=meaning.access,
        level=meaning.level,
        nested=np.where(told, _is(event, nested, Event.NESTED_IN), -1).astype(np.int8),
        syndrome=by_thread.syndrome[at],
    )
    return columns.in_order()


class _Neighbours:
    """The nearest events of a thread before and after some of its events."""

    def __init__(self, events: Events, at: Int64) -> None:
        self._tid = events.tid
        self._at = at
        self._all = np.arange(len(events))

    def before(self, which: Flags) -> Int64:
        """Index of the last of ``which`` before each, -1 if its thread has none."""
        last = np.maximum.accumulate(np.where(which, self._all, -1))
        found = np.where(self._at > 0, last[self._at - 1], -1)
        return np.where((found >= 0) & (self._tid[found] == self._tid[self._at]), found, -1)

    def after(self, which: Flags) -> Int64:
        """Index of the first of ``which`` after each, -1 if its thread has none."""
        end = len(self._all)
        first = np.minimum.accumulate(np.where(which, self._all, end)[::-1])[::-1]
        found = first[np.minimum(self._at + 1, end - 1)]
        found = np.where((self._at + 1 < end) & (found < end), found, -1)
        return np.where((found >= 0) & (self._tid[found] == self._tid[self._at]), found, -1)


def _is(event: npt.NDArray[np.uint8], index: Int64, what: Event) -> Flags:
    if not len(event):
        return np.zeros(len(index), np.bool_)
    found: Flags = (index >= 0) & (event[index] == what)
    return found


def _durations(events: Events, at: Int64, mine: _Neighbours) -> Int64:
    """Of each fault in ns, -1 if not known."""
    event = events.event
    edge = (event == Event.EXIT) | (event == Event.ENTRY)
    fault = (event == Event.FAULT_ARM64) | (event == Event.FAULT_X86)
    left, right = mine.before(edge | fault), mine.after(edge)  # a second fault of one exit has none
    known = _is(event, left, Event.EXIT) & _is(event, right, Event.ENTRY)
    known &= events.epoch[left] == events.epoch[right]
    return np.where(known, events.time[right] - events.time[left], -1)


def _served_by_a_device(events: Events, at: Int64, mine: _Neighbours) -> Flags:
    """Whether KVM went on to emulate an access to the page that faulted, before the guest went on."""
    event = events.event
    next_ = mine.after((event == Event.MMIO) | (event == Event.ENTRY))
    served: Flags = _is(event, next_, Event.MMIO) & (events.epoch[next_] == events.epoch[at])
    page = np.uint64(12)
    same: Flags = events.address[next_] >> page == events.address[at] >> page
    served &= same
    return served
