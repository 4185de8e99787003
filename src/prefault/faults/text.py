# SPDX-License-Identifier: Apache-2.0
"""Reads traces that are text: a dump of tracefs, ``trace-cmd report``, ``perf script``.

All three print an event as task, thread, CPU, time, name and what the event's own format says::

       CPU 0/KVM-1234    (   1200) [002] d..1.   123.456789: kvm_guest_fault: ipa 0x40000000, hsr …
       CPU 0/KVM-1234    [002]   123.456789: kvm_guest_fault:      ipa 0x40000000, hsr …
       CPU 0/KVM  1234 [002]   123.456789:           kvm:kvm_guest_fault: ipa 0x40000000, hsr …

Task names may have anything in them, so that a line is read from its time stamp outwards.

Source: kernel/trace/trace_output.c, trace_print_context(); trace-cmd-report(1); perf-script(1)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from prefault.faults.digits import PAD, Flags, Places, Text, Words, mask, word
from prefault.faults.events import NAMES, Event, Events, joined

CHUNK = 2 << 20
"""Bytes read at once: large enough for numpy, small enough for the processor's cache."""
_LONGEST_LINE = 1 << 20
_CUT = b"\0"
"""Put behind a last line that has no end: its last number may have had more digits."""
_LATEST_S = np.uint64(9 * 10**9)
"""Later than this does not fit an int64 of ns; clocks of the real time are at 1.8 of it."""
_DIGITS = 20
"""Of a number of 64 bits."""
_MIX = np.uint64(0x9E37_79B9_7F4A_7C15)
"""Odd, so that a product with it loses nothing: spreads a number over a word."""
_TABLE = 1 << 16
_SHOWN = 5
"""How many bad lines are kept, to be shown."""

_LONGEST_NAME = 15
"""Bytes in a task's name (include/linux/sched.h, TASK_COMM_LEN)."""

_LOST = re.compile(
    r"^(?:.*: )? *CPU:\d+ \[(?:LOST )?(?:(\d+) )?EVENTS(?: DROPPED)?\]"
    r"|PERF_RECORD_LOST\w*:? *(?:lost )?(\d+)?"
    r"|^Processed \d+ (?:events and lost (\d+) chunks|samples and lost )",
)
_OVERWRITTEN = re.compile(r"^# entries-in-buffer/entries-written: (\d+)/(\d+)")
_HEADINGS = re.compile(
    r"^(?:#|(?:.*: )? *cpus=\d|CPU \d+ is empty|version = \d|Trace clock|trace-cmd|uname|\t| *=> |Warning:"
    r"|Check IO/CPU overload!|\s*$)"
)


_TRACE_CMD = re.compile(r"^(?:(?:.*: )? *cpus=\d|trace-cmd)")
"""Of several files or buffers, trace-cmd puts the name before each line, or as many spaces."""


@dataclass(frozen=True)
class BadLine:
    """A line that could not be read."""

    number: int
    text: str


@dataclass
class Trace:
    """What a text has.

    :ivar events: those that matter
    :ivar lines: all lines
    :ivar seen: lines that are events of whatever kind
    :ivar lost: events that the kernel says it had to drop; 1 for each time that it does not say how many
    :ivar bad: the first lines that could not be read
    :ivar threads: thread id → (process id or 0, name); of several, the last
    :ivar renamed: thread id → all names, of threads with more than one
    :ivar format: ``tracefs``, ``trace-cmd`` or ``perf``; empty if there was no event
    :ivar latency_format: tracefs' other format, which is not read
    """

    events: Events
    lines: int = 0
    seen: int = 0
    lost: int = 0
    bad_lines: int = 0
    bad: list[BadLine] = field(default_factory=list)
    threads: dict[int, tuple[int, str]] = field(default_factory=dict)
    renamed: dict[int, set[str]] = field(default_factory=dict)
    format: str = ""
    latency_format: bool = False


def read(file: BinaryIO, on_bytes: Callable[[int], None] | None = None) -> Trace:
    """Read a trace to its end.

    :param on_bytes: told how many bytes have been read
    """
    reader = _Reader()
    done = 0
    for chunk in _chunks(file):
        reader.take(chunk)
        done += len(chunk)
        if on_bytes:
            on_bytes(done)
    return reader.trace()


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    """Pieces that end with a line."""
    rest = b""
    while data := file.read(CHUNK):
        data = rest + data
        end = data.rfind(b"\n") + 1
        if not end and len(data) > _LONGEST_LINE:
            end = len(data)  # no line of a trace: it is going to be a bad one
        rest = data[end:]
        if end:
            yield data[:end]
    if rest:
        yield rest + _CUT + b"\n"


