# SPDX-License-Identifier: Apache-2.0
"""Captures the stage-2 faults of live VMs: tracefs' binary pages, copied into a file as they are.

Text of ``trace_pipe`` would cost the kernel more than a fault does; a page of some eighty events costs one
``read``. The trace instance is this capture's own and goes away with it, whatever happens.

``python3 -m prefault.faults.capture --pid 4711 --seconds 10 --output FILE`` is for machines that have the
standard library only; ``prefault record`` does the same and turns it into a recording.

Source: Documentation/trace/ftrace.rst; include/trace/events/kvm.h, arch/*/kvm/trace*.h
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import BinaryIO, NoReturn

from prefault.errors import CapabilityMissing, ExitCode, PrefaultError, UsageError
from prefault.faults import captured
from prefault.faults.captured import Head, Kind, Layout, Page, Tail
from prefault.kvm import tracefs

PROC = Path("/proc")

TICK_SECONDS = 0.05
_LOOK_SECONDS = 1.0
"""How often to look at threads and counters."""
_LOOK_EVERYWHERE_SECONDS = 5.0

FAULT_EVENTS = ("kvm_guest_fault", "kvm_page_fault")
"""One of these is there: arm64's or x86's."""
_TIMING_EVENTS = ("kvm_exit", "kvm_entry")
_OTHER_EVENTS = (
    "kvm_mmio",
    "kvm_nested_eret",
    "kvm_inject_nested_exception",
    "kvm_nested_vmenter",
    "kvm_nested_vmrun",
    "kvm_nested_vmexit_inject",
)
EXIT_FILTERS = {
    "kvm_guest_fault": "esr_ec == 0x20 || esr_ec == 0x24",
    "kvm_page_fault": "exit_reason == 48 || exit_reason == 49 || exit_reason == 0x400",
}
"""Exits that are no faults (timers, interrupts, WFI) are left out by the kernel: arm64's instruction and data
aborts; EPT violation, EPT misconfiguration, nested page fault."""


@dataclass(frozen=True)
class CaptureConfig:
    """What to capture.

    :ivar pid: of a VMM, whose threads, present and future, are watched; None for all VMs
    :ivar seconds: how long; None until something else ends it
    :ivar durations: also note when the guest stopped and went on, which is two more events for each fault
    :ivar buffer: bytes of trace buffer for each CPU
    """

    pid: int | None = None
    seconds: float | None = None
    durations: bool = True
    buffer: int = 8 << 20


@dataclass(frozen=True)
class State:
    """How far a capture is.

    :ivar events: captured so far, of all kinds
    """

    seconds: float
    events: int
    lost: int


@dataclass(frozen=True)
class Captured:
    """How a capture ended.

    :ivar why: ``time``, ``interrupted``, or ``process`` (the VMM ended)
    """

    why: str
    seconds: float
    events: int
    lost: int


def processes_with_vms() -> list[int]:
    """Process ids of the VMMs on this host, as far as this user may see."""
    found = []
    for folder in PROC.iterdir():
        if folder.name.isdecimal() and _has_vm(int(folder.name)):
            found.append(int(folder.name))
    return sorted(found)


def _has_vm(pid: int) -> bool:
    with contextlib.suppress(OSError):
        for link in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                if str(link.readlink()).startswith("anon_inode:kvm-v"):
                    return True
    return False


def check_process(pid: int) -> None:
    """Whether a process can be watched.

    :raises UsageError: it is not there, or has no VM
    :raises CapabilityMissing: this user may not see whether it has
    """
    if not (PROC / str(pid)).is_dir():
        raise UsageError(f"--pid {pid}: there is no such process")
    if not os.access(PROC / str(pid) / "fd", os.R_OK | os.X_OK):
        raise CapabilityMissing(f"--pid {pid}: whether that process has a VM may not be seen: run as root")
    if not _has_vm(pid):
        others = ", ".join(map(str, processes_with_vms()))
        raise UsageError(
            f"--pid {pid}: that process has no VM; "
            + (f"these have: {others}" if others else "no process has")
        )


class _Threads:
    """Thread ids, and whose they are."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self._next = 0.0
        self.seen: dict[int, tuple[int, str]] = {}

    def look(self, now: float) -> None:
        """Take note of the threads that there are."""
        if self._pid is None and now < self._next:
            return
        self._next = now + _LOOK_EVERYWHERE_SECONDS
        for pid in processes_with_vms() if self._pid is None else [self._pid]:
            for thread in threads_of(pid):
                with contextlib.suppress(OSError):
                    comm = (PROC / str(pid) / "task" / str(thread) / "comm").read_text(errors="replace")
                    self.seen[thread] = (pid, comm.rstrip("\n"))

    def add_saved(self, saved: dict[int, tuple[int, str]]) -> None:
        """Add what the kernel remembers of threads that were gone when they were looked for."""
        for thread, (pid, comm) in saved.items():
            if thread not in self.seen:
                self.seen[thread] = (pid or self._pid or 0, comm)


