# SPDX-License-Identifier: Apache-2.0
"""Apply a plan: to one's own VMM, or to the VMM of a process that knows nothing of it.

Both go over the vCPUs in turn, with calls of a size that fits a slice. In a foreign process, a vCPU is
stopped for its slice, and then let go for at least as long.

Source: Documentation/virt/kvm/api.rst, KVM_PRE_FAULT_MEMORY
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from prefault.abi import constants, ioctls
from prefault.abi.constants import EHWPOISON
from prefault.errors import (
    CapabilityMissing,
    NotTraceable,
    PrefaultError,
    ProcessLost,
    UsageError,
    errno_name,
)
from prefault.inject import cpu, refusal, vcpus
from prefault.inject.tracee import (
    PATIENCE_S,
    Answer,
    Busy,
    Call,
    Memory,
    Tracee,
    find_end,
    find_instruction,
    let_go_of_late,
)
from prefault.kvm.prefault import HINTS
from prefault.machine import PreFaultProgress

SLICE_S = 0.005
"""How long a vCPU of a foreign process is stopped at a time."""

_REQUEST = struct.Struct("<QQQ40x")
_FIRST_SIZE = 1 << 20
_LARGEST_SIZE = 1 << 30
_GROWTH = 4
_FILL = 0.7
"""How much of a slice a call is sized for; stopping takes some of it, too."""
_BLOCK = 2 << 20
"""How far a hole is taken to reach before memory is looked for again."""
_SMALLEST = mmap.PAGESIZE
_TRIES = 50
_TRY_AGAIN_S = 0.001
_BUSY_NAP_S = 0.02
"""Between looks at vCPUs of which none can be stopped, or none can pre-fault at the moment."""

_HOPELESS = {
    errno.EOPNOTSUPP: f"{HINTS[errno.EOPNOTSUPP]} (on x86, so says a vCPU in a nested guest, too)",
    errno.ENOTTY: HINTS[errno.ENOTTY],
    errno.EINVAL: "the plan's ranges do not fit this host's page size",
    errno.ENOEXEC: HINTS[errno.ENOEXEC],
    errno.EPERM: "a filter of system calls refuses it",
    errno.EBADF: "the VMM has closed its vCPU",
}
"""What no other range will answer differently."""

_NAPS_S = {errno.EINTR: 0.0, errno.EAGAIN: _TRY_AGAIN_S, errno.EOPNOTSUPP: _BUSY_NAP_S}
"""How long what may pass is left to pass."""

Range = tuple[int, int]
"""(ipa, size)"""

OnBytes = Callable[[int], None]
"""Told how many bytes of the plan are done with."""


@dataclass(frozen=True)
class FailedRange:
    """Memory of the plan that was not pre-faulted, and why.

    :ivar error: name of the error number: ``ENOENT`` is a hole, memory that this VM does not have
    """

    ipa: int
    size: int
    errno: int
    error: str
    hint: str = ""


@dataclass
class VcpuShare:
    """What one vCPU did. Times are those of its stops; in one's own VMM, of its calls."""

    index: int
    calls: int = 0
    bytes: int = 0
    stopped_s: float = 0.0
    longest_stop_s: float = 0.0


@dataclass
class Applied:
    """What came of a plan.

    :ivar bytes: pre-faulted
    :ivar size: of the plan
    :ivar calls: of the ioctl
    :ivar ended: ``done``, or ``interrupted``: then the rest was left
    :ivar signal: number of the signal that interrupted it; 0 if there was none
    """

    size: int
    bytes: int = 0
    calls: int = 0
    seconds: float = 0.0
    ended: str = "done"
    signal: int = 0
    failed: list[FailedRange] = field(default_factory=list)
    vcpus: list[VcpuShare] = field(default_factory=list)

    @property
    def longest_stop_s(self) -> float:
        """The longest stop of any vCPU."""
        return max((one.longest_stop_s for one in self.vcpus), default=0.0)


@dataclass(frozen=True)
class Found:
    """What a plan would be applied to.

    :ivar threads: the vCPUs whose threads are known
    :ivar unknown: indices of those whose threads are not
    """

    pid: int
    vm_fd: int
    threads: tuple[vcpus.VcpuThread, ...]
    unknown: tuple[int, ...] = ()