@dataclass
class _Lines:
    """The lines of a chunk that have a time stamp.

    :ivar index: of each in the chunk
    :ivar end: place of its newline
    :ivar stamp: place of the colon behind its time
    """

    index: Places
    begin: Places
    end: Places
    stamp: Places


class _Reader:
    """Takes a trace in pieces."""

    def __init__(self) -> None:
        self._parts: list[Events] = []
        self._trace = Trace(joined([]))
        self._losses = 0
        self._marks = dict.fromkeys(("tracefs", "trace-cmd", "perf"), 0)

    def trace(self) -> Trace:
        """All that was taken."""
        self._trace.events = joined(self._parts)
        if any(self._marks.values()):
            self._trace.format = max(self._marks, key=lambda name: self._marks[name])
        return self._trace

    def take(self, chunk: bytes) -> None:
        """Take whole lines."""
        text = Text(chunk)
        ends = np.flatnonzero(text.bytes == ord("\n"))
        begins = np.concatenate((np.array([PAD], ends.dtype), ends[:-1] + 1))
        lines = _with_time(text, begins, ends)
        self._other_lines(text, begins, ends, lines)
        events, good, named = self._events(text, lines)
        losses = self._loss_lines
        for index in lines.index[named & ~good][:_SHOWN]:
            self._bad(text, begins, ends, int(index), 0)
        self._trace.bad_lines += int(np.count_nonzero(named & ~good))
        if len(events):
            events.epoch[:] = self._losses + np.searchsorted(losses, lines.index[good & named])
            self._parts.append(events)
        self._losses += len(losses)
        self._trace.lines += len(ends)

    def _other_lines(self, text: Text, begins: Places, ends: Places, lines: _Lines) -> None:
        """Lines without a time stamp: headings, losses, and what is none of a trace."""
        plain = np.ones(len(ends), np.bool_)
        plain[lines.index] = False
        losses = []
        for index in np.flatnonzero(plain):
            line = text.slice(int(begins[index]), min(int(ends[index]), int(begins[index]) + 200))
            if loss := _LOST.search(line):
                self._trace.lost += _how_many(loss)
                losses.append(index)
            elif overwritten := _OVERWRITTEN.match(line):
                kept, written = map(int, overwritten.groups())
                self._trace.lost += written - kept
            elif not _HEADINGS.match(line):
                self._bad(text, begins, ends, int(index), 1)
            if line.startswith("# tracer:"):
                self._marks["tracefs"] += CHUNK
            elif line.startswith("#") and " latency trace v" in line:
                self._trace.latency_format = True
            elif _TRACE_CMD.match(line):
                self._marks["trace-cmd"] += CHUNK
        self._loss_lines = np.array(losses, np.int64)

    def _bad(self, text: Text, begins: Places, ends: Places, index: int, count: int) -> None:
        self._trace.bad_lines += count
        if len(self._trace.bad) < _SHOWN:
            begin, end = int(begins[index]), int(ends[index])
            shown = text.slice(begin, min(end, begin + 160)).rstrip("\r\0").replace("\t", " ")
            shown = "".join(one if one.isprintable() else "\ufffd" for one in shown)  # a terminal obeys some
            self._trace.bad.append(BadLine(self._trace.lines + index + 1, shown))

    def _events(self, text: Text, lines: _Lines) -> tuple[Events, Flags, Flags]:
        """The events, which lines are good, and which are of an event that matters.

        A line without a task and a CPU before its time is named, so that it counts as bad.
        """
        heads = _heads(text, lines)
        event = _named(text, lines, heads.name)
        payload = _payloads(text, lines, heads.name, event)
        good = heads.good & payload.good & (event != 0)
        self._trace.seen += int(np.count_nonzero(heads.good))
        self._note(text, heads, good)
        self._perf_losses(text, lines, heads)
        found = Events(
            time=heads.time[good],
            tid=heads.tid[good].astype(np.int32),
            pid=heads.pid[good].astype(np.int32),
            event=event[good],
            address=payload.address[good],
            syndrome=payload.syndrome[good],
            vcpu=payload.vcpu[good],
            epoch=np.zeros(int(np.count_nonzero(good)), np.int32),
        )
        return found, good, (event != 0) | ~heads.good

    def _perf_losses(self, text: Text, lines: _Lines, heads: _Heads) -> None:
        """perf's records of losses have a time stamp, as events have."""
        which = np.flatnonzero(text.words_at(heads.name) == word("PERF_REC"))
        for index in which:
            if loss := _LOST.search(text.slice(int(heads.name[index]), int(lines.end[index]))):
                self._trace.lost += _how_many(loss)
        self._loss_lines = np.sort(np.concatenate((self._loss_lines, lines.index[which])))

    def _note(self, text: Text, heads: _Heads, good: Flags) -> None:
        """Take note of names, and of what kind of trace this is."""
        which = np.flatnonzero(good)
        if not len(which):
            return
        self._marks["perf"] += int(np.count_nonzero(heads.is_perf[which]))
        self._marks["tracefs"] += int(np.count_nonzero(heads.has_flags[which]))
        self._marks["trace-cmd"] += int(np.count_nonzero(~(heads.is_perf | heads.has_flags)[which]))
        for index in which[_distinct(text, heads, which)]:
            tid, pid = int(heads.tid[index]), max(0, int(heads.pid[index]))
            end = int(heads.name_end[index])
            # What else stands before a name is the file that trace-cmd has it from.
            name = text.slice(max(int(heads.begin[index]), end - _LONGEST_NAME), end).strip()
            if name in ("<...>", f":{tid}"):
                name = ""
            before = self._trace.threads.get(tid, (0, ""))
            self._trace.threads[tid] = (pid or before[0], name or before[1])
            if name and before[1] not in ("", name):
                self._trace.renamed.setdefault(tid, {before[1]}).add(name)