def threads_of(pid: int) -> list[int]:
    """The threads of a process; none if it is gone."""
    try:
        return sorted(int(task.name) for task in (PROC / str(pid) / "task").iterdir())
    except OSError:
        return []


class _Source:
    """The trace instance, set up; its pages."""

    def __init__(self, config: CaptureConfig) -> None:
        self.fault_event = next((name for name in FAULT_EVENTS if tracefs.has(f"events/kvm/{name}")), "")
        if not self.fault_event:
            raise CapabilityMissing(
                f"{tracefs.TRACEFS}/events/kvm has neither of {', '.join(FAULT_EVENTS)}: recording needs "
                "root, a mounted tracefs, KVM (modprobe kvm_intel or kvm_amd on x86) and a kernel with "
                "CONFIG_FTRACE"
            )
        wanted = (self.fault_event, *(_TIMING_EVENTS if config.durations else ()), *_OTHER_EVENTS)
        self.names = [name for name in wanted if tracefs.has(f"events/kvm/{name}")]
        self._instance = tracefs.Instance("recording stage-2 faults")
        try:
            self._set_up(config)
            self.layout = captured.layout(self._instance.read("events/header_page"))
            self._files = self._open()
        except BaseException:
            self.close()
            raise

    def _set_up(self, config: CaptureConfig) -> None:
        instance = self._instance
        instance.write("tracing_on", "0")
        with contextlib.suppress(OSError):  # a kernel without it keeps its own clock
            instance.write("trace_clock", "mono")
        try:
            instance.write("buffer_size_kb", str(config.buffer >> 10))
        except OSError as error:
            raise PrefaultError(
                f"a trace buffer of {config.buffer >> 10} KiB for each CPU was refused ({error.strerror}): "
                "ask for a smaller one with --buffer"
            ) from error
        with contextlib.suppress(OSError):
            instance.write("options/record-tgid", "1")
        if config.pid is not None:
            instance.write("options/event-fork", "1")
            self._watch(config.pid)
        with contextlib.suppress(OSError):  # without the filter there are only more events
            instance.write("events/kvm/kvm_exit/filter", EXIT_FILTERS[self.fault_event])

    def _watch(self, pid: int) -> None:
        """Trace the threads of a process only; those that come later are added by the kernel."""
        watched: set[int] = set()
        while new := set(threads_of(pid)) - watched:
            # Not truncated, it adds; Python's own "a" would seek, which the file refuses.
            descriptor = os.open(self._instance.folder / "set_event_pid", os.O_WRONLY)
            try:
                os.write(descriptor, b"%s\n" % b" ".join(b"%d" % thread for thread in sorted(new)))
            finally:
                os.close(descriptor)
            watched |= new
        if not watched:
            raise UsageError(f"--pid {pid}: the process ended")

    def _open(self) -> list[tuple[int, int]]:
        """(CPU, descriptor) of each buffer."""
        folders = sorted(self._instance.folder.glob("per_cpu/cpu*"), key=lambda one: int(one.name[3:]))
        _want_descriptors(len(folders) + 64)
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        return [(int(one.name[3:]), os.open(one / "trace_pipe_raw", flags)) for one in folders]

    def head(self, config: CaptureConfig) -> Head:
        """What it takes to read the pages."""
        clock = self._instance.read("trace_clock")
        return Head(
            machine=platform.machine(),
            kernel=platform.release(),
            page_size=os.sysconf("SC_PAGE_SIZE"),
            clock=clock.partition("[")[2].partition("]")[0],
            began=datetime.now(UTC).isoformat(timespec="seconds"),
            pid=config.pid,
            formats={name: self._instance.read(f"events/kvm/{name}/format") for name in self.names},
            header_page=self._instance.read("events/header_page"),
            byte_order=sys.byteorder,
        )

    def start(self) -> None:
        """Let events come."""
        for name in self.names:
            self._instance.write(f"events/kvm/{name}/enable", "1")
        self._instance.write("tracing_on", "1")

    def stop(self) -> None:
        """Let no more come."""
        self._instance.write("tracing_on", "0")

    def pages(self) -> Iterator[Page]:
        """What there is now."""
        for cpu, descriptor in self._files:
            while True:
                try:
                    page = os.read(descriptor, self.layout.size)
                except BlockingIOError:
                    break
                if not page:
                    break
                yield Page(cpu, used(page, self.layout))

    def counted(self) -> int:
        """Events of all kinds so far."""
        return self._instance.total("entries", "read events")

    def lost(self) -> int:
        """Events that found no room, or were overwritten before they were read."""
        return self._instance.total("overrun", "dropped events")

    def saved_threads(self) -> dict[int, tuple[int, str]]:
        """Thread id → (process id or 0, name), of the last threads that the kernel traced for anybody."""
        processes = {tid: int(pid) for tid, pid in _saved("saved_tgids") if pid.isdecimal()}
        return {tid: (processes.get(tid, 0), comm) for tid, comm in _saved("saved_cmdlines")}

    def close(self) -> None:
        """Remove the instance."""
        for _, descriptor in getattr(self, "_files", ()):
            os.close(descriptor)
        self._files = []
        self._instance.close(f"events/kvm/{name}" for name in self.names)


