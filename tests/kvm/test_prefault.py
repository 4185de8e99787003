# SPDX-License-Identifier: Apache-2.0
"""The loop around the ioctl, against kernels good and bad."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.abi.constants import EHWPOISON
from prefault.errors import KvmError, PrefaultError
from prefault.kvm.prefault import HINTS, pre_fault_all
from prefault.machine import PreFaultProgress

PAGE = 4096
GPA = 0x8000_0000


class Kernel:
    """Maps as many pages a call as it was told; then an errno."""

    def __init__(self, steps: list[int], error: int = 0) -> None:
        self._steps = steps
        self._error = error
        self.calls: list[tuple[int, int]] = []

    def __call__(self, gpa: int, size: int) -> PreFaultProgress:
        self.calls.append((gpa, size))
        if self._steps:
            done = min(size, PAGE * self._steps.pop(0))
            return PreFaultProgress(gpa + done, size - done, 0 if done else errno.EINTR)
        return PreFaultProgress(gpa, size, self._error)


@given(steps=st.lists(st.integers(0, 5), max_size=20), extra=st.integers(1, 3))
def test_every_page_is_asked_for_exactly_once(steps: list[int], extra: int) -> None:
    size = PAGE * (sum(steps) + extra)
    kernel = Kernel([*steps, extra])
    pre_fault_all(kernel, GPA, size)
    asked = [gpa for gpa, _ in kernel.calls]
    assert asked == sorted(asked) and asked[0] == GPA
    assert all(gpa + left == GPA + size for gpa, left in kernel.calls)
    assert len(kernel.calls) == len(steps) + 1


def test_an_empty_range_asks_nothing() -> None:
    kernel = Kernel([])
    pre_fault_all(kernel, GPA, 0)
    assert kernel.calls == []


@pytest.mark.parametrize("error", sorted(HINTS))
def test_an_error_tells_what_was_not_done_and_what_to_do(error: int) -> None:
    with pytest.raises(KvmError) as caught:
        pre_fault_all(Kernel([2], error), GPA, 5 * PAGE)
    assert (caught.value.errno, caught.value.gpa, caught.value.size) == (error, GPA + 2 * PAGE, 3 * PAGE)
    assert HINTS[error] in str(caught.value)


def test_poison_is_an_error_with_a_name() -> None:
    with pytest.raises(KvmError, match="EHWPOISON"):
        pre_fault_all(Kernel([], EHWPOISON), GPA, PAGE)


@pytest.mark.parametrize(
    "progress",
    [
        PreFaultProgress(GPA, 2 * PAGE),
        PreFaultProgress(GPA - PAGE, 3 * PAGE),
        PreFaultProgress(GPA + PAGE, 2 * PAGE),
        PreFaultProgress(GPA + 3 * PAGE, 0),
        PreFaultProgress(GPA + 2 * PAGE, PAGE),
    ],
    ids=["none", "backwards", "size-kept", "beyond", "contradiction"],
)
def test_progress_that_cannot_be_is_a_kernel_bug(progress: PreFaultProgress) -> None:
    with pytest.raises(PrefaultError, match="kernel bug"):
        pre_fault_all(lambda gpa, size: progress, GPA, 2 * PAGE)