class Prefaulting(Protocol):
    """A vCPU of one's own VMM; ``prefault.machine.Vcpu`` is one."""

    def pre_fault_memory_once(self, gpa: int, size: int) -> PreFaultProgress:
        """One KVM_PRE_FAULT_MEMORY call; never raises for what the kernel answers."""


@dataclass(frozen=True)
class _Step:
    progress: PreFaultProgress
    stopped_s: float
    call_s: float


class _Port(Protocol):
    """Where the ioctl is called."""

    def once(self, gpa: int, size: int) -> _Step: ...


def apply(
    ranges: Iterable[Range],
    vcpus: Sequence[Prefaulting],
    *,
    slice_s: float = SLICE_S,
    on_bytes: OnBytes = lambda _: None,
    wanted: Callable[[], bool] = lambda: False,
) -> Applied:
    """Apply a plan's ranges in one's own VMM, to vCPUs that are not running, spread over them.

    :param slice_s: how long a call should take, about
    :param wanted: asked between calls; True leaves the rest
    :raises CapabilityMissing: this kernel, or this kind of VM, cannot
    """
    if not vcpus:
        raise UsageError("a plan needs a vCPU to be applied by")
    ports = {index: _Own(vcpu) for index, vcpu in enumerate(vcpus)}
    return _Loop(ports, slice_s, on_bytes, wanted, foreign=False).run(list(ranges))


class _Own:
    def __init__(self, vcpu: Prefaulting) -> None:
        self._vcpu = vcpu

    def once(self, gpa: int, size: int) -> _Step:
        began = time.monotonic()
        progress = self._vcpu.pre_fault_memory_once(gpa, size)
        taken = time.monotonic() - began
        return _Step(progress, taken, taken)


