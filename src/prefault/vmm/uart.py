# SPDX-License-Identifier: Apache-2.0
"""A PL011 serial port, as far as an operating system can tell.

What is sent is there at once; what is received waits until the guest reads it, however much it is.

Source: ARM DDI 0183, PrimeCell UART (PL011) Technical Reference Manual
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from prefault.faults.foreign import bytes_of, hexadecimal, items, whole

DR, RSR, FR, ILPR, IBRD, FBRD, LCR_H, CR = 0x00, 0x04, 0x18, 0x20, 0x24, 0x28, 0x2C, 0x30
IFLS, IMSC, RIS, MIS, ICR, DMACR = 0x34, 0x38, 0x3C, 0x40, 0x44, 0x48
_ID = 0xFE0
_ID_BYTES = bytes((0x11, 0x10, 0x34, 0x00, 0x0D, 0xF0, 0x05, 0xB1))
"""Part 0x011 by Arm, revision 3: FIFOs of 32 bytes, and few exits for much text."""

FR_CTS, FR_DSR, FR_DCD, FR_RXFE, FR_RXFF, FR_TXFE = 1 << 0, 1 << 1, 1 << 2, 1 << 4, 1 << 6, 1 << 7
INT_RX, INT_TX, INT_RT = 1 << 4, 1 << 5, 1 << 6
_INTERRUPTS = 0x7FF
_FIFO = 32

_PLAIN = {ILPR: 0xFF, IBRD: 0xFFFF, FBRD: 0x3F, LCR_H: 0xFF, CR: 0xFFFF, IFLS: 0x3F, DMACR: 0x7}
"""Registers that keep what is written to them, with the bits that they have."""
_LAST = 0xFFF
_RESET = {CR: 0x300, IFLS: 0x12}


def checked(saved: Any) -> dict[str, object]:
    """What ``Pl011.save`` gave.

    :raises ValueError, TypeError, LookupError: it did not give this
    """
    registers = {hexadecimal(name, _LAST): value for name, value in items(saved["registers"])}
    if set(registers) != set(_PLAIN):
        raise ValueError("its console has not the registers of a PL011")
    for offset, value in registers.items():
        if whole(value, _PLAIN[offset]) & ~_PLAIN[offset]:
            raise ValueError(f"its console has {value:#x} in the register at {offset:#x}")
    for name in ("mask", "raised"):
        whole(saved[name], _INTERRUPTS)
    if type(saved["line"]) is not bool:
        raise ValueError("the line of its console is neither high nor low")
    bytes_of(saved["received"])
    return dict(saved)


class Pl011:
    """The port.

    :param send: told each byte that the guest sends
    :param set_line: told when the interrupt line rises or falls
    """

    def __init__(self, send: Callable[[int], None], set_line: Callable[[bool], None]) -> None:
        self._send = send
        self._set_line = set_line
        self._lock = threading.RLock()  # several vCPUs, and who types
        self._registers = {offset: _RESET.get(offset, 0) for offset in _PLAIN}
        self._mask = 0
        self._raised = 0
        self._line = False
        self._received: deque[int] = deque()

    def read(self, offset: int) -> int:
        """What the guest reads from a register."""
        if offset == FR:  # before each byte that a console writes
            empty = 0 if self._received else FR_RXFE
            full = FR_RXFF if len(self._received) >= _FIFO else 0
            return FR_TXFE | FR_CTS | FR_DSR | FR_DCD | empty | full
        with self._lock:
            if offset == DR:
                return self._take()
            if offset in self._registers:
                return self._registers[offset]
        if _ID <= offset < _ID + 4 * len(_ID_BYTES):
            return _ID_BYTES[(offset - _ID) // 4]
        return {IMSC: self._mask, RIS: self._raised, MIS: self._raised & self._mask}.get(offset, 0)

    def _take(self) -> int:
        byte = self._received.popleft() if self._received else 0
        if not self._received:
            self._raised &= ~(INT_RX | INT_RT)
            self._update()
        return byte

    def write(self, offset: int, value: int) -> None:
        """What the guest writes to a register."""
        with self._lock:
            if offset == DR:
                self._send(value & 0xFF)
                self._raised |= INT_TX
            elif offset == IMSC:
                self._mask = value & _INTERRUPTS
            elif offset == ICR:
                self._raised &= ~value
            elif offset in self._registers:
                self._registers[offset] = value & _PLAIN[offset]
            self._update()

    def feed(self, data: bytes) -> None:
        """Type something."""
        if not data:
            return
        with self._lock:
            self._received.extend(data)
            self._raised |= INT_RX | INT_RT
            self._update()

    def _update(self) -> None:
        line = bool(self._raised & self._mask)
        if line != self._line:
            self._line = line
            self._set_line(line)

    def save(self) -> dict[str, object]:
        """All of it, for JSON. The interrupt line's level is the GIC's to keep."""
        with self._lock:
            return {
                "registers": {f"{offset:#x}": value for offset, value in self._registers.items()},
                "mask": self._mask,
                "raised": self._raised,
                "line": self._line,
                "received": bytes(self._received).hex(),
            }

    def restore(self, saved: Mapping[str, object]) -> None:
        """Be as it was saved.

        :raises ValueError, TypeError, LookupError: this is not what ``save`` gave
        """
        found: dict[str, Any] = checked(saved)
        with self._lock:
            self._registers = {int(offset, 16): value for offset, value in found["registers"].items()}
            self._received = deque(bytes_of(found["received"]))
            self._mask, self._raised, self._line = found["mask"], found["raised"], found["line"]
