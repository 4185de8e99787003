# SPDX-License-Identifier: Apache-2.0
"""Runs a machine to its end: console, keyboard, snapshots, and why it ended."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prefault.abi import constants
from prefault.errors import KvmError, MemoryFaultExit, PrefaultError
from prefault.machine import Exit, Failed, MemoryFault, OtherExit
from prefault.vmm import saved, snapshot, state
from prefault.vmm.machine import Machine
from prefault.vmm.order import Outcome, Watch, Why
from prefault.vmm.pager import Pager
from prefault.vmm.runner import Runner

_TICK = 0.05
"""Seconds for which a piece of a line may wait until it is passed on."""

_EVENTS = {
    constants.KVM_SYSTEM_EVENT_SHUTDOWN: Why.SHUTDOWN,
    constants.KVM_SYSTEM_EVENT_RESET: Why.RESET,
    constants.KVM_SYSTEM_EVENT_CRASH: Why.CRASH,
}

Event = Callable[[], "Why | None"]
"""What to do about something that happened, in the main thread; why the VM ends, if it does."""


class Session:
    """One run of a machine, from the main thread."""

    def __init__(self, machine: Machine, watch: Watch, remark: Callable[[str], None]) -> None:
        self._machine = machine
        self._watch = watch
        self._remark = remark
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.pager: Pager | None = None
        self.outcome = Outcome(Why.STOPPED)
        self._runner = Runner(machine.vcpus, machine.bus, self._on_exit)
        self._listen()

    def _listen(self) -> None:
        watch, console = self._watch, self._machine.console
        for text, typed in watch.type:
            console.watch(text, functools.partial(self._machine.uart.feed, typed.encode()))
        if watch.snapshot:
            console.watch(watch.snapshot, lambda: self.post(self._snapshot_once))
        if watch.stop:
            console.watch(watch.stop, lambda: self._on_stop(time.monotonic()))

    # Called from other threads.

    def post(self, event: Event) -> None:
        """Have something done by the main thread."""
        self._events.put(event)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b"x")

    def fail(self, error: BaseException) -> None:
        """End the VM with an error."""

        def raise_it() -> None:
            raise error

        self.post(raise_it)

    def _on_exit(self, number: int, exit_: Exit | BaseException) -> None:
        self.post(lambda: self._end(number, exit_))

    def _on_stop(self, now: float) -> None:
        def stop() -> Why:
            if self.outcome.ready_seconds is None:
                self.outcome.ready_seconds = now - self._began
            return Why.STOPPED

        self.post(stop)

    # The main thread.

    def run(self, stdin: int = -1) -> Outcome:
        """Run until the VM ends.

        :param stdin: descriptor of what is typed, or -1
        :raises KvmError: KVM_RUN failed
        :raises PrefaultError: a vCPU cannot go on
        """
        self._began = time.monotonic()
        before = signal.signal(signal.SIGUSR2, lambda number, frame: self.post(self._snapshot))
        try:
            with _unbuffered(stdin), self._counted():
                try:
                    self._runner.start()
                    self.outcome.why = self._loop(stdin)
                finally:
                    self.outcome.run_seconds = round(time.monotonic() - self._began, 6)
                    self._stop()
                    self._machine.console.flush()
        finally:
            signal.signal(signal.SIGUSR2, before)
            os.close(self._woken)
            os.close(self._wake)
        return self._finished()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the guest's faults, if that is wanted."""
        if not self._watch.count_faults:
            yield
            return
        with self._machine.vm.count_faults() as counts:
            yield
        kinds = ("read", "write", "execute", "permission")
        self.outcome.faults = {kind: getattr(counts, kind) for kind in kinds}

    def _stop(self) -> None:
        if self.pager and self.pager.error:
            # A vCPU may wait for memory that will not come. It must not go on without it.
            self._runner.halt()
            self.pager.release()
        self._runner.stop()

    def _finished(self) -> Outcome:
        outcome, bus = self.outcome, self._machine.bus
        outcome.mmio_exits, outcome.strays = bus.accesses, bus.strays
        outcome.console_bytes = self._machine.console.size
        outcome.pager = self.pager.facts() if self.pager else None
        return outcome

    def _loop(self, stdin: int) -> Why:
        sources = [self._woken] + ([stdin] if stdin >= 0 else [])
        while True:
            ready, _, _ = select.select(sources, [], [], _TICK)
            if self._woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._woken, 4096)
                why = self._handle_events()
                if why:
                    return why
            else:
                self._machine.console.flush()
            if stdin in ready:
                typed = os.read(stdin, 4096)
                self._machine.uart.feed(typed)
                if not typed:  # nobody is there to type
                    sources.remove(stdin)

    def _handle_events(self) -> Why | None:
        while not self._events.empty():
            why = self._events.get()()
            if why:
                return why
        return None

    def _end(self, number: int, exit_: Exit | BaseException) -> Why:
        match exit_:
            case BaseException():
                raise exit_
            case OtherExit(reason=constants.KVM_EXIT_SYSTEM_EVENT, details=(kind, *_)) if kind in _EVENTS:
                return _EVENTS[kind]
            case Failed(errno=error):
                raise KvmError("KVM_RUN", error, hint=f"vCPU {number}{self._where(number)}")
            case MemoryFault(gpa=gpa, size=size, errno=error):
                hint = f"vCPU {number} needs memory that the backing does not have{self._where(number)}"
                raise MemoryFaultExit("KVM_RUN", error, gpa=gpa, size=size, hint=hint)
            case OtherExit(name=name, details=details):
                numbers = " ".join(f"{value:#x}" for value in details)
                raise PrefaultError(f"vCPU {number} cannot go on: {name} {numbers}{self._where(number)}")
        raise PrefaultError(f"vCPU {number} cannot go on: {exit_}")

    def _where(self, number: int) -> str:
        try:
            return f", at pc {self._machine.vcpus[number].get_register('pc'):#x}"
        except KvmError:
            return ""

    # Snapshots.

    def _snapshot_once(self) -> Why | None:
        return self._snapshot() if self.outcome.snapshot is None else None

    def _snapshot(self) -> Why | None:
        """Stop the guest, write a snapshot, let it go on. If that fails it goes on as well."""
        folder = self._watch.snapshot_to
        if not folder:
            self._remark("a snapshot was asked for, but no folder for it named (--snapshot)")
            return None
        self._machine.console.flush()
        began = time.monotonic()
        facts: dict[str, Any] = {"folder": folder}
        counters: dict[int, int] = {}
        try:
            snapshot.refuse_existing(Path(folder))  # for which nobody need be stopped
            self._runner.pause()
            counters = state.save_counters(self._machine.vcpus[0])
            facts |= self._written(Path(folder), counters)
        except PrefaultError as error:
            facts["error"] = str(error)
            self._remark(f"{error}; the guest goes on")
        facts["seconds"] = round(time.monotonic() - began, 6)
        if "error" not in facts or not self._has_snapshot():  # one that is whole stays what was asked for
            self.outcome.snapshot = facts
        if self._watch.stop_after_snapshot and "error" not in facts:
            return Why.STOPPED
        self._go_on(counters)
        return None

    def _has_snapshot(self) -> bool:
        taken = self.outcome.snapshot
        return taken is not None and "error" not in taken

    def _written(self, folder: Path, counters: dict[int, int]) -> dict[str, object]:
        if self.pager:
            self.pager.finish()
        written = saved.save(self._machine, folder, counters)
        self._remark(f"snapshot written: {written.stored >> 20} of {written.memory >> 20} MiB stored")
        return {"memory": written.memory, "stored": written.stored}

    def _go_on(self, counters: dict[int, int]) -> None:
        """Resume, also if nothing was stopped."""
        try:
            state.restore_counters(self._machine.vcpus[0], counters)
        except PrefaultError as error:
            self._remark(f"{error}; the guest sees how long it was stopped")
        self._runner.resume()


@contextlib.contextmanager
def _unbuffered(stdin: int) -> Iterator[None]:
    """Let each key go to the guest as it is typed, but for Ctrl-C and the like."""
    if stdin < 0 or not os.isatty(stdin):
        yield
        return
    before = termios.tcgetattr(stdin)
    try:
        tty.setcbreak(stdin)
        yield
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def write_stdout(piece: bytes) -> None:
    """Pass on what the guest says."""
    sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def say(text: str) -> None:
    """Tell the user something that the guest did not say."""
    print(f"prefault: {text}", file=sys.stderr, flush=True)
