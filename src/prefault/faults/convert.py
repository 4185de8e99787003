# SPDX-License-Identifier: Apache-2.0
"""Makes recordings of files that people have, and of captures.

Failure modes, each a ``UsageError`` that says what to do: the file cannot be read, is empty, is of a kind
that another tool reads (trace.dat, perf.data, compressed), or has no stage-2 fault in it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from prefault.errors import UsageError
from prefault.faults import captured, ring, text
from prefault.faults.events import Event, Events, faults_in
from prefault.faults.recording import Columns, Metadata, Recording
from prefault.faults.text import BadLine
from prefault.report.units import plural

OnBytes = Callable[[int], None]

_OTHER_FILES = (
    (b"\x17\x08Dtracing", "a trace.dat", "trace-cmd report -i {0} > trace.txt"),
    (b"PERFILE2", "a perf.data", "perf script -i {0} > trace.txt"),
    (b"2ELIFREP", "a perf.data of a big-endian machine", "perf script -i {0} > trace.txt"),
    (b"PAR1", "a recording already", "prefault plan {0}"),
    (b"\x1f\x8b", "compressed", "zcat {0} > trace.txt"),
    (b"\x28\xb5\x2f\xfd", "compressed", "zstdcat {0} > trace.txt"),
    (b"\xfd7zXZ", "compressed", "xzcat {0} > trace.txt"),
    (b"BZh", "compressed", "bzcat {0} > trace.txt"),
    (b"\x04\x22\x4d\x18", "compressed", "lz4cat {0} > trace.txt"),
    (b"\xff\xfe", "in UTF-16", "iconv -f UTF-16 -t UTF-8 {0} > trace.txt"),
    (b"\xfe\xff", "in UTF-16", "iconv -f UTF-16 -t UTF-8 {0} > trace.txt"),
)
"""How a file begins, what it is, and what makes it readable."""

_STDIN = Path("standard input")
"""What it is called."""

_VCPU = re.compile(r"v?cpu\D{0,2}(\d{1,4})", re.IGNORECASE)
"""Names of vCPU threads: ``CPU 0/KVM`` (QEMU), ``fc_vcpu 0`` (Firecracker), ``vcpu0`` (Cloud Hypervisor),
``crosvm_vcpu0``, ``kvm-vcpu-0`` (kvmtool)."""


@dataclass(frozen=True)
class Converted:
    """A recording, and what was seen on the way to it.

    :ivar lines: of a text; 0 for a capture
    :ivar events: of all kinds
    :ivar bad: the first lines that could not be read
    :ivar cut_off: the capture's writer was killed
    :ivar backwards: lines of a text whose time is before that of the line above
    :ivar mixed: thread id → the vCPUs of which the text calls it the thread, where they are several
    """

    recording: Recording
    lines: int
    events: int
    bad: tuple[BadLine, ...] = ()
    cut_off: bool = False
    mixed: dict[int, tuple[int, ...]] = field(default_factory=dict)
    backwards: int = 0


def convert(path: Path, page_size: int = 4096, on_bytes: OnBytes | None = None) -> Converted:
    """Make a recording of a trace or a capture.

    :param path: the file; ``-`` is standard input
    :param page_size: of the host, for texts, which do not tell
    :raises UsageError: see the module
    """
    try:
        if str(path) == "-":
            if sys.stdin is None:
                raise UsageError("--from -: standard input is closed; give it a trace, or name a file")
            with open(sys.stdin.fileno(), "rb", closefd=False) as file:
                return _convert(file, _STDIN, page_size, on_bytes)
        with path.open("rb") as file:
            return _convert(file, path, page_size, on_bytes)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error


def convert_bytes(data: bytes, name: str, page_size: int = 4096) -> Converted:
    """As ``convert``, of a trace or a capture that is no file here, but came out of the lab for instance.

    :param name: for messages
    """
    return _convert(BufferedReader(BytesIO(data)), Path(name), page_size, None)


def _convert(file: BufferedReader, path: Path, page_size: int, on_bytes: OnBytes | None) -> Converted:
    begin = file.peek(64)
    if not begin:
        raise UsageError(f"{path}: is empty")
    if begin.startswith(captured.MAGIC):
        return _of_capture(file, path)
    for magic, what, remedy in _OTHER_FILES:
        if begin.startswith(magic):
            name = "FILE" if path == _STDIN else shlex.quote(str(path))
            raise UsageError(f"{path}: is {what}; run `{remedy.format(name)}`")
    return _of_text(file, path, page_size, on_bytes)


def _of_text(file: BinaryIO, path: Path, page_size: int, on_bytes: OnBytes | None) -> Converted:
    trace = text.read(file, on_bytes)
    faults = faults_in(trace.events)
    if not len(faults):
        raise UsageError(f"{path}: {_why_nothing(trace)}")
    when = ""
    with contextlib.suppress(OSError):
        when = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
    metadata = Metadata(
        architecture=_architecture(trace.events, path),
        page_size=page_size,
        source=os.fsencode(path.name).decode(errors="replace"),
        format=trace.format,
        recorded=when,
        seconds=_span(trace.events),
        lost_events=trace.lost,
        bad_lines=trace.bad_lines,
        threads=trace.threads,
    )
    unknown = faults.pid <= 0
    if known := {tid: pid for tid, (pid, _) in trace.threads.items() if pid}:
        faults.pid[unknown] = _looked_up(faults.tid[unknown], known, -1)
    recording = Recording(metadata, with_vcpus(faults, trace.threads))
    mixed = _mixed(trace, recording.faults)
    # Which entry follows which exit is not known there.
    recording.faults.duration_ns[np.isin(recording.faults.tid, list(mixed))] = -1
    backwards = int(np.count_nonzero(np.diff(trace.events.time) < 0))
    return Converted(recording, trace.lines, trace.seen, tuple(trace.bad), mixed=mixed, backwards=backwards)


def _mixed(trace: text.Trace, faults: Columns) -> dict[int, tuple[int, ...]]:
    """Threads that are several: perf script prints processes as threads if it is not asked for both."""
    if trace.format != "perf":
        return {}
    found: dict[int, set[int]] = {
        tid: {number for name in names if (number := _vcpu(name)) is not None}
        for tid, names in trace.renamed.items()
    }
    known = faults.vcpu >= 0
    for pair in np.unique(faults.tid[known].astype(np.int64) << 16 | faults.vcpu[known]).tolist():
        found.setdefault(pair >> 16, set()).add(pair & 0xFFFF)
    return {tid: tuple(sorted(vcpus)) for tid, vcpus in found.items() if len(vcpus) > 1}


def _why_nothing(trace: text.Trace) -> str:
    if trace.latency_format:
        return (
            "is in tracefs' latency format, without the times of a clock: `echo 0 > options/latency-format` "
            "before it is read"
        )
    if not trace.seen:
        shown = f"; its first line is {trace.bad[0].text!r}" if trace.bad else ""
        return (
            f"no line of {trace.lines:,} is one of a trace{shown}. What is read: `trace-cmd report`, "
            "`perf script`, and tracefs' trace, with times in seconds (not trace-cmd report -l, -R or "
            "--ts-diff, nor a clock that counts, as counter and x86-tsc do), and of perf script's fields "
            "comm, tid, cpu, time, event and trace"
        )
    shown = f" (the first: {trace.bad[0].text!r})" if trace.bad else ""
    return (
        f"{plural(trace.seen, 'event')}, but none is a stage-2 fault (kvm_guest_fault on arm64, "
        f"kvm_page_fault on x86), and {plural(trace.bad_lines, 'line')} could not be read{shown}; record "
        "with -e kvm:kvm_guest_fault -e kvm:kvm_page_fault -e kvm:kvm_exit -e kvm:kvm_entry -e kvm:kvm_mmio, "
        "and print times as they are (no --ts-diff, no --deltatime)"
    )


def _architecture(events: Events, path: Path) -> str:
    arm64 = bool(np.any(events.event == Event.FAULT_ARM64))
    x86 = bool(np.any(events.event == Event.FAULT_X86))
    if arm64 and x86:
        raise UsageError(f"{path}: has faults of arm64 and of x86: these are two recordings, split the file")
    return "aarch64" if arm64 else "x86_64"


def _span(events: Events) -> float:
    return float(events.time.max() - events.time.min()) / 1e9 if len(events) else 0.0


def _of_capture(file: BinaryIO, path: Path) -> Converted:
    found = ring.read(file, str(path))
    head, tail = found.head, found.tail
    threads = tail.threads if tail else {}
    faults = faults_in(found.events)
    used = set(np.unique(faults.tid).tolist())
    threads = {tid: about for tid, about in threads.items() if tid in used}
    pids = {tid: pid for tid, (pid, _) in threads.items() if pid}
    if head.pid is not None:
        pids = dict.fromkeys(used, head.pid)
    faults.pid[:] = _looked_up(faults.tid, pids, -1)
    metadata = Metadata(
        architecture=head.machine,
        page_size=head.page_size,
        kernel=head.kernel,
        source="live" if head.pid is None else f"live, process {head.pid}",
        format="capture",
        clock=head.clock,
        recorded=head.began,
        seconds=tail.seconds if tail else _span(found.events),
        lost_events=tail.lost if tail else 0,
        threads=threads,
    )
    recording = Recording(metadata, with_vcpus(faults, threads))
    return Converted(recording, 0, len(found.events), cut_off=tail is None)


def with_vcpus(faults: Columns, threads: dict[int, tuple[int, str]]) -> Columns:
    """The faults with the vCPU's number where the trace does not have it and the thread's name tells."""
    named = {tid: vcpu for tid, (_, name) in threads.items() if (vcpu := _vcpu(name)) is not None}
    by_name = _looked_up(faults.tid, named, -1).astype(np.int16)
    faults.vcpu = np.where(faults.vcpu >= 0, faults.vcpu, by_name)
    return faults


def _vcpu(name: str) -> int | None:
    """The number of the vCPU whose thread is called so."""
    match = _VCPU.search(name)
    return int(match[1]) if match else None


def _looked_up(keys: np.ndarray, values: dict[int, int], otherwise: int) -> np.ndarray:
    """A dictionary's value for each key."""
    unique, inverse = np.unique(keys, return_inverse=True)
    found = np.array([values.get(int(key), otherwise) for key in unique], np.int32)
    return found[inverse] if len(unique) else np.empty(0, np.int32)
