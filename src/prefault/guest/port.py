# SPDX-License-Identifier: Apache-2.0
"""What guest programs tell the host: register offsets of the port, and their meaning as events.

Every register takes writes of 8 bytes. ``proceed`` runs a vCPU up to its next event.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prefault.errors import GuestFailed
from prefault.guest.program import PORT, PORT_SIZE
from prefault.machine import Exit, MmioExit, Vcpu

MARKER = 0x00
VALUE = 0x08
DONE = 0x10
ESR = 0x18
ELR = 0x20
FAR = 0x28
HPFAR = 0x30
EXPECTED = 0x38
UNEXPECTED = 0x40

_DETAILS = (ELR, FAR, HPFAR, EXPECTED)
_EC_SHIFT = 26


@dataclass(frozen=True)
class AtMarker(Exit):
    """The guest stands at ``Marker(number)``."""

    number: int


@dataclass(frozen=True)
class Reported(Exit):
    """The guest sent its value by ``Report``."""

    value: int


@dataclass(frozen=True)
class Done(Exit):
    """The guest is past its last step."""


def proceed(vcpu: Vcpu) -> Exit:
    """Run a vCPU up to its next event or other exit.

    :returns: AtMarker, Reported or Done for writes to the port, any other exit as it is
    :raises GuestFailed: the guest took an exception, or ``Expect`` did not hold
    """
    details: dict[int, int] = {}
    while True:
        exit_ = vcpu.run()
        if not isinstance(exit_, MmioExit) or not exit_.is_write:
            return exit_
        register = exit_.gpa - PORT
        if not 0 <= register < PORT_SIZE:
            return exit_
        if register not in _DETAILS:
            return _event(register, exit_, details)
        details[register] = exit_.data


def event_of(exit_: Exit) -> Exit:
    """What one exit means by itself, for who runs a vCPU without ``proceed``."""
    if not isinstance(exit_, MmioExit) or not exit_.is_write:
        return exit_
    register = exit_.gpa - PORT
    inside = 0 <= register < PORT_SIZE and register not in _DETAILS
    return _event(register, exit_, {}) if inside else exit_


def events(vcpu: Vcpu) -> Iterator[Exit]:
    """Every event of a vCPU up to and with Done, or up to the first exit that is no event."""
    while True:
        event = proceed(vcpu)
        yield event
        if not isinstance(event, AtMarker | Reported):
            return


def _event(register: int, exit_: MmioExit, details: dict[int, int]) -> Exit:
    if register == MARKER:
        return AtMarker(exit_.data)
    if register == VALUE:
        return Reported(exit_.data)
    if register == DONE:
        return Done()
    if register == ESR:
        raise _exception(exit_.data, details)
    if register == UNEXPECTED:
        raise GuestFailed(
            f"the guest read {exit_.data:#x} where it expected {details.get(EXPECTED, 0):#x}; "
            "the memory behind the slot does not hold what the host wrote there"
        )
    return exit_


def _exception(esr: int, details: dict[int, int]) -> GuestFailed:
    elr, far = details.get(ELR, 0), details.get(FAR, 0)
    stage2 = f", HPFAR_EL2 {details[HPFAR]:#x}" if HPFAR in details else ""
    return GuestFailed(
        f"the guest took an exception: ESR {esr:#x} (class {esr >> _EC_SHIFT & 0x3F:#x}), "
        f"ELR {elr:#x}, FAR {far:#x}{stage2}; check the program's addresses against the memslots",
        esr=esr,
        elr=elr,
        far=far,
    )
