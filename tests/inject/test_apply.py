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
from prefault.errors import CapabilityMissing, PrefaultError, ProcessLost, UsageError
from prefault.inject import vcpus
from prefault.inject.apply import Found, Process, apply, stop_signals
from prefault.inject.tracee import Answer, Call
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

    def __init__(self) -> None:
        self.pid = 1
        self.sizes: list[int] = []

    def call(self, tid: int, call: Call, **_: object) -> Answer:
        if call.arguments[1] == ioctls.KVM_CHECK_EXTENSION:
            return Answer(1, b"", 0, 0)
        gpa, size, flags = struct.unpack("<QQQ40x", call.memory)
        self.sizes.append(size)
        return Answer(0, struct.pack("<QQQ40x", gpa + size, 0, flags), 0.004, 0.0039)


def test_slow_stops_do_not_make_calls_ever_smaller() -> None:
    process = Slow()
    found = Found(1, 3, (VcpuThread(0, 4, 1, certain=True),))
    done = process.apply(found, [(BASE, 16 << 20)], slice_s=0.001)
    assert done.bytes == 16 << 20
    assert min(process.sizes) >= 1 << 20


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
