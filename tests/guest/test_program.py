# SPDX-License-Identifier: Apache-2.0
"""What a guest program may say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import UsageError
from prefault.guest.program import (
    Argument,
    DeviceRead,
    EnterL2,
    Execute,
    Program,
    Read,
    Step,
    Walk,
    Write,
    resolve,
)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Read(1, 2),
        lambda: Read(0, 3),
        lambda: Write(4, 0, 8),
        lambda: Execute(2),
        lambda: Walk(0, 0, 8),
        lambda: Walk(0, 8, 0),
        lambda: Walk(0, 8, 12),
        lambda: Walk(0, 8, 8, 1001),
        lambda: DeviceRead(0, 4, True, 32),
        lambda: DeviceRead(0, 8, False, 32),
        lambda: DeviceRead(0, 8, True, 64),
        lambda: DeviceRead(0, 4, False, 16),
        lambda: EnterL2((EnterL2(()),)),
        lambda: Program((), 0x800),
        lambda: Argument(8),
        lambda: Argument(-1),
    ],
)
def test_what_a_guest_cannot_do_is_refused_when_it_is_said(make: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        make()


@given(permille=st.integers(0, 1000), thousands=st.integers(1, 5))
def test_of_a_thousand_accesses_the_asked_number_writes(permille: int, thousands: int) -> None:
    walk = Walk(0, 8, 8, permille)
    assert sum(walk.is_write(index) for index in range(1000 * thousands)) == permille * thousands


@given(permille=st.integers(1, 999), start=st.integers(0, 5000))
def test_writes_are_spread_evenly(permille: int, start: int) -> None:
    walk = Walk(0, 8, 8, permille)
    window = 1000 // permille + 1
    assert any(walk.is_write(index) for index in range(start, start + window))


@pytest.mark.parametrize(
    ("steps", "count"),
    [
        ((), 0),
        ((Read(Argument(0)),), 1),
        ((Write(Argument(1), Argument(4)),), 5),
        ((EnterL2((Walk(Argument(2), 8, 8),)),), 3),
    ],
)
def test_a_program_knows_how_many_arguments_it_needs(steps: tuple[Step, ...], count: int) -> None:
    assert Program(steps).argument_count == count


def test_only_a_program_with_an_l2_is_nested() -> None:
    assert Program((EnterL2(()),)).nested
    assert not Program((Read(0),)).nested


def test_an_argument_that_was_not_given_is_an_error() -> None:
    assert resolve(5, ()) == 5
    assert resolve(Argument(1), (7, 9)) == 9
    with pytest.raises(UsageError, match="argument 1"):
        resolve(Argument(1), (7,))