def _distinct(text: Text, heads: _Heads, which: Places) -> Places:
    """One of the lines of each thread, process and end of a name, in their order: indices of ``which``.

    A thread has several if its name or process became known late, or if it is no thread.
    """
    key = text.words_at(heads.name_end[which] - 8)
    for numbers in (heads.tid[which].astype(np.uint64), heads.pid[which].astype(np.uint64)):
        key = (key ^ numbers) * _MIX
    # Sorting all of them would take a tenth of the reading: only those go there that share a place.
    lines = np.arange(len(key))
    last = np.empty(_TABLE, np.int64)
    place = (key >> np.uint64(48)).astype(np.int64)
    last[place] = lines
    of_place = last[place]
    others = np.flatnonzero(key[of_place] != key)
    _, first = np.unique(key[others], return_index=True)
    return np.sort(np.concatenate((np.flatnonzero(of_place == lines), others[first])))


def _how_many(loss: re.Match[str]) -> int:
    """Events that were lost there; 1 if that is not told, so that it is never nothing."""
    return sum(int(number) for number in loss.groups() if number) or 1


def _with_time(text: Text, begins: Places, ends: Places) -> _Lines:
    """Lines that have ``seconds.fraction:`` in them; the first such place counts."""
    colons = np.flatnonzero(text.bytes == ord(":"))
    dot = ord(".")
    micro, nano = text.bytes[colons - 7] == dot, text.bytes[colons - 10] == dot
    colons = colons[(micro | nano) & np.isin(text.bytes[colons + 1], (ord(" "), ord("\t")))]
    _, digits = text.decimal_before(colons)
    colons = colons[(digits == 6) | (digits == 9)]
    index = np.searchsorted(ends, colons)
    first = np.ones(len(index), np.bool_)
    first[1:] = index[1:] != index[:-1]
    index, colons = index[first], colons[first]
    return _Lines(index, begins[index], ends[index], colons)


@dataclass
class _Heads:
    """What stands before and right behind the time stamps, a value for each line."""

    good: Flags
    time: Places
    tid: Words
    pid: Places
    begin: Places
    name_end: Places
    """Where the task's name ends."""
    name: Places
    """Where the event's name begins."""
    is_perf: Flags
    has_flags: Flags


