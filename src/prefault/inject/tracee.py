# SPDX-License-Identifier: Apache-2.0
"""One thread of another process: stop it, run one system call in it, and put all back.

The thread is seized and stopped for one call, and then let go, so that between calls nobody traces it. What
makes it not notice:

- all signals are blocked meanwhile; those that come are delivered when it is let go;
- the general registers are put back, on arm64 SVE's, too, which a system call discards;
- a system call that the stop interrupted goes on: at the end the thread is taken to a stop from where the
  kernel itself decides on the restart, with the error number that makes it do so. KVM_RUN, which returns
  EINTR to whatever interrupts it, is given ERESTARTNOHAND: it goes on, unless a handler of the VMM runs;
- it is not touched in a restartable sequence, or in SME's streaming mode: let go, and stopped again;
- if this process is killed meanwhile, a signal frame takes the thread back (``frame``).

Failure modes: ``ProcessLost`` if the thread ends; ``OSError`` of PTRACE_SEIZE if it may not be traced;
``Busy`` if it cannot be stopped where a call would do no harm. One that does not stop at all is given up,
still seized; when it stops after all, :func:`let_go_of_late` lets it go.

Source: arch_do_signal_or_restart() (x86), do_signal() (arm64), ptrace_stop(); ptrace(2)
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from prefault.abi import ioctls
from prefault.errors import PrefaultError, ProcessLost
from prefault.inject import cpu, ptrace, refusal
from prefault.inject import frame as frames
from prefault.inject.maps import Mapping, mappings, stack_at

PROC = Path("/proc")

PATIENCE_S = 10.0
"""How long a thread may take to stop before this is given up: it may be in an uninterruptible wait."""
GRACE_S = 1.0
"""The same, of somebody who wants it ended."""
_NAP_S = 50e-6
_TRIES = 20
_ALL_SIGNALS = (1 << 64) - 1
_BTYPE = 3 << 10
_SVE_ACTIVE = 1
_ALIGN = 16
_ROOM = 256
_PIECE = 1 << 20
_SOON_S = 0.05
_INT = (1 << 32) - 1
_EPOLL_WAITS_X86 = {232, 281}
_EPOLL_PWAIT2_X86 = 441
_RESTART_SYSCALL = 128
_AGAIN_X86 = {
    -error for error in (cpu.ERESTARTSYS, cpu.ERESTARTNOINTR, cpu.ERESTARTNOHAND, cpu.ERESTART_RESTARTBLOCK)
}
_FRAME_ROOM = 5 << 10
_FRAME_ALIGN = 64


class Busy(PrefaultError):
    """The thread is where no system call can be run in it without harm, again and again."""


@dataclass(frozen=True)
class Answer:
    """What a system call in the thread gave.

    :ivar result: as the kernel returned it, minus an error number if it failed
    :ivar memory: the argument's bytes afterwards; empty if it had none
    :ivar stopped_s: from when the thread was told to stop until it was let go
    :ivar call_s: how much of that was the system call
    """

    result: int
    memory: bytes
    stopped_s: float
    call_s: float

    @property
    def errno(self) -> int:
        """0 if it did not fail."""
        return -self.result if -4096 < self.result < 0 else 0


@dataclass(frozen=True)
class Call:
    """A system call.

    :ivar memory: bytes in the thread's memory while it runs
    :ivar pointer: index of the argument that is the address of these bytes
    """

    number: int
    arguments: tuple[int, ...]
    memory: bytes = b""
    pointer: int = 0


class Tracee:
    """A thread of another process.

    :param memory: its process's
    :param instruction: address of a system call instruction in its process, from :func:`find_instruction`
    :param end: address of the code that ends a signal handler, from :func:`find_end`; 0 for none
    :param suspend_seccomp: have seccomp filters not apply while the thread is stopped
    """

    def __init__(
        self, memory: Memory, tid: int, instruction: int, *, end: int = 0, suspend_seccomp: bool = False
    ) -> None:
        self.tid = tid
        self.instruction = instruction
        self.end = end
        self.options = ptrace.TRACESYSGOOD | (ptrace.SUSPEND_SECCOMP if suspend_seccomp else 0)
        self.memory = memory

    def call(
        self,
        call: Call,
        *,
        kvm_run_fd: int = -1,
        limit_s: float = PATIENCE_S,
        wanted: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Stop the thread, run one system call in it, let it go.

        :param kvm_run_fd: the vCPU that it runs, if that is known; otherwise it sees EINTR on arm64
        :param limit_s: after so long, the system call is interrupted
        :param wanted: asked now and then; True interrupts the system call, too
        :raises ProcessLost: the thread ended
        :raises Busy: it is never where this can be done
        :raises OSError: it may not be traced
        """
        why = ""
        for _ in range(_TRIES):
            with _seized(self, wanted) as stop:
                injection = _Injection(self, stop, kvm_run_fd, wanted)
                why = injection.why_not()
                if not why:
                    with contextlib.suppress(_Disturbed):
                        return injection.run(call, limit_s)
            self._search_again()
            time.sleep(0.001)
        raise Busy(f"thread {self.tid} {why or 'is always about to take a signal'}")

    def _search_again(self) -> None:
        """For code that is gone: a library may have been unloaded, what was compiled thrown away."""
        if not has_code(self.memory, self.instruction, (cpu.host().instruction,)):
            with contextlib.suppress(PrefaultError):  # if the process is gone, the next seizing tells
                self.instruction = find_instruction(self.memory)
        if self.end and not has_code(self.memory, self.end, cpu.host().ends):
            self.end = find_end(self.memory)

    def running(self, wanted: Callable[[], bool] = lambda: False) -> int:
        """The vCPU that the thread runs, by its descriptor; -1 if it does not enter KVM_RUN soon.

        On arm64 a KVM_RUN tells its descriptor only when it begins. So the thread sees the one that it is in
        fail with EINTR, as after a signal, and begins the next.

        A thread that turns out to wait for something else is let go. Some waits fail with EINTR after a stop:
        before it enters such a call, too.
        """
        machine = cpu.host()
        with _seized(self, wanted) as stop:
            injection = _Injection(self, stop, -1, wanted)
            if injection.broken_off_x86():
                return injection.go_on()
            for _ in range(_TRIES):
                if not stop.next_system_call(_SOON_S, wanted):
                    return -1
                entered = _Injection(self, stop, -1, wanted)
                if entered.enters(machine.broken_off):
                    return entered.begin_again()
                if not stop.next_system_call(_SOON_S, wanted):  # its end
                    return _Injection(self, stop, -1, wanted).go_on()
        return -1


