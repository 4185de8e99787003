# SPDX-License-Identifier: Apache-2.0
"""What the guest tells the host, with a vCPU that plays back exits."""

from __future__ import annotations

from typing import cast

import pytest

from prefault.errors import GuestFailed
from prefault.guest import port
from prefault.guest.program import PORT, PORT_SIZE
from prefault.machine import Exit, Interrupted, MmioExit, Vcpu


class Playback:
    """Gives the exits that it was given."""

    def __init__(self, *exits: Exit) -> None:
        self._exits = list(exits)

    def run(self) -> Exit:
        return self._exits.pop(0)


def told(register: int, data: int) -> MmioExit:
    return MmioExit(PORT + register, 8, True, data)


def proceed(*exits: Exit) -> Exit:
    return port.proceed(cast(Vcpu, Playback(*exits)))


@pytest.mark.parametrize(
    ("exit_", "event"),
    [
        (told(port.MARKER, 3), port.AtMarker(3)),
        (told(port.VALUE, 1 << 63), port.Reported(1 << 63)),
        (told(port.DONE, 0), port.Done()),
    ],
)
def test_a_write_to_the_port_is_an_event(exit_: Exit, event: Exit) -> None:
    assert proceed(exit_) == event


@pytest.mark.parametrize(
    "exit_",
    [
        Interrupted(),
        MmioExit(PORT, 8, False),
        MmioExit(PORT - 8, 8, True, 1),
        MmioExit(PORT + PORT_SIZE, 8, True, 1),
        told(0x800, 1),
    ],
)
def test_any_other_exit_stays_what_it_is(exit_: Exit) -> None:
    assert proceed(exit_) == exit_


def test_an_exception_is_told_with_its_registers() -> None:
    with pytest.raises(GuestFailed, match="0x86000010") as caught:
        proceed(
            told(port.ELR, 0x40), told(port.FAR, 0x80), told(port.HPFAR, 0x10), told(port.ESR, 0x8600_0010)
        )
    assert (caught.value.esr, caught.value.elr, caught.value.far) == (0x8600_0010, 0x40, 0x80)
    assert "HPFAR_EL2 0x10" in str(caught.value)


def test_a_value_that_was_not_expected_is_told_with_both() -> None:
    with pytest.raises(GuestFailed, match=r"0x5.*0x7"):
        proceed(told(port.EXPECTED, 7), told(port.UNEXPECTED, 5))


def test_events_end_with_done_or_what_is_no_event() -> None:
    def kinds(*exits: Exit) -> list[type[Exit]]:
        return [type(event) for event in port.events(cast(Vcpu, Playback(*exits)))]

    marker, value, done = told(port.MARKER, 0), told(port.VALUE, 0), told(port.DONE, 0)
    assert kinds(marker, value, done, marker) == [port.AtMarker, port.Reported, port.Done]
    assert kinds(marker, Interrupted(), done) == [port.AtMarker, Interrupted]
