# SPDX-License-Identifier: Apache-2.0
"""The loop over a plan, on vCPUs that answer what they are told to."""

from __future__ import annotations

import errno
import mmap
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.abi import ioctls
from prefault.abi.constants import EHWPOISON
from prefault.errors import CapabilityMissing, NotTraceable, PrefaultError, ProcessLost, UsageError
from prefault.inject import apply as module
from prefault.inject import refusal, vcpus
from prefault.inject.apply import Applied, Found, Process, apply, stop_signals
from prefault.inject.tracee import Answer, Busy, Call
from prefault.inject.vcpus import Descriptors, VcpuThread
from prefault.machine import PreFaultProgress

PAGE = mmap.PAGESIZE
BLOCK = 2 << 20
BASE = 1 << 32


@dataclass
class Fake:
    """A vCPU over memory where some pages answer with an error."""

    errors: dict[int, int] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    calls: list[tuple[int, int]] = field(default_factory=list)
    at_most: int = 64
    answers: list[int] = field(default_factory=list)

    def pre_fault_memory_once(self, gpa: int, size: int) -> PreFaultProgress:
        """As the kernel does: up to an error, which is only told without progress."""
        self.calls.append((gpa, size))
        if self.answers and (error := self.answers.pop(0)):
            return PreFaultProgress(gpa, size, error)
        start = gpa
        while size and gpa - start < self.at_most * PAGE:
            if gpa // PAGE in self.errors:
                return PreFaultProgress(gpa, size, 0 if gpa > start else self.errors[gpa // PAGE])
            self.done.add(gpa // PAGE)
            gpa, size = gpa + PAGE, size - PAGE
        return PreFaultProgress(gpa, size)


def pages(start: int, size: int) -> set[int]:
    """Page numbers of a range."""
    return set(range(start // PAGE, (start + size) // PAGE))


def test_all_of_a_plan_is_done_and_counted() -> None:
    seen: list[int] = []
    one = Fake()
    done = apply([(BASE, 300 * PAGE), (0, 5 * PAGE)], [one], on_bytes=seen.append)
    assert one.done == pages(BASE, 300 * PAGE) | pages(0, 5 * PAGE)
    assert (done.bytes, done.size, done.ended, done.failed) == (305 * PAGE, 305 * PAGE, "done", [])
    assert sum(seen) == done.size
    assert done.calls == len(one.calls) == done.vcpus[0].calls


def test_work_is_spread_over_vcpus() -> None:
    fakes = [Fake() for _ in range(3)]
    done = apply([(BASE, 64 * 30 * PAGE)], fakes)
    assert max(one.calls for one in done.vcpus) - min(one.calls for one in done.vcpus) <= 1
    assert sum(one.bytes for one in done.vcpus) == done.bytes
    assert [one.index for one in done.vcpus] == [0, 1, 2]


def test_a_hole_is_passed_over_and_reported_as_one() -> None:
    hole = dict.fromkeys(pages(BASE + BLOCK, 3 * BLOCK), errno.ENOENT)
    one = Fake(hole)
    done = apply([(BASE, 5 * BLOCK)], [one])
    assert one.done == pages(BASE, BLOCK) | pages(BASE + 4 * BLOCK, BLOCK)
    assert [(it.ipa, it.size, it.error) for it in done.failed] == [(BASE + BLOCK, 3 * BLOCK, "ENOENT")]


def test_a_poisoned_page_costs_that_page_only() -> None:
    one = Fake({BASE // PAGE + 3: EHWPOISON})
    done = apply([(BASE, 10 * PAGE)], [one])
    assert [(it.ipa, it.size, it.error) for it in done.failed] == [(BASE + 3 * PAGE, PAGE, "EHWPOISON")]
    assert done.bytes == 9 * PAGE


def test_no_memory_ends_a_range_and_the_next_is_tried() -> None:
    one = Fake({BASE // PAGE: errno.ENOMEM})
    done = apply([(BASE, 10 * PAGE), (0, PAGE)], [one])
    assert [(it.ipa, it.size, it.error) for it in done.failed] == [(BASE, 10 * PAGE, "ENOMEM")]
    assert one.done == {0}


@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN])
def test_what_may_pass_is_tried_again_but_not_for_ever(error: int) -> None:
    one = Fake(answers=[error] * 5)
    assert apply([(BASE, PAGE)], [one]).bytes == PAGE
    done = apply([(BASE, PAGE)], [Fake({BASE // PAGE: error})])
    assert [it.errno for it in done.failed] == [error]


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL])
def test_what_no_range_will_change_stops_at_once(error: int) -> None:
    one = Fake({BASE // PAGE: error})
    with pytest.raises(CapabilityMissing, match=errno.errorcode[error]):
        apply([(BASE, PAGE), (0, PAGE)], [one])
    assert len(one.calls) == 1


def test_a_vcpu_that_ends_leaves_its_turns_to_the_others() -> None:
    class Lost:
        def pre_fault_memory_once(self, gpa: int, size: int) -> PreFaultProgress:
            raise ProcessLost("thread 7 ended")

    one = Fake()
    assert apply([(BASE, 99 * PAGE)], [Lost(), one]).bytes == 99 * PAGE
    with pytest.raises(ProcessLost, match="thread 7 ended after 0 of 4,096 bytes"):
        apply([(BASE, PAGE)], [Lost()])


class Stuck:
    """A vCPU whose thread does not stop, for a while."""

    def __init__(self, times: int = 1 << 62) -> None:
        self.times = times
        self.one = Fake()

    def pre_fault_memory_once(self, gpa: int, size: int) -> PreFaultProgress:
        self.times -= 1
        if self.times >= 0:
            raise Busy("thread 7 has not stopped")
        return self.one.pre_fault_memory_once(gpa, size)


def test_a_vcpu_that_does_not_stop_skips_its_turn() -> None:
    stuck, one = Stuck(3), Fake()
    done = apply([(BASE, 10 * 64 * PAGE)], [stuck, one])
    assert done.bytes == done.size
    assert [it.calls for it in done.vcpus] == [4, 6]


def test_vcpus_of_which_none_stops_are_given_time() -> None:
    assert apply([(BASE, PAGE)], [Stuck(3), Stuck(5)]).bytes == PAGE


def test_vcpus_of_which_none_ever_stops_end_it_and_what_was_done_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    one = Stuck(0)

    def then_it_is_stuck(_: int) -> None:
        one.times = 1 << 62

    with pytest.raises(Busy, match="thread 7") as told:
        apply([(BASE, 65 * PAGE)], [one, Stuck()], on_bytes=then_it_is_stuck)
    assert (vars(told.value)["bytes"], vars(told.value)["size"]) == (64 * PAGE, 65 * PAGE)
    assert told.value.__notes__ == [f"{64 * PAGE:,} of {65 * PAGE:,} bytes were pre-faulted until then"]


def test_nobody_who_wants_it_ended_waits_for_vcpus_that_do_not_stop() -> None:
    stuck = Stuck(1 << 62)
    done = apply([(BASE, PAGE)], [stuck], wanted=lambda: stuck.times < 1 << 62)
    assert (done.ended, done.bytes) == ("interrupted", 0)


def test_who_wants_it_ended_has_what_was_done() -> None:
    one = Fake()
    done = apply([(BASE, 640 * PAGE)], [one], wanted=lambda: len(one.calls) == 3)
    assert (done.ended, done.bytes) == ("interrupted", 3 * 64 * PAGE)


@pytest.mark.parametrize(
    "answer",
    [
        lambda gpa, size: PreFaultProgress(gpa, size),
        lambda gpa, size: PreFaultProgress(gpa + size + PAGE, 0),
        lambda gpa, size: PreFaultProgress(gpa + PAGE, size),
        lambda gpa, size: PreFaultProgress(gpa - PAGE, size + PAGE),
    ],
)
def test_progress_that_cannot_be_is_an_error(answer: Callable[[int, int], PreFaultProgress]) -> None:
    class Odd:
        def pre_fault_memory_once(self, gpa: int, size: int) -> PreFaultProgress:
            return answer(gpa, size)

    with pytest.raises(PrefaultError):
        apply([(BASE, 2 * PAGE)], [Odd()])


class Slow(Process):
    """A VMM on a machine where a stop takes longer than a slice, whatever is done in it."""

    def __init__(self, extension: int = 1, unable: dict[int, int] | None = None) -> None:
        self.pid = 1
        self.sizes: list[int] = []
        self.extension = extension
        self.unable = unable or {}
        """How often each thread still says EOPNOTSUPP."""

    def call(self, tid: int, call: Call, **_: object) -> Answer:
        if call.arguments[1] == ioctls.KVM_CHECK_EXTENSION:
            return Answer(self.extension, b"", 0, 0)
        gpa, size, flags = struct.unpack("<QQQ40x", call.memory)
        if self.unable.get(tid):
            self.unable[tid] -= 1
            return Answer(-errno.EOPNOTSUPP, call.memory, 0, 0)
        self.sizes.append(size)
        return Answer(0, struct.pack("<QQQ40x", gpa + size, 0, flags), 0.004, 0.0039)

    def plan_of(self, found: Found, size: int) -> Applied:
        """Apply a plan of one range."""
        return self.apply(found, [(BASE, size)], slice_s=0.001)


def test_slow_stops_do_not_make_calls_ever_smaller() -> None:
    process = Slow()
    found = Found(1, 3, (VcpuThread(0, 4, 1, certain=True),))
    done = process.apply(found, [(BASE, 16 << 20)], slice_s=0.001)
    assert done.bytes == 16 << 20
    assert min(process.sizes) >= 1 << 20


TWO = Found(1, 3, (VcpuThread(0, 4, 1, certain=True), VcpuThread(1, 5, 2, certain=True)))


def test_a_vcpu_in_a_nested_guest_leaves_its_share_to_the_others_until_it_can() -> None:
    done = Slow(unable={1: 3}).plan_of(TWO, 16 << 20)
    assert done.bytes == done.size
    assert done.failed == []
    assert min(one.bytes for one in done.vcpus) > 0


def test_vcpus_that_are_always_unable_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._NAPS_S, errno.EOPNOTSUPP, 0)
    process = Slow(unable={1: 1 << 62, 2: 1 << 62})
    with pytest.raises(CapabilityMissing, match=errno.errorcode[errno.EOPNOTSUPP]) as told:
        process.plan_of(TWO, 16 << 20)
    assert vars(told.value)["bytes"] == 0


@pytest.mark.parametrize(
    ("answer", "said"), [(0, "does not report"), (-errno.EPERM, "KVM_CHECK_EXTENSION failed with EPERM")]
)
def test_why_a_vm_cannot_be_pre_faulted_is_told(answer: int, said: str) -> None:
    with pytest.raises(CapabilityMissing, match=said):
        Slow(answer).plan_of(TWO, PAGE)


def test_a_vcpu_that_does_not_stop_need_not_be_asked_for_the_capability() -> None:
    class Half(Slow):
        def call(self, tid: int, call: Call, **_: object) -> Answer:
            if tid == 1:
                raise Busy("thread 1 has not stopped")
            return super().call(tid, call)

    done = Half().plan_of(TWO, 1 << 20)
    assert [it.bytes for it in done.vcpus] == [0, 1 << 20]


def test_a_signal_while_no_vcpu_stops_is_told() -> None:
    class Never(Slow):
        def call(self, tid: int, call: Call, **_: object) -> Answer:
            signal.raise_signal(signal.SIGINT)
            raise Busy("thread 1 has not stopped")

    done = Never().plan_of(TWO, 1 << 20)
    assert (done.ended, done.signal, done.bytes, done.size) == ("interrupted", signal.SIGINT, 0, 1 << 20)


@pytest.mark.parametrize(
    ("number", "said"), [(errno.EPERM, "does not let thread 7"), (errno.EINVAL, "CHECKPOINT_RESTORE")]
)
def test_a_thread_that_may_not_be_asked_is_a_reason_not_a_crash(
    number: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def running(self, _: object) -> int:
            raise OSError(number, "no")

    process = Slow()
    process._suspend_seccomp = True
    monkeypatch.setattr(process, "_tracee", lambda _: Refusing())
    monkeypatch.setattr(refusal, "check", lambda *_, **__: None)
    with pytest.raises(NotTraceable, match=said):
        process._ask(7, lambda: False)


def test_a_plan_without_vcpus_is_wrong_usage() -> None:
    with pytest.raises(UsageError):
        apply([(BASE, PAGE)], [])


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), max_size=6),
    st.dictionaries(
        st.integers(0, 70), st.sampled_from([errno.ENOENT, errno.EFAULT, EHWPOISON, errno.ENOMEM])
    ),
    st.integers(1, 9),
    st.integers(1, 3),
)
def test_every_byte_is_done_or_reported(
    ranges: list[tuple[int, int]], errors: dict[int, int], at_most: int, vcpus: int
) -> None:
    plan = [(start * PAGE, size * PAGE) for start, size in ranges]
    fakes = [Fake(errors, at_most=at_most) for _ in range(vcpus)]
    done = apply(plan, fakes)
    assert done.bytes + sum(one.size for one in done.failed) == done.size
    wanted = set().union(*(pages(*one) for one in plan))
    told = set().union(*(pages(one.ipa, one.size) for one in done.failed))
    assert set().union(*(one.done for one in fakes)) <= wanted
    assert wanted <= set().union(*(one.done for one in fakes)) | told
    assert not wanted & errors.keys() - told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_waits_until_all_is_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_signals() as stop:
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTSTP)
        assert stop.is_set()
        assert stop.number == number
    assert signal.getsignal(number) is before


def test_the_signal_that_ended_it_is_told() -> None:
    process = Slow()
    found = Found(1, 3, (VcpuThread(0, 4, 1, certain=True),))
    done = process.apply(
        found, [(BASE, 1 << 30)], slice_s=0.001, on_bytes=lambda _: signal.raise_signal(signal.SIGTERM)
    )
    assert (done.ended, done.signal) == ("interrupted", signal.SIGTERM)
    assert 0 < done.bytes < done.size


def test_a_signal_while_vcpus_are_looked_for_goes_on_to_whom_it_would_have_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Reached(Exception):
        pass

    def handler(*_: object) -> None:
        raise Reached

    def find(*_: object) -> list[VcpuThread]:
        signal.raise_signal(signal.SIGTERM)
        return [VcpuThread(0, 4, 1, certain=True)]

    monkeypatch.setattr(vcpus, "find", find)
    process = Slow()
    monkeypatch.setattr(process, "_known", Descriptors(3, {0: 4}), raising=False)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Reached):
            process.find()
    finally:
        signal.signal(signal.SIGTERM, before)
