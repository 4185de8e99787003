# SPDX-License-Identifier: Apache-2.0
"""Reads pages of the kernel's ring buffers: many pages at once, one event of each per step.

Events have different sizes, so that one page can only be read from its beginning; but pages do not depend on
each other, because each has a full timestamp.

Source: kernel/trace/ring_buffer.c, include/linux/ring_buffer.h, Documentation/trace/ftrace-design.rst
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from prefault.errors import UsageError
from prefault.faults import captured
from prefault.faults.captured import Head, Page, Tail
from prefault.faults.events import NAMES, Event, Events, joined
from prefault.faults.text import HCR_TGE

_BATCH = 2048
"""Pages that are read together."""
_PAST_END = 4096
"""Zeros behind them, for the fields of an event that the end of a page cuts off."""

_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31
_USED = (1 << 27) - 1
_MISSED = 1 << 31
_DELTA_BITS = 27
_STAMP_TOP = np.int64(~((1 << 59) - 1))
_EL2_MODES = (8, 9)
"""EL2t and EL2h, in SPSR."""
_MODE = 0x1F

_ADDRESS = {"kvm_guest_fault": "ipa", "kvm_page_fault": "fault_address", "kvm_mmio": "gpa"}
_SYNDROME = {"kvm_guest_fault": "hsr", "kvm_page_fault": "error_code"}

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Format:
    """Where an event's fields are.

    :ivar number: of the event, in its first two bytes
    :ivar fields: name → (offset, size), from the event's start
    """

    name: str
    number: int
    fields: dict[str, tuple[int, int]]


def parse_format(name: str, text: str) -> Format:
    """Read an event's ``format`` file.

    :raises UsageError: it is none
    """
    number = re.search(r"^ID: (\d+)", text, re.MULTILINE)
    fields = {
        one: (int(offset), int(size))
        for one, offset, size in re.findall(
            r"field:[^;]*?(\w+)(?:\[\w*\])?;\s*offset:(\d+);\s*size:(\d+);", text
        )
    }
    if not number or "common_pid" not in fields:
        raise UsageError(f"the format of the event {name} cannot be read: {text[:200]!r}")
    return Format(name, int(number[1]), fields)


class Decoder:
    """Turns pages into events, a batch at a time.

    :ivar faults: faults so far
    """

    def __init__(self, head: Head) -> None:
        if head.byte_order != "little":
            raise UsageError(f"a capture of a {head.byte_order}-endian machine cannot be read")
        self._layout = head.layout
        self._formats = {
            one.number: one for name, text in head.formats.items() if (one := parse_format(name, text))
        }
        self._losses: dict[int, int] = {}
        self.faults = 0

    def decode(self, pages: Sequence[Page]) -> Events:
        """The events of some pages, page by page; they are in order within a page only."""
        parts = [self._batch(pages[at : at + _BATCH]) for at in range(0, len(pages), _BATCH)]
        events = joined(parts)
        is_fault = (events.event == Event.FAULT_ARM64) | (events.event == Event.FAULT_X86)
        self.faults += int(np.count_nonzero(is_fault))
        return events

    def _batch(self, pages: Sequence[Page]) -> Events:
        size, layout = self._layout.size, self._layout
        data = np.zeros(len(pages) * size + _PAST_END, np.uint8)
        for index, page in enumerate(pages):
            data[index * size : index * size + len(page.data)] = np.frombuffer(page.data[:size], np.uint8)
        starts = np.arange(len(pages)) * size
        commit = _load(data, starts + layout.commit, layout.commit_size)
        # What is used of a damaged page may be said to be more than there is.
        there = np.array([min(len(page.data), size) - layout.data for page in pages])
        used = np.minimum(commit & _USED, there)
        missed = commit & _MISSED != 0
        epochs = np.array([self._epoch(page, bool(one)) for page, one in zip(pages, missed, strict=True)])
        steps = list(_steps(data, starts + layout.data, starts + layout.data + used, _load(data, starts, 8)))
        if not steps:
            return joined([])
        page_of, at, time = (np.concatenate(column) for column in zip(*steps, strict=True))
        order = np.argsort(page_of, kind="stable")
        return self._events(data, at[order], time[order], epochs[page_of[order]])

    def _epoch(self, page: Page, missed: bool) -> int:
        """Losses on the page's CPU so far."""
        self._losses[page.cpu] = self._losses.get(page.cpu, 0) + missed
        return sum(self._losses.values())

    def _events(self, data: Bytes, at: Places, time: Places, epoch: Places) -> Events:
        number = _load(data, at, 2)
        count = len(at)
        event = np.zeros(count, np.uint8)
        address, syndrome = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
        vcpu = np.full(count, -1, np.int16)
        tid = np.zeros(count, np.int32)
        for one in self._formats.values():
            which = np.flatnonzero(number == one.number)
            places = at[which]
            event[which] = self._meaning(data, one, places)
            tid[which] = _field(data, one, "common_pid", places).astype(np.int32)
            if one.name in _ADDRESS:
                address[which] = _field(data, one, _ADDRESS[one.name], places).view(np.uint64)
            if one.name in _SYNDROME:
                syndrome[which] = _field(data, one, _SYNDROME[one.name], places).view(np.uint64)
            if "vcpu_id" in one.fields:
                vcpu[which] = _field(data, one, "vcpu_id", places).astype(np.int16)
        pid = np.full(count, -1, np.int32)
        events = Events(time, tid, pid, event, address, syndrome, vcpu, epoch.astype(np.int32))
        return events.take(event != 0)

    def _meaning(self, data: Bytes, one: Format, places: Places) -> npt.NDArray[np.uint8] | int:
        meaning = int(NAMES.get(one.name, 0))
        if one.name != "kvm_nested_eret":
            return meaning
        mode = _field(data, one, "spsr_el2", places) & _MODE
        tge = _field(data, one, "hcr_el2", places) & HCR_TGE != 0
        return np.where(np.isin(mode, _EL2_MODES) | tge, 0, meaning).astype(np.uint8)


