# SPDX-License-Identifier: Apache-2.0
"""Counts stage-2 faults with a tracepoint of KVM's, in a trace instance of its own.

That is kvm:kvm_guest_fault on arm64, which stands after KVM has dealt with faults that are not the guest's
own doing, and kvm:kvm_page_fault on x86: one line is one fault taken. Each one costs the traced kernel a few
hundred instructions: measure time in another run.

Source: Documentation/trace/ftrace.rst, arch/arm64/kvm/trace_arm.h, arch/x86/kvm/trace.h
"""

from __future__ import annotations

import atexit
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from prefault.errors import CapabilityMissing, PrefaultError
from prefault.kvm import tracefs
from prefault.machine import FaultCounts

_BYTES_PER_EVENT = 96
_MIN_BUFFER_KIB, _MAX_BUFFER_KIB = 2 << 10, 64 << 10

_HEAD = r"-(\d+) +(?:\([ \d-]+\) +)?\[\d+\].* "
_ARM64_LINE = re.compile(_HEAD + r"kvm_guest_fault: ipa (?:0x)?([0-9a-f]+), hsr (?:0x)?([0-9a-f]+),")
_X86_LINE = re.compile(
    _HEAD + r"kvm_page_fault: .*address (?:0x)?([0-9a-f]+) error_code (?:0x)?([0-9a-f]+)", re.IGNORECASE
)

_EC_SHIFT = 26
_EC_INSTRUCTION_ABORT = 0x20
_WNR = 1 << 6
_CACHE_MAINTENANCE = 1 << 8
_FSC_KIND = 0x3C
_FSC_PERMISSION = 0x0C


_PF_PRESENT, _PF_WRITE, _PF_RESERVED, _PF_FETCH = 1 << 0, 1 << 1, 1 << 3, 1 << 4


def add(counts: FaultCounts, ipa: int, esr: int) -> None:
    """Count a fault on memory, by arm64's syndrome."""
    counts.ipas.append(ipa)
    if esr >> _EC_SHIFT == _EC_INSTRUCTION_ABORT:
        counts.execute += 1
    elif esr & _WNR and not esr & _CACHE_MAINTENANCE:
        counts.write += 1
    else:
        counts.read += 1
    if esr & _FSC_KIND == _FSC_PERMISSION:
        counts.permission += 1


def add_x86(counts: FaultCounts, ipa: int, code: int) -> None:
    """Count a fault on memory, by x86's error code."""
    counts.ipas.append(ipa)
    if code & _PF_FETCH:
        counts.execute += 1
    elif code & _PF_WRITE:
        counts.write += 1
    else:
        counts.read += 1
    if code & _PF_PRESENT and not code & _PF_RESERVED:
        counts.permission += 1


@dataclass(frozen=True)
class FaultEvent:
    """A tracepoint that tells of stage-2 faults.

    :ivar path: in tracefs
    :ivar line: what a line of it is: thread, IPA and syndrome
    :ivar add: counts one, by IPA and syndrome
    """

    path: str
    line: re.Pattern[str]
    add: Callable[[FaultCounts, int, int], None]

    def parse(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(thread, IPA, syndrome) of each fault in a trace."""
        for thread, ipa, syndrome in self.line.findall(text):
            yield int(thread), int(ipa, 16), int(syndrome, 16)


ARM64 = FaultEvent("events/kvm/kvm_guest_fault", _ARM64_LINE, add)
X86 = FaultEvent("events/kvm/kvm_page_fault", _X86_LINE, add_x86)


class TraceInstance:
    """A trace buffer that sees this process's threads, present and future, and only them."""

    def __init__(self, event: FaultEvent, events: int) -> None:
        self._event = event.path
        if not tracefs.has(self._event):
            raise CapabilityMissing(
                f"{tracefs.TRACEFS / self._event} is not there, so stage-2 faults cannot be counted; it "
                "needs root, a mounted tracefs, and a kernel with KVM and CONFIG_FTRACE or "
                "CONFIG_ENABLE_DEFAULT_TRACERS"
            )
        self._instance = tracefs.Instance("counting stage-2 faults")
        self._kib = min(_MAX_BUFFER_KIB, max(_MIN_BUFFER_KIB, events * _BYTES_PER_EVENT >> 10))
        try:
            self._instance.write("buffer_size_kb", str(self._kib))
            self._instance.write("options/event-fork", "1")
        except BaseException:
            self.close()
            raise

    def fits(self, events: int) -> bool:
        """Whether it is there and big enough."""
        return self._instance.is_there and events <= self.room

    @property
    def room(self) -> int:
        """How many events are sure to have room."""
        return (self._kib << 10) // _BYTES_PER_EVENT

    def start(self) -> None:
        """Begin with an empty trace."""
        self._instance.write("trace", "")
        threads = " ".join(task.name for task in Path("/proc/self/task").iterdir())
        self._instance.write("set_event_pid", threads)
        self._instance.write("tracing_on", "1")
        self._instance.write(f"{self._event}/enable", "1")

    def stop(self) -> str:
        """Stop tracing; the trace.

        :raises PrefaultError: the buffer was too small, so that events were lost
        """
        self.pause()
        lost = self._instance.total("overrun", "dropped events")
        if lost:
            raise PrefaultError(
                f"{lost} trace events were lost, so stage-2 faults cannot be counted; "
                "count over a shorter interval or with smaller memslots"
            )
        return self._instance.read("trace")

    def pause(self) -> None:
        """Trace nothing until the next start."""
        self._instance.write(f"{self._event}/enable", "0")
        self._instance.write("tracing_on", "0")

    def close(self) -> None:
        """Remove the instance. Safe to call again."""
        self._instance.close([self._event])


_idle: list[TraceInstance] = []
"""Removing an instance takes the kernel a grace period, so that one is kept for the next interval."""


def _take(event: FaultEvent, events: int) -> TraceInstance:
    while _idle:
        trace = _idle.pop()
        if trace.fits(events):
            return trace
        trace.close()
    return TraceInstance(event, events)


def _give_back(trace: TraceInstance) -> None:
    try:
        trace.pause()
    except OSError:
        trace.close()
    else:
        _idle.append(trace)


@atexit.register
def _close_idle() -> None:
    while _idle:
        _idle.pop().close()


class KvmFaultCounter:
    """Counts the faults of one VM: of the threads that ran its vCPUs.

    :param event: the architecture's
    :param threads: thread ids that have run a vCPU of the VM, read when the context closes
    :param is_memory: whether an IPA is in a memslot
    """

    def __init__(
        self, event: FaultEvent, events: int, threads: set[int], is_memory: Callable[[int], bool]
    ) -> None:
        self._event = event
        self._events = events
        self._threads = threads
        self._is_memory = is_memory
        self._counts = FaultCounts()
        self._trace: TraceInstance | None = None

    def __enter__(self) -> FaultCounts:
        self._threads.clear()
        self._counts = FaultCounts()
        self._trace = _take(self._event, self._events)
        self._trace.start()
        return self._counts

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._trace is not None
        try:
            if kind is None:
                for thread, ipa, syndrome in self._event.parse(self._trace.stop()):
                    if thread in self._threads:
                        self._count(ipa, syndrome)
        finally:
            _give_back(self._trace)

    def _count(self, ipa: int, syndrome: int) -> None:
        if self._is_memory(ipa):
            self._event.add(self._counts, ipa, syndrome)
        else:
            self._counts.mmio += 1