def _saved(name: str) -> Iterator[tuple[int, str]]:
    """Lines of a number and a text."""
    with contextlib.suppress(OSError):
        for line in (tracefs.TRACEFS / name).read_text(errors="replace").splitlines():
            number, _, text = line.strip().partition(" ")
            if number.isdecimal() and text != "<...>":
                yield int(number), text


def _want_descriptors(number: int) -> None:
    """A host may have more CPUs than a shell allows descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        limit = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


_USED = (1 << 27) - 1
_MISSED_STORED = 1 << 30


def used(page: bytes, layout: Layout) -> bytes:
    """A page without what is not used of it."""
    commit = int.from_bytes(page[layout.commit : layout.commit + layout.commit_size], sys.byteorder)
    count = layout.commit_size if commit & _MISSED_STORED else 0  # of missed events, behind the last one
    return page[: layout.data + (commit & _USED) + count]


class Listener:
    """Told how a capture goes on. Does nothing itself."""

    def begins(self, head: Head) -> None:
        """What it takes to read the pages."""

    def page(self, page: Page) -> None:
        """A page, which is in the file already."""

    def state(self, state: State) -> None:
        """How far it is, about once a second."""


def capture(sink: BinaryIO, config: CaptureConfig, listener: Listener | None = None) -> Captured:
    """Copy the events of live VMs into a file, until the time is over, Ctrl-C, or the end of the VMM.

    :raises UsageError: the process is not there, or has no VM
    :raises CapabilityMissing: no tracefs, no such events, no right to trace
    :raises OSError: the file cannot be written; what is in it stays readable
    """
    if config.pid is not None:
        check_process(config.pid)
    source = _Source(config)
    try:
        return _Run(source, sink, config, listener or Listener()).follow()
    finally:
        source.close()


class _Run:
    """A capture under way."""

    def __init__(self, source: _Source, sink: BinaryIO, config: CaptureConfig, listener: Listener) -> None:
        self._source = source
        self._sink = sink
        self._config = config
        self._listener = listener
        self._threads = _Threads(config.pid)

    def follow(self) -> Captured:
        """Copy to the end."""
        head = self._source.head(self._config)
        self._sink.write(captured.MAGIC + captured.head_frame(head))
        self._listener.begins(head)
        began = time.monotonic()
        try:
            self._source.start()
            why = self._until_end(began)
        except KeyboardInterrupt:
            why = "interrupted"
        finally:  # also if this process is told to end: what was captured by then is a whole file
            self._source.stop()
            seconds = time.monotonic() - began
            lost = self._finish(seconds)
        return Captured(why, seconds, self._source.counted(), lost)

    def _finish(self, seconds: float) -> int:
        """Copy what is left, and write what is known now."""
        self._copy()
        self._threads.look(float("inf"))
        self._threads.add_saved(self._source.saved_threads())
        lost = self._source.lost()
        self._sink.write(captured.tail_frame(Tail(lost, seconds, self._threads.seen)))
        self._sink.flush()
        return lost

    def _until_end(self, began: float) -> str:
        look_at = 0.0
        while True:
            now = time.monotonic()
            if now >= look_at:
                look_at = now + _LOOK_SECONDS
                self._threads.look(now)
                self._listener.state(State(now - began, self._source.counted(), self._source.lost()))
            self._copy()
            seconds, pid = self._config.seconds, self._config.pid
            if seconds is not None and now - began >= seconds:
                return "time"
            if pid is not None and not threads_of(pid):
                return "process"
            left = TICK_SECONDS if seconds is None else began + seconds - time.monotonic()
            time.sleep(max(0.0, min(TICK_SECONDS, left)))

    def _copy(self) -> None:
        for page in self._source.pages():
            self._sink.write(captured.frame(Kind.PAGE, page.data, page.cpu))
            self._listener.page(page)


def main() -> None:
    """Capture into a file, on a machine that has the standard library only."""
    parser = argparse.ArgumentParser(
        prog="python3 -m prefault.faults.capture",
        description="Capture the stage-2 faults of live VMs; `prefault record --from FILE` reads the file.",
    )
    parser.add_argument("--pid", type=int, help="of a VMM; all VMs if not given")
    parser.add_argument("--seconds", type=float, help="how long; until Ctrl-C if not given")
    parser.add_argument("--no-durations", action="store_true", help="only the faults themselves")
    parser.add_argument("--buffer-kib", type=int, default=8192, help="of buffer for each CPU (%(default)s)")
    parser.add_argument("--output", required=True, type=Path, help="file to write")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminate)
    if given.seconds is not None and not 0 < given.seconds < float("inf"):
        parser.error(f"--seconds {given.seconds}: must be more than 0")
    config = CaptureConfig(given.pid, given.seconds, not given.no_durations, given.buffer_kib << 10)
    try:
        ended = _into_new_file(given.output, config)
    except PrefaultError as error:
        print(f"prefault.faults.capture: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"prefault.faults.capture: {given.output}: {error.strerror}", file=sys.stderr)
        sys.exit(ExitCode.OPERATING_ERROR)
    print(f"{ended.events} events in {ended.seconds:.1f} s, {ended.lost} lost ({ended.why})", file=sys.stderr)


def _into_new_file(path: Path, config: CaptureConfig) -> Captured:
    """Capture into a file that is not there yet, and not afterwards if nothing could be captured."""
    try:
        sink = path.open("xb")
    except FileExistsError:
        raise UsageError(f"{path}: is there already; name another file, or remove it") from None
    try:
        with sink:
            return capture(sink, config, _Saying())
    finally:
        if path.stat().st_size == 0:
            path.unlink()


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    """SIGTERM unwinds the stack as Ctrl-C does, so that the trace instance goes away."""
    raise SystemExit(128 + number)


class _Saying(Listener):
    """A line a second on standard error."""

    def state(self, state: State) -> None:
        """How far it is."""
        print(f"{state.seconds:5.0f} s  {state.events} events, {state.lost} lost", file=sys.stderr)


if __name__ == "__main__":
    main()