def _field(data: Bytes, one: Format, name: str, places: Places) -> Places:
    if name not in one.fields:
        raise UsageError(f"the event {one.name} has no field {name} on the kernel of this capture")
    offset, size = one.fields[name]
    if size not in (1, 2, 4, 8) or offset + size > _PAST_END - 8:
        raise UsageError(
            f"the field {name} of the event {one.name}, {size} bytes at {offset}, cannot be read"
        )
    return _load(data, places + offset, size)


def _load(data: Bytes, places: Places, size: int) -> Places:
    """Little-endian numbers of ``size`` bytes, each at its place; of 8 bytes they may come out negative."""
    kind = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<i8"}[size]
    view = np.ndarray((len(data) - size + 1,), kind, data.data, strides=(1,))
    return view[places].astype(np.int64)


def _steps(data: Bytes, at: Places, end: Places, time: Places) -> Iterator[tuple[Places, Places, Places]]:
    """(page, place, time) of the n-th event of every page that has so many, n by n."""
    page = np.arange(len(at))
    while len(page):
        keep = at + 4 <= end
        page, at, end, time = page[keep], at[keep], end[keep], time[keep]
        head, first = _load(data, at, 4), _load(data, at + 4, 4)
        kind, delta = head & 31, head >> 5
        stamp = kind == _TIME_STAMP
        whole = (first << _DELTA_BITS) + delta
        time = np.where(
            stamp, whole | (time & _STAMP_TOP), time + np.where(kind == _TIME_EXTEND, whole, delta)
        )
        counted = (kind == 0) | (kind == _PADDING)  # their length is a word of its own
        length = np.where(counted, 4 + first, np.where(kind >= _TIME_EXTEND, 8, 4 + 4 * kind))
        last = (kind == _PADDING) & (delta == 0)
        length = np.where(last | (length < 4), np.int64(1 << 40), length)
        is_data = (kind < _PADDING) & (at + length <= end)
        if is_data.any():
            begin = at + np.where(kind == 0, 8, 4)
            yield page[is_data], begin[is_data], time[is_data]
        at = at + length


@dataclass
class Read:
    """What a capture has.

    :ivar events: in order of time
    :ivar tail: None if its writer was killed
    """

    head: Head
    events: Events
    tail: Tail | None = None
    pages: int = 0


def read(file: BinaryIO, name: str) -> Read:
    """Read a capture to its end.

    :raises UsageError: it is none, or damaged
    """
    frames = captured.read(file, name)
    head = next(frames, None)
    if not isinstance(head, Head):
        raise UsageError(f"{name}: a capture that was cut off before it began")
    decoder = Decoder(head)
    parts, tail, pages = [], None, 0
    for batch in _batches(frames):
        parts.append(decoder.decode([one for one in batch if isinstance(one, Page)]))
        pages += len(batch)
        tail = next((one for one in batch if isinstance(one, Tail)), tail)
    events = joined(parts)
    return Read(head, events.take(np.argsort(events.time, kind="stable")), tail, pages)


def _batches(frames: Iterable[Head | Page | Tail]) -> Iterator[list[Head | Page | Tail]]:
    batch: list[Head | Page | Tail] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