class _Disturbed(Exception):
    """A thread is about to take a signal, or to make a system call that must not be exchanged.

    :ivar number: of the signal; 0 for none
    """

    def __init__(self, number: int) -> None:
        self.number = number


class _Stop:
    """A thread that is seized; knows how to wait for it."""

    def __init__(self, tid: int, pid: int) -> None:
        self.tid = tid
        self.pid = pid
        self.began = time.monotonic()
        self.stopped = False
        self.traced = True
        self.changed = False
        """Whether its registers are not its own."""
        self.has_net = False
        """Whether it nevertheless ends up where it was, if it is let go at whatever point."""

    def go(self, resume: Callable[[int, int], None], signal_number: int = 0) -> None:
        """Let it go on in one way or another."""
        self.stopped = False
        resume(self.tid, signal_number)

    def detach(self, signal_number: int = 0) -> None:
        """Let it go for good."""
        ptrace.detach(self.tid, signal_number)
        self.stopped = self.traced = False

    def wait(self, *, limit_s: float | None = None, wanted: Callable[[], bool] = lambda: False) -> int:
        """Wait for the next stop, and return the status.

        A thread whose registers are not its own, and that has no net, must be waited for, whatever comes.

        :param limit_s: after so long, or if ``wanted``, interrupt the thread, once; None: it is about to stop
        :raises ProcessLost: it ended
        :raises Busy: it does not stop, and was given up
        """
        began = time.monotonic()
        due = began if limit_s is None else None
        while True:
            status = self.poll()
            if status is not None:
                return status
            now = time.monotonic()
            if due is None and limit_s is not None and (now - began > limit_s or wanted()):
                ptrace.interrupt(self.tid)
                due = now
            if due is not None and now - due > (GRACE_S if wanted() else PATIENCE_S):
                self._give_up(now - began)
            time.sleep(_NAP_S)

    def _give_up(self, waited_s: float) -> None:
        """Leave it to itself, seized as it is: only a thread that has stopped can be let go.

        :raises Busy: always, unless it must be waited for
        """
        if self.changed and not self.has_net:
            return
        self.traced = False
        _late.stops.append(self)
        then = "; it goes on by itself when it can" if self.changed else ""
        raise Busy(
            f"thread {self.tid} has not stopped for {waited_s:.0f} s: it waits in the kernel, or is "
            f"frozen{then}"
        )

    def poll(self) -> int | None:
        """The status, if it has stopped.

        :raises ProcessLost: it ended
        """
        try:
            tid, status = os.waitpid(self.tid, ptrace.WALL | os.WNOHANG)
        except ChildProcessError as error:
            raise ProcessLost(f"thread {self.tid} ended") from error
        if not tid:
            return None
        if not os.WIFSTOPPED(status):
            raise ProcessLost(f"thread {self.tid} ended")
        self.stopped = True
        return status

    def until_event(self, wanted: Callable[[], bool] = lambda: False) -> int:
        """Wait for the stop that PTRACE_INTERRUPT asks for, handing over the signals that come before it.

        Any other stop takes the request along (ptrace_stop()), so it is made again.

        :returns: the signal of a group stop (SIGSTOP), or SIGTRAP
        """
        while True:
            status = self.wait(wanted=wanted)
            if status >> 16 == ptrace.EVENT_STOP:
                return os.WSTOPSIG(status)
            number = os.WSTOPSIG(status)
            ptrace.interrupt(self.tid)
            self.go(ptrace.cont, 0 if number == signal.SIGTRAP | 0x80 else number)

    def until_system_call(
        self, which: int, *, limit_s: float | None = None, wanted: Callable[[], bool]
    ) -> None:
        """Go on until the thread enters or leaves a system call.

        :raises _Disturbed: a signal that it has not blocked came before that
        """
        while True:
            self.go(ptrace.to_system_call)
            status = self.wait(limit_s=limit_s, wanted=wanted)
            if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80:
                if ptrace.system_call_stop(self.tid) == which:
                    return
                raise PrefaultError(f"thread {self.tid} is not where it must be in the injected system call")
            if status >> 16 != ptrace.EVENT_STOP:
                raise _Disturbed(os.WSTOPSIG(status))

    def next_system_call(self, limit_s: float, wanted: Callable[[], bool]) -> bool:
        """Go on to the next system call stop; False if there is none soon."""
        self.go(ptrace.to_system_call)
        while True:
            status = self.wait(limit_s=limit_s, wanted=wanted)
            number = os.WSTOPSIG(status)
            if status >> 16 == ptrace.EVENT_STOP:
                return False
            if number == signal.SIGTRAP | 0x80:
                return True
            self.go(ptrace.to_system_call, number)