class Process:
    """A VMM that knows nothing of this. Close it. Nothing is traced between calls.

    But for a thread that could not be stopped: it is let go once it stops, before the next call or at the
    close. One that has not stopped by then, the kernel lets go when the thread ends that called this.

    Who has started the VMM must not wait for it in another thread meanwhile: waitpid() takes the stops of a
    traced child, too, and ``Popen.poll()`` and ``Popen.send_signal()`` call it.

    :param allow_seccomp: suspend the seccomp filters of a thread while it is stopped
    :raises UsageError: there is no such process, or it is no VMM
    :raises NotTraceable: it may not be traced, or not without harm
    """

    def __init__(self, pid: int, *, allow_seccomp: bool = False) -> None:
        refusal.check(pid, allow_seccomp=allow_seccomp)
        cpu.host()
        self.pid = pid
        self._suspend_seccomp = allow_seccomp
        try:
            self._known = vcpus.descriptors(pid)
            self._memory = Memory(pid)
        except OSError as error:
            if refusal.has_ended(refusal.status(pid)):
                raise ProcessLost(f"process {pid} ended before anything was done") from error
            raise NotTraceable(f"the memory of process {pid} may not be read and written") from error
        try:
            self._instruction, self._end = find_instruction(self._memory), find_end(self._memory)
            self._tracees: dict[int, Tracee] = {}
        except BaseException:
            self._memory.close()
            raise

    def find(self, *, stop: bool = True) -> Found:
        """Its vCPUs and their threads.

        :param stop: threads that /proc does not tell about may be stopped, once
        :raises UsageError: no thread is known to run a vCPU
        """
        with stop_signals() as ended:
            ask = (lambda tid: self._ask(tid, ended.is_set)) if stop else None
            threads = tuple(vcpus.find(self.pid, self._known, ask, ended.is_set))
        if ended.is_set():
            signal.raise_signal(ended.number)  # for whom it would have reached otherwise
        unknown = tuple(sorted(set(self._known.vcpus) - {one.index for one in threads}))
        if stop and not threads:
            raise UsageError(
                f"none of process {self.pid}'s threads was seen running a vCPU: is its guest paused? Let it "
                "run while the plan is applied, or have the VMM name its threads (QEMU: -name "
                "debug-threads=on, as libvirt does)"
            )
        return Found(self.pid, self._known.vm, threads, unknown)

    def check_extension(
        self, found: Found, capability: int, wanted: Callable[[], bool] = lambda: False
    ) -> int:
        """KVM_CHECK_EXTENSION on its VM, by the first of its vCPUs' threads that can.

        :raises Busy: none can
        """
        call = Call(cpu.host().ioctl, (found.vm_fd, ioctls.KVM_CHECK_EXTENSION, capability))
        for thread in found.threads:
            try:
                return self.call(thread.tid, call, kvm_run_fd=thread.run_fd, wanted=wanted).result
            except (Busy, ProcessLost) as error:
                last: PrefaultError = error
                if wanted():
                    break
        raise last

    def apply(
        self,
        found: Found,
        ranges: Iterable[Range],
        *,
        slice_s: float = SLICE_S,
        on_bytes: OnBytes = lambda _: None,
    ) -> Applied:
        """Pre-fault the ranges. Ctrl-C and SIGTERM end it at once, with what was done until then.

        :raises CapabilityMissing: its VM cannot be pre-faulted
        :raises ProcessLost: it ended
        """
        plan = list(ranges)
        with stop_signals() as stop:
            try:
                self._check_capability(found, stop.is_set)
                ports = {one.index: _Foreign(self, one, slice_s, stop.is_set) for one in found.threads}
                done = _Loop(ports, slice_s, on_bytes, stop.is_set, foreign=True).run(plan)
            except ProcessLost as error:
                raise ProcessLost(f"the VMM, process {self.pid}, runs no vCPU any more: {error}") from error
            except Busy:
                if not stop.is_set():
                    raise
                done = Applied(sum(size for _, size in plan), ended="interrupted")
            done.signal = stop.number if done.ended == "interrupted" else 0
            return done

    def _check_capability(self, found: Found, wanted: Callable[[], bool]) -> None:
        """Whether its VM can be pre-faulted.

        :raises CapabilityMissing: it cannot, or does not say
        """
        result = self.check_extension(found, constants.KVM_CAP_PRE_FAULT_MEMORY, wanted)
        if result < 0:
            raise CapabilityMissing(
                f"the VM of process {self.pid} does not say whether it has KVM_CAP_PRE_FAULT_MEMORY (236): "
                f"KVM_CHECK_EXTENSION failed with {errno_name(-result)}"
            )
        if result == 0:
            raise CapabilityMissing(
                f"the VM of process {self.pid} does not report KVM_CAP_PRE_FAULT_MEMORY (236): the "
                "kernel lacks it, or the VM is protected"
            )

    def call(
        self,
        tid: int,
        call: Call,
        *,
        kvm_run_fd: int = -1,
        limit_s: float = 1.0,
        wanted: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """A system call in one of its threads.

        :param kvm_run_fd: the vCPU that it runs, if that is certain
        :raises ProcessLost: the thread ended
        :raises NotTraceable: it may not be traced
        """
        with self._tracing(tid):
            return self._tracee(tid).call(call, kvm_run_fd=kvm_run_fd, limit_s=limit_s, wanted=wanted)

    @contextlib.contextmanager
    def _tracing(self, tid: int) -> Iterator[None]:
        """A block that traces a thread; says why it may not."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.EINVAL):
                raise
            refusal.check(self.pid, allow_seccomp=self._suspend_seccomp)
            reason = f"the kernel does not let thread {tid} of process {self.pid} be traced"
            if error.errno == errno.EINVAL and self._suspend_seccomp:
                reason = "this kernel cannot suspend seccomp filters (it lacks CONFIG_CHECKPOINT_RESTORE)"
            raise NotTraceable(reason) from error

    def _tracee(self, tid: int) -> Tracee:
        """Kept, for it may have had to search for code again."""
        if tid not in self._tracees:
            self._tracees[tid] = Tracee(
                self._memory, tid, self._instruction, end=self._end, suspend_seccomp=self._suspend_seccomp
            )
        return self._tracees[tid]

    def _ask(self, tid: int, wanted: Callable[[], bool]) -> int:
        with contextlib.suppress(ProcessLost, Busy), self._tracing(tid):
            return self._tracee(tid).running(wanted)
        return -1

    def close(self) -> None:
        """Let go of its memory, and of threads that have stopped late."""
        let_go_of_late()
        self._memory.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Foreign:
    def __init__(
        self, process: Process, thread: vcpus.VcpuThread, slice_s: float, wanted: Callable[[], bool]
    ) -> None:
        self._process = process
        self._thread = thread
        self._slice_s = slice_s
        self._wanted = wanted

    def once(self, gpa: int, size: int) -> _Step:
        call = Call(
            cpu.host().ioctl,
            (self._thread.fd, ioctls.KVM_PRE_FAULT_MEMORY, 0),
            _REQUEST.pack(gpa, size, 0),
            pointer=2,
        )
        answer = self._process.call(
            self._thread.tid,
            call,
            kvm_run_fd=self._thread.run_fd,
            limit_s=self._slice_s * _FILL,
            wanted=self._wanted,
        )
        left = _REQUEST.unpack(answer.memory)
        return _Step(PreFaultProgress(left[0], left[1], answer.errno), answer.stopped_s, answer.call_s)


@dataclass
class _Turn:
    """A vCPU that takes its turns."""

    port: _Port
    share: VcpuShare
    free_at: float = 0.0


class _Loop:
    """Over the ranges, one call at a time, the vCPUs in turn."""

    def __init__(
        self,
        ports: dict[int, _Own] | dict[int, _Foreign],
        slice_s: float,
        on_bytes: OnBytes,
        wanted: Callable[[], bool],
        *,
        foreign: bool,
    ) -> None:
        """:param foreign: the vCPUs are another VMM's, which said that they can: they rest between calls"""
        self._turns = [_Turn(port, VcpuShare(index)) for index, port in ports.items()]
        self._slice_s = slice_s
        self._on_bytes = on_bytes
        self._wanted = wanted
        self._foreign = foreign
        self._call_size = _FIRST_SIZE
        self._next = 0
        self._progress_at = 0.0

    def run(self, ranges: list[Range]) -> Applied:
        done = Applied(sum(size for _, size in ranges), vcpus=[one.share for one in self._turns])
        began = self._progress_at = time.monotonic()
        try:
            for ipa, size in ranges:
                if not self._range(done, ipa, size):
                    done.ended = "interrupted"
                    break
        except ProcessLost as error:
            lost = ProcessLost(f"{error} after {done.bytes:,} of {done.size:,} bytes were pre-faulted")
            raise _with_result(lost, done) from error
        except PrefaultError as error:
            error.add_note(f"{done.bytes:,} of {done.size:,} bytes were pre-faulted until then")
            raise _with_result(error, done) from None
        done.seconds = time.monotonic() - began
        return done

    def _range(self, done: Applied, ipa: int, size: int) -> bool:
        """One range; False if it was left."""
        end, tries = ipa + size, 0
        while ipa < end:
            step = None if self._wanted() else self._once(done, ipa, min(end - ipa, self._call_size))
            if step is None:
                return False
            gone = step.progress.gpa - ipa
            if gone:
                tries = 0
                done.bytes += gone
                ipa += gone
                self._on_bytes(gone)
            elif self._may_pass(step.progress.errno, tries):
                tries += 1
                time.sleep(_NAPS_S[step.progress.errno])
            elif step.progress.errno:
                tries = 0
                ipa += self._pass_over(done, ipa, end, step.progress.errno)
            else:
                raise PrefaultError(f"KVM_PRE_FAULT_MEMORY returned 0 at {ipa:#x} without progress")
        return True

    def _may_pass(self, error: int, tries: int) -> bool:
        """Whether the next call may be answered differently.

        EOPNOTSUPP of a VM that has the capability is a vCPU's that runs a nested guest at the moment (x86).
        """
        if error == errno.EOPNOTSUPP:
            return self._foreign and tries < _TRIES * len(self._turns)
        return error in (errno.EINTR, errno.EAGAIN) and tries < _TRIES

    def _once(self, done: Applied, ipa: int, size: int) -> _Step | None:
        """A call by the vCPU whose turn it is, or the next that can be stopped; None if it is to end.

        :raises Busy: none of them can be stopped, for long
        """
        skipped = 0
        while True:
            turn = self._turns[self._next % len(self._turns)]
            self._next += 1
            if self._foreign:
                time.sleep(max(0.0, turn.free_at - time.monotonic()))
            try:
                step = turn.port.once(ipa, size)
                break
            except ProcessLost:
                self._turns.remove(turn)
                if not self._turns:
                    raise
            except Busy:
                skipped += 1
                if self._wanted():
                    return None
                if skipped >= len(self._turns):  # none of them can
                    if time.monotonic() - self._progress_at > PATIENCE_S:
                        raise
                    time.sleep(_BUSY_NAP_S)
        self._progress_at = time.monotonic()
        turn.free_at = time.monotonic() + step.stopped_s
        gone = step.progress.gpa - ipa
        if not 0 <= gone <= size or step.progress.size != size - gone:
            raise PrefaultError(
                f"KVM_PRE_FAULT_MEMORY at {ipa:#x} of {size:#x} bytes left {step.progress.gpa:#x} of "
                f"{step.progress.size:#x} bytes, which cannot be"
            )
        done.calls += 1
        _add(turn.share, gone, step)
        self._adapt(gone, step)
        return step

    def _adapt(self, gone: int, step: _Step) -> None:
        """Have the next call take what a slice has room for, at the speed of this one.

        In a foreign process, stopping and starting may take longer than a slice, however little is asked
        for: it is asked for no less than at first, and the end of the slice interrupts what takes longer.
        """
        overhead = step.stopped_s - step.call_s
        room = max(self._slice_s * _FILL - overhead, self._slice_s / 10)
        fits = int(gone * room / max(step.call_s, 1e-6)) if gone else self._call_size // 2
        grown = min(max(fits, self._call_size // _GROWTH), self._call_size * _GROWTH, _LARGEST_SIZE)
        least = _FIRST_SIZE if self._foreign else _SMALLEST
        self._call_size = max(grown // _SMALLEST * _SMALLEST, least)

    def _pass_over(self, done: Applied, ipa: int, end: int, error: int) -> int:
        """Note a failure, and say how far to go on after it.

        :raises CapabilityMissing: it would be the same everywhere
        """
        if error in _HOPELESS:
            raise CapabilityMissing(
                f"KVM_PRE_FAULT_MEMORY failed at {ipa:#x}: {errno_name(error)}; {_HOPELESS[error]}"
            )
        reach = {EHWPOISON: ipa + _SMALLEST, errno.ENOMEM: end}.get(error, (ipa // _BLOCK + 1) * _BLOCK)
        size = min(end, reach) - ipa
        last = done.failed[-1] if done.failed else None
        if last is not None and (last.ipa + last.size, last.errno) == (ipa, error):
            done.failed[-1] = FailedRange(last.ipa, last.size + size, error, last.error, last.hint)
        else:
            done.failed.append(FailedRange(ipa, size, error, errno_name(error), HINTS.get(error, "")))
        self._on_bytes(size)
        return size


def _with_result(error: PrefaultError, done: Applied) -> PrefaultError:
    """An error that has what was done until then, which --json shows."""
    vars(error).update(bytes=done.bytes, size=done.size, calls=done.calls)
    return error


def _add(share: VcpuShare, gone: int, step: _Step) -> None:
    share.calls += 1
    share.bytes += gone
    share.stopped_s += step.stopped_s
    share.longest_stop_s = max(share.longest_stop_s, step.stopped_s)


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Stop:
    """Whether a signal has come that would have ended this process.

    :ivar number: of the first; 0 if there was none
    """

    def __init__(self) -> None:
        self.number = 0

    def note(self, number: int, _frame: FrameType | None) -> None:
        """One has come."""
        self.number = self.number or number

    def is_set(self) -> bool:
        """Whether one has come."""
        return bool(self.number)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """A block in which signals that would end this process wait until threads are put back.

    Ctrl-Z is ignored: it would leave a vCPU stopped. In another than the main thread, nothing is changed.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.note) for number in _ENDING}
    before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