def _heads(text: Text, lines: _Lines) -> _Heads:
    fraction, digits = text.decimal_before(lines.stamp)
    dot = lines.stamp - digits - 1
    seconds, length = text.decimal_before(dot)
    time = seconds.astype(np.int64) * 10**9 + fraction.astype(np.int64) * np.where(digits == 6, 1000, 1)
    closing = _last_before(text, "]", dot)
    cpu_end = np.maximum(closing, lines.begin)
    _, cpu_digits = text.decimal_before(cpu_end)
    opening = cpu_end - cpu_digits - 1
    good = (length > 0) & (closing > lines.begin) & (cpu_digits > 0) & (text.bytes[opening] == ord("["))
    good &= seconds < _LATEST_S
    between = dot - length - cpu_end - 1
    has_flags = between > text.spaces_before(dot - length)
    good &= between < 32
    pid, at = _tgid(text, opening - text.spaces_before(opening))
    tid, tid_digits = text.decimal_before(at)
    name_end = at - tid_digits - 1
    separator = text.bytes[name_end]
    slash = separator == ord("/")  # perf's pid/tid
    if slash.any():
        told, pid_digits = text.decimal_before(name_end)
        pid = np.where(slash, told.astype(np.int64), pid)
        name_end = np.where(slash, name_end - pid_digits - 1, name_end)
    good &= (tid_digits > 0) & (tid_digits < 10) & (name_end >= lines.begin)
    is_perf = slash | (separator == ord(" "))
    # A space before the hyphen makes it a sign: perf knows no thread there.
    good &= is_perf | ((separator == ord("-")) & (text.bytes[name_end - 1] != ord(" ")))
    name_end = name_end - text.spaces_before(name_end)
    name = lines.stamp + 1
    name = _behind_a_number(text, name + text.spaces_after(name))
    is_ns = (text.words_at(name) & mask(4)) == word("kvm:")
    return _Heads(good, time, tid, pid, lines.begin, name_end, name + 4 * is_ns, is_perf, has_flags)


def _behind_a_number(text: Text, places: Places) -> Places:
    """Where the next word begins, if a number stands there: perf's period (``-F +period``)."""
    number = (text.bytes[places] >= ord("0")) & (text.bytes[places] <= ord("9"))
    if not number.any():
        return places
    at = places.copy()
    for _ in range(_DIGITS):
        digit = number & (text.bytes[at] >= ord("0")) & (text.bytes[at] <= ord("9"))
        if not digit.any():
            break
        at = at + digit
    spaces = text.spaces_after(at)
    return np.where(number & (spaces > 0), at + spaces, places)


def _last_before(text: Text, character: str, places: Places) -> Places:
    """The last place of a character before each place, 0 if there is none."""
    found = np.flatnonzero(text.bytes == ord(character))
    if not len(found):
        return np.zeros(len(places), np.int64)
    index = np.searchsorted(found, places) - 1
    return np.where(index >= 0, found[index], 0)


def _tgid(text: Text, ends: Places) -> tuple[Places, Places]:
    """The process id in ``(   1200)``, -1 if there is none, and where the thread's id ends."""
    has = text.bytes[ends - 1] == ord(")")
    if not has.any():
        return np.full(len(ends), -1, np.int64), ends
    told, digits = text.decimal_before(ends - 1)
    opening = _last_before(text, "(", ends)  # the column has seven places; five before Linux 5.9
    before = opening - text.spaces_before(opening)
    pid = np.where(has & (digits > 0), told.astype(np.int64), -1)
    return pid, np.where(has, before, ends)


def _named(text: Text, lines: _Lines, names: Places) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The event of each line, 0 for those that do not matter."""
    event = np.zeros(len(names), np.uint8)
    words = [text.words_at(names)]
    candidates = np.flatnonzero((words[0] & mask(4)) == word("kvm_"))
    places = names[candidates]
    words = [words[0][candidates], *(text.words_at(places + 8 * number) for number in (1, 2, 3))]
    for name, meaning in NAMES.items():
        matches = np.ones(len(candidates), np.bool_)
        for number in range(0, len(name) + 1, 8):
            part = f"{name}:"[number : number + 8]
            matches &= (words[number // 8] & mask(len(part))) == word(part)
        event[candidates[matches]] = meaning
    return event


@dataclass
class _Payloads:
    """What the events' own text says."""

    good: Flags
    address: Words
    syndrome: Words
    vcpu: np.ndarray[tuple[int], np.dtype[np.int16]]