class _Late(threading.local):
    """Threads that were given up while they were seized; only the thread that seized one can let it go."""

    def __init__(self) -> None:
        self.stops: list[_Stop] = []


_late = _Late()


def let_go_of_late() -> None:
    """Let go of the threads that have stopped only after they had been given up.

    What is then still not stopped, the kernel lets go when the calling thread ends.
    """
    for stop in list(_late.stops):
        try:
            found = stop.poll()
            if found is None:
                continue
            number = 0 if found >> 16 == ptrace.EVENT_STOP else os.WSTOPSIG(found)
            stop.detach(0 if number == signal.SIGTRAP | 0x80 else number)
        except (ProcessLost, OSError):
            _let_go_of_program(stop)
        _late.stops.remove(stop)


def _let_go_of_program(lost: _Stop) -> None:
    """A thread that calls execve(2) goes on with its process's number, and is traced as it was."""
    tracer = refusal.status(lost.pid).get("TracerPid")
    known = any(one.tid == lost.pid for one in _late.stops)
    if lost.tid == lost.pid or known or tracer != str(threading.get_native_id()):
        return
    stop = _Stop(lost.pid, lost.pid)
    with contextlib.suppress(ProcessLost, OSError, Busy):
        ptrace.interrupt(stop.tid)
        stop.until_event(lambda: True)
        stop.detach()


@contextlib.contextmanager
def _seized(tracee: Tracee, wanted: Callable[[], bool]) -> Iterator[_Stop]:
    """A thread that is stopped, and let go at the end."""
    tid = tracee.tid
    let_go_of_late()
    if any(one.tid == tid for one in _late.stops):
        raise Busy(f"thread {tid} has still not stopped: it waits in the kernel, or is frozen")
    with _lost_if_gone(tid):
        ptrace.seize(tid, tracee.options)
        stop = _Stop(tid, tracee.memory.pid)
        try:
            ptrace.interrupt(tid)
            stop.until_event(wanted)
            yield stop
        finally:
            _let_go(stop)


def _let_go(stop: _Stop) -> None:
    if not stop.traced:
        return
    try:
        if not stop.stopped:
            ptrace.interrupt(stop.tid)
            stop.until_event(lambda: True)
        stop.detach()
    except (ProcessLost, OSError):
        _take_note_of_end(stop.tid)
        _let_go_of_program(stop)


def _take_note_of_end(tid: int) -> None:
    """Wait for the end of a thread that was killed while it was stopped.

    Requests only say that it is gone. Until its tracer has waited for it, its process does not end for
    anybody. If another thread has called execve(2), that one has its number, and is not waited for.
    """
    end = time.monotonic() + PATIENCE_S
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < end:
            found, how = os.waitpid(tid, ptrace.WALL | os.WNOHANG)
            if found and not os.WIFSTOPPED(how):
                return
            about = refusal.status(tid)
            if about.get("TracerPid") == "0" and not refusal.has_ended(about):
                return
            time.sleep(_NAP_S)


@contextlib.contextmanager
def _lost_if_gone(tid: int) -> Iterator[None]:
    """ESRCH of a request is the death of the thread: SIGKILL ends stops, too."""
    try:
        yield
    except ProcessLookupError as error:
        raise ProcessLost(f"thread {tid} ended") from error
    except PermissionError as error:
        if _ends(tid):
            raise ProcessLost(f"thread {tid} ended") from error
        raise