def _payloads(
    text: Text, lines: _Lines, names: Places, event: np.ndarray[tuple[int], np.dtype[np.uint8]]
) -> _Payloads:
    count = len(names)
    found = _Payloads(
        np.ones(count, np.bool_),
        np.zeros(count, np.uint64),
        np.zeros(count, np.uint64),
        np.full(count, -1, np.int16),
    )
    readers = (
        (Event.FAULT_ARM64, "kvm_guest_fault:", _guest_fault),
        (Event.FAULT_X86, "kvm_page_fault:", _page_fault),
        (Event.MMIO, "kvm_mmio:", _mmio),
    )
    for meaning, name, reader in readers:
        which = np.flatnonzero(event == meaning)
        if len(which):
            begin = names[which] + len(name)
            reader(text, begin + text.spaces_after(begin), lines.end[which], found, which)
    nested = np.flatnonzero(event == Event.NESTED_IN)
    for index in nested:
        payload = text.slice(int(names[index]), int(lines.end[index]))
        if not enters_l2(payload):
            event[index] = 0
    return found


def enters_l2(payload: str) -> bool:
    """Whether an arm64 ``kvm_nested_eret`` goes to L2: below EL2, and not to the user space of an L1 (TGE).

    x86's events always do.
    """
    match = re.search(r"kvm_nested_eret: .*\(M: (\w+)\) hcr_el2: (?:0x)?([0-9a-f]+)", payload)
    if not match:
        return True
    return not match[1].startswith("EL2") and not int(match[2], 16) & HCR_TGE


HCR_TGE = 1 << 27


def _guest_fault(text: Text, places: Places, ends: Places, found: _Payloads, which: Places) -> None:
    """``ipa 0x40000000, hsr 0x92000007, hxfar 0x40000000, pc 0x…``"""
    good = (text.words_at(places) & mask(4)) == word("ipa ")
    ipa, after = text.hex_at(places + 4)
    good &= (after > places + 4) & ((text.words_at(after) & mask(6)) == word(", hsr "))
    esr, last = text.hex_at(after + 6)
    good &= (last > after + 6) & (last <= ends) & (text.bytes[last] == ord(","))
    found.good[which], found.address[which], found.syndrome[which] = good, ipa, esr


_ENDS = tuple(b"\r\n ")


def _page_fault(text: Text, places: Places, ends: Places, found: _Payloads, which: Places) -> None:
    """``vcpu 0 rip 0x… address 0x… error_code 0x…``; before Linux 6.2 without the first two."""
    has_vcpu = (text.words_at(places) & mask(5)) == word("vcpu ")
    vcpu, digits = text.decimal_at(places + 5)
    rip = places + 5 + digits
    good = ~has_vcpu | ((digits > 0) & ((text.words_at(rip) & mask(5)) == word(" rip ")))
    _, after = text.hex_at(rip + 5)
    address_at = np.where(has_vcpu, after + 1, places)
    good &= text.words_at(address_at) == word("address ")
    address, after = text.hex_at(address_at + 8)
    good &= (after > address_at + 8) & (text.words_at(after) == word(" error_c"))
    good &= (text.words_at(after + 8) & mask(4)) == word("ode ")
    code, last = text.hex_at(after + 12)
    good &= (last > after + 12) & np.isin(text.bytes[last], _ENDS)
    found.good[which], found.address[which], found.syndrome[which] = good, address, code
    found.vcpu[which] = np.where(has_vcpu, np.minimum(vcpu, np.uint64(0x7FFF)).astype(np.int16), -1)


def _mmio(text: Text, places: Places, ends: Places, found: _Payloads, which: Places) -> None:
    """``mmio write len 8 gpa 0x9000010 val 0x0``; the address stands between ``gpa`` and ``val``."""
    at = places.copy()
    for _ in range(5):  # mmio, write or unsatisfied-read, len, 8, gpa
        at = _next_word(text, at, ends)
    address, last = text.hex_at(at)
    good = (last > at) & (text.bytes[last] == ord(" ")) & ((text.words_at(at - 4) & mask(4)) == word("gpa "))
    found.good[which], found.address[which] = good, address


def _next_word(text: Text, places: Places, ends: Places) -> Places:
    """Where the next word begins: behind the first space, which is within 24 characters."""
    at = places.copy()
    for _ in range(24):
        moving = (text.bytes[at] != ord(" ")) & (at < ends)
        if not moving.any():
            break
        at = at + moving
    return np.minimum(at + 1, ends)