def _ends(tid: int) -> bool:
    """Whether a thread that may not be traced is one that has just died."""
    end = time.monotonic() + _SOON_S
    while time.monotonic() < end:
        try:
            state = (PROC / str(tid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(_NAP_S)
    return False


@dataclass(frozen=True)
class _Frame:
    """A signal frame, and where it is to be."""

    address: int
    data: bytes


class _Injection:
    """A stopped thread, and all that must be put back."""

    def __init__(self, tracee: Tracee, stop: _Stop, kvm_run_fd: int, wanted: Callable[[], bool]) -> None:
        self._cpu = cpu.host()
        self._arm = self._cpu is cpu.ARM64
        self._stop = stop
        self._wanted = wanted
        self._tid = tracee.tid
        self._memory = tracee.memory
        self._saved = self._cpu.unpack(ptrace.get_registers(self._tid))
        self._final = self._saved
        self._instruction = tracee.instruction
        self._end = tracee.end
        self._mask = 0
        self._kvm_run_fd = self._find_kvm_run(kvm_run_fd)
        self._stack = 0
        """Where the mapping begins that its stack is in."""
        self._net: dict[str, int] = {}
        """Registers by which the thread, left alone, ends up where it was."""

    def broken_off_x86(self) -> bool:
        """Whether the stop has made a system call fail with EINTR, on x86: KVM_RUN, or one like it."""
        saved = self._saved
        return (
            not self._arm and cpu.signed(saved["orig_rax"]) >= 0 and cpu.signed(saved["rax"]) == -errno.EINTR
        )

    def go_on(self) -> int:
        """Have what was interrupted go on when the thread is let go.

        :returns: KVM_RUN's descriptor, on x86; -1 if it was something else
        """
        if not self._arm and self._interrupted_x86():
            self._set({**self._saved, "rax": -cpu.ERESTARTNOHAND})
        return self._kvm_run_fd

    def enters(self, waits: frozenset[int]) -> bool:
        """Whether the thread is about to enter KVM_RUN, or one of these calls."""
        number = self._saved[self._cpu.number_at_entry]
        return number in waits or self._enters_kvm_run()

    def _enters_kvm_run(self) -> bool:
        _, request = self._cpu.arguments[:2]
        is_ioctl = self._saved[self._cpu.number_at_entry] == self._cpu.ioctl
        return is_ioctl and self._saved[request] & _INT == ioctls.KVM_RUN

    def begin_again(self) -> int:
        """Take the thread from the entry of a system call to before it, on x86.

        If it were let go there, a wait would fail with EINTR: detaching wakes it as a signal does
        (ptrace_signal_wake_up()). If this process is killed meanwhile, it does.

        :returns: the vCPU's descriptor, if the call is KVM_RUN; otherwise -1
        """
        saved = self._saved
        found = saved[self._cpu.arguments[0]] & _INT if self._enters_kvm_run() else -1
        if self._arm:
            return found
        self._set({**saved, "orig_rax": -1, "rax": -errno.EINTR})
        self._stop.until_system_call(ptrace.SYSCALL_EXIT, wanted=self._wanted)
        self._set({**saved, "orig_rax": -1, "rax": saved["orig_rax"], "pc": saved["pc"] - 2})
        return found

    def why_not(self) -> str:
        """Why a system call here would do harm; empty if it would do none."""
        if self._in_restartable_sequence():
            return "is always in a sequence that must not be broken off"
        if self._arm and self._streams():
            return "is always in SME's streaming mode, which a system call would end"
        if not has_code(self._memory, self._instruction, (self._cpu.instruction,)):
            return "finds no system call instruction any more"
        self._stack, why = stack_at(self._memory.pid, self._saved["sp"] - 1)
        if not why and self._room < self._stack:
            why = "at the end of its stack"
        return why and f"has its stack pointer {why}"

    def _in_restartable_sequence(self) -> bool:
        """Whether the thread is in a critical section of rseq(2), which a call would end."""
        pointer = ptrace.rseq_pointer(self._tid)
        if not pointer:
            return False
        section = int.from_bytes(self._memory.read(pointer + 8, 8), "little")
        if not section:
            return False
        _, start, length = struct.unpack("<QQQ", self._memory.read(section, 24).ljust(24, b"\0"))
        return int(start) <= self._saved["pc"] < int(start + length)

    def _streams(self) -> bool:
        """Whether the thread is in SME's streaming mode, which a system call would end."""
        values = self._vectors(ptrace.NT_ARM_SSVE)
        return bool(values)

    def _vectors(self, kind: int) -> bytes:
        """SVE's registers in a mode; empty if they are not in use in it."""
        try:
            values = ptrace.get_registers(self._tid, kind)
        except OSError:
            return b""
        flags = struct.unpack_from("<H", values, 12)[0] if len(values) >= 16 else 0
        return values if flags & _SVE_ACTIVE else b""

    @property
    def _room(self) -> int:
        """Where the thread's stack has room, far enough below what it uses."""
        return (self._saved["sp"] - self._cpu.red_zone - _ROOM) // _ALIGN * _ALIGN

    def run(self, call: Call, limit_s: float) -> Answer:
        """Run the system call, and let the thread go.

        :raises _Disturbed: it was let go before that
        :raises Busy: it does not stop any more, and goes on by itself
        """
        mask = self._mask = ptrace.get_signal_mask(self._tid)
        vectors = self._vectors(ptrace.NT_ARM_SVE) if self._arm else b""
        frame = self._spread_net(mask, vectors)
        address = self._room
        lowest = frame.address if frame else address
        held = self._memory.read(lowest, address + len(call.memory) - lowest)
        try:
            self._memory.write(address, call.memory)
            if frame:
                self._memory.write(frame.address, frame.data)
            began = time.monotonic()
            enter = self._enter_arm if self._arm else self._enter_x86
            leave = enter(call, address)
            self._stop.until_system_call(ptrace.SYSCALL_EXIT, limit_s=limit_s, wanted=self._wanted)
            result = cpu.signed(self._registers()[self._cpu.result])
            call_s = time.monotonic() - began
            memory = self._memory.read(address, len(call.memory))
            self._put_back_vectors(vectors)
            leave()
            self._memory.write(lowest, held)
            ptrace.interrupt(self._tid)
            self._stop.go(ptrace.cont)
            self._stop.until_event(self._wanted)
        except _Disturbed as signal_came:
            self._put_back(mask, vectors, lowest, held)
            self._stop.detach(signal_came.number)
            raise
        finally:
            if self._stop.traced:
                self._put_back(mask, vectors, lowest, held)
        self._stop.detach()
        return Answer(result, memory, time.monotonic() - self._stop.began, call_s)

    def _spread_net(self, mask: int, vectors: bytes) -> _Frame | None:
        """A signal frame below the argument, and ``_net`` such that the thread would end at it."""
        if not has_code(self._memory, self._end, self._cpu.ends) or self._has_shadow_stack():
            return None
        address = (self._room - _FRAME_ROOM) // _FRAME_ALIGN * _FRAME_ALIGN
        if address < self._stack:
            return None
        if self._arm:
            plain = ptrace.get_registers(self._tid, ptrace.NT_PRFPREG)
            data = frames.arm64(self._resumed(), mask, plain, vectors)
        else:
            state = ptrace.get_registers(self._tid, ptrace.NT_X86_XSTATE)
            if not frames.fits_x86_64(state):
                return None
            data = frames.x86_64(self._resumed(), mask, state, address)
        self._net = {"pc": self._end, "sp": address if self._arm else address + 8}
        self._stop.has_net = True
        return _Frame(address, data)

    def _has_shadow_stack(self) -> bool:
        """Whether return addresses are kept twice: then a signal frame needs a mark there, too."""
        if self._arm:
            with contextlib.suppress(OSError):
                return any(ptrace.get_registers(self._tid, ptrace.NT_ARM_GCS)[:8])
            return False
        with contextlib.suppress(OSError):
            return "shstk" in (PROC / str(self._tid) / "status").read_text(errors="replace")
        return False

    def _resumed(self) -> dict[str, int]:
        """The registers with which the thread goes on by itself.

        An interrupted system call is repeated. If it had been interrupted before, it may end with EINTR, for
        the end of a handler makes the kernel forget how to go on with a wait.
        """
        saved = self._saved
        if self._arm:
            going_on = {"pc": saved["pc"] - 4, "x0": self._kvm_run_fd} if self._kvm_run_fd >= 0 else {}
            return {**saved, **going_on}
        if cpu.signed(saved["orig_rax"]) < 0:
            return saved
        if cpu.signed(saved["rax"]) not in _AGAIN_X86 and not self._interrupted_x86():
            return saved
        return {**saved, "pc": saved["pc"] - 2, "rax": saved["orig_rax"]}

    def _registers(self) -> dict[str, int]:
        return self._cpu.unpack(ptrace.get_registers(self._tid))

    def _set(self, registers: dict[str, int]) -> None:
        ptrace.set_registers(self._tid, self._cpu.pack(registers))

    def _with_arguments(self, registers: dict[str, int], call: Call, address: int) -> dict[str, int]:
        values = list(call.arguments)
        if call.memory:
            values[call.pointer] = address
        return {**registers, **dict(zip(self._cpu.arguments, values, strict=False))}

    def _enter_x86(self, call: Call, address: int) -> Callable[[], None]:
        """Take the thread to the entry of the system call.

        :returns: what to do at its exit
        """
        own = {"pc": self._instruction, "rax": call.number, "orig_rax": -1}
        self._stop.changed = True
        self._set({**self._with_arguments({**self._saved, **own}, call, address), **self._net})
        ptrace.set_signal_mask(self._tid, _ALL_SIGNALS)
        self._stop.until_system_call(ptrace.SYSCALL_ENTRY, wanted=self._wanted)
        if self._net:  # it is about to end a handler
            there = {**self._registers(), "orig_rax": call.number}
            self._set({**self._with_arguments(there, call, address), **self._net})
        self._final = dict(self._saved)
        if self._interrupted_x86():
            self._final["rax"] = -cpu.ERESTARTNOHAND
        return self._leave_x86

    def _leave_x86(self) -> None:
        self._unblock()
        self._set(self._final)

    def _interrupted_x86(self) -> bool:
        """Whether the stop has made a system call fail that can as well go on."""
        saved = self._saved
        if cpu.signed(saved["rax"]) == -errno.EINTR:  # without a time-out, which would begin again
            if saved["orig_rax"] in _EPOLL_WAITS_X86:
                return saved["r10"] & _INT == _INT
            if saved["orig_rax"] == _EPOLL_PWAIT2_X86:
                return saved["r10"] == 0
        return self._kvm_run_fd >= 0

    def _enter_arm(self, call: Call, address: int) -> Callable[[], None]:
        """Take the thread to the entry of the system call.

        A system call that is to be restarted is entered as it would be, and exchanged there: only the kernel
        knows how it restarts it, and orig_x0 cannot be set otherwise.

        :returns: what to do at its exit
        """
        saved = self._final = dict(self._saved)
        restart = 0
        start = {**saved, "pc": self._instruction, "pstate": saved["pstate"] & ~_BTYPE, **self._net}
        if self._is_call(saved["pc"]):
            start = saved
            restart = cpu.ERESTARTSYS
        elif self._kvm_run_fd >= 0:
            self._final = {**saved, "pc": saved["pc"] - 4, "x0": self._kvm_run_fd}
            start = {**self._final, "pstate": start["pstate"], **self._net}
            restart = cpu.ERESTARTNOHAND
        unchanged = start is saved
        if not (unchanged and self._net):
            self._stop.changed = True
            self._set(start)
            ptrace.set_signal_mask(self._tid, _ALL_SIGNALS)
        self._stop.until_system_call(ptrace.SYSCALL_ENTRY, wanted=self._wanted)
        number = self._number()
        if number in self._cpu.left_alone:
            raise _Disturbed(0)
        if restart == cpu.ERESTARTSYS and number == _RESTART_SYSCALL:
            restart = cpu.ERESTART_RESTARTBLOCK
        elif number in self._cpu.not_restarted:
            restart = cpu.ERESTARTNOHAND
        self._stop.changed = True
        self._set({**self._with_arguments(self._registers(), call, address), **self._net})
        self._set_number(call.number)
        if unchanged:
            ptrace.set_signal_mask(self._tid, _ALL_SIGNALS)
        return lambda: self._leave_arm(call, number, restart)

    def _leave_arm(self, call: Call, number: int, restart: int) -> None:
        """Leave the exchanged system call, such that the kernel restarts the one that it stands for."""
        if restart and self._net and call.arguments[:1] != (self._final["x0"],):
            self._enter_again()
        self._unblock()
        if not restart:
            self._set(self._final)
            self._set_number(-1)
            return
        # In this order: with these registers and no number, who is let go by our death would see the error.
        self._set_number(number)
        self._set({**self._final, "pc": self._final["pc"] + 4, "x0": -restart})

    def _enter_again(self) -> None:
        """Go through a system call that does nothing, with the first argument of the interrupted one.

        What it began with is what the kernel restarts it with (orig_x0): the exchanged call's, until that is
        put right, for which this process may not live.
        """
        self._set({**self._registers(), **self._net, "x0": self._final["x0"]})
        self._stop.until_system_call(ptrace.SYSCALL_ENTRY, wanted=self._wanted)
        self._set({**self._registers(), **self._net})
        self._set_number(-1)
        self._stop.until_system_call(ptrace.SYSCALL_EXIT, wanted=self._wanted)

    def _unblock(self) -> None:
        """The thread's own signal mask again. The stop that follows comes before any signal is delivered."""
        if self._net:
            ptrace.set_signal_mask(self._tid, self._mask)

    def _find_kvm_run(self, known: int) -> int:
        """The vCPU whose KVM_RUN the stop has made fail with EINTR; -1 if there is none, or it is not known.

        On arm64, the result has taken the place of the descriptor.
        """
        if not self.in_kvm_run():
            return -1
        return known if self._arm else self._saved["rdi"] & _INT

    def in_kvm_run(self) -> bool:
        """Whether the stop has made KVM_RUN fail with EINTR."""
        saved = self._saved
        if cpu.signed(saved[self._cpu.result]) != -errno.EINTR:
            return False
        if self._arm:
            of_run = saved["x8"] == self._cpu.ioctl and saved["x1"] & _INT == ioctls.KVM_RUN
            return of_run and self._is_call(saved["pc"] - 4)
        return saved["orig_rax"] == self._cpu.ioctl and saved["rsi"] & _INT == ioctls.KVM_RUN

    def _is_call(self, address: int) -> bool:
        return self._memory.read(address, 4) == self._cpu.instruction

    def _number(self) -> int:
        return int.from_bytes(
            ptrace.get_registers(self._tid, ptrace.NT_ARM_SYSTEM_CALL), "little", signed=True
        )

    def _set_number(self, number: int) -> None:
        ptrace.set_registers(self._tid, struct.pack("<i", number), ptrace.NT_ARM_SYSTEM_CALL)

    def _put_back(self, mask: int, vectors: bytes, address: int, held: bytes) -> None:
        """Everything as it was; also of a thread that something unexpected has happened to."""
        if not self._stop.stopped:
            ptrace.interrupt(self._tid)
            self._stop.until_event(self._wanted)
        if self._stop.changed:
            self._set(self._final)
        self._put_back_vectors(vectors)
        self._memory.write(address, held)
        ptrace.set_signal_mask(self._tid, mask)
        self._stop.changed = False

    def _put_back_vectors(self, vectors: bytes) -> None:
        if vectors:
            ptrace.set_registers(self._tid, vectors, ptrace.NT_ARM_SVE)


class Memory:
    """The memory of a process, at rest or not. Close it.

    :raises OSError: it may not be read and written
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.open(PROC / str(pid) / "mem", os.O_RDWR | os.O_CLOEXEC)

    def read(self, address: int, size: int) -> bytes:
        """What is there; nothing if that cannot be read."""
        try:
            return os.pread(self._fd, size, address) if size else b""
        except (OSError, OverflowError):
            return b""

    def write(self, address: int, data: bytes) -> None:
        """Change it.

        :raises ProcessLost: the process is gone
        :raises PrefaultError: it cannot be written there
        """
        try:
            written = os.pwrite(self._fd, data, address) if data else 0
        except OSError as error:
            raise PrefaultError(f"process {self.pid} has no memory at {address:#x}") from error
        if written != len(data):
            raise ProcessLost(f"process {self.pid} ended")

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find_instruction(memory: Memory) -> int:
    """Address of a system call instruction in what a process may execute, the vDSO first.

    :raises PrefaultError: there is none
    """
    places = [one for one in mappings(memory.pid) if "x" in one.access and one.name != "[vsyscall]"]
    places.sort(key=lambda one: (one.name != "[vdso]", not _lasts(one)))
    found = _find(memory, cpu.host().instruction, places)
    if not found:
        raise PrefaultError(f"process {memory.pid} has no system call instruction that it may execute")
    return found


def find_end(memory: Memory) -> int:
    """Address of the code that ends a signal handler, in a program or library; 0 if there is none."""
    places = [one for one in mappings(memory.pid) if _lasts(one)]
    return next(filter(None, (_find(memory, code, places) for code in cpu.host().ends)), 0)


def has_code(memory: Memory, address: int, codes: tuple[bytes, ...]) -> bool:
    """Whether one of these codes is there, now."""
    return bool(address) and any(memory.read(address, len(code)) == code for code in codes)


def _lasts(one: Mapping) -> bool:
    """Whether nobody writes code there that he throws away later, as compilers for a moment's use do."""
    of_file = one.name.startswith("/") and not one.name.startswith("/memfd:")
    return one.access == "r-xp" and (of_file or one.name == "[vdso]")


def _find(memory: Memory, code: bytes, places: list[Mapping]) -> int:
    step = 1 if cpu.host() is cpu.X86_64 else 4
    for place in places:
        for start in range(place.start, place.end, _PIECE):
            piece = memory.read(start, min(_PIECE + len(code), place.end - start))
            index = piece.find(code)
            while index >= 0 and index % step:
                index = piece.find(code, index + 1)
            if index >= 0:
                return start + index
    return 0
