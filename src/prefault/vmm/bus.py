# SPDX-License-Identifier: Apache-2.0
"""Which device answers at which guest physical address."""

from __future__ import annotations

from prefault.vmm.config import UART_BASE, UART_SIZE
from prefault.vmm.uart import Pl011


class Bus:
    """The serial port, and nothing elsewhere: that reads as zero and forgets what is written.

    :ivar accesses: how many there were
    :ivar strays: addresses at which there is nothing, in the order of their first use
    """

    def __init__(self, uart: Pl011) -> None:
        self._uart = uart
        self.accesses = 0
        self.strays: list[int] = []

    def read(self, gpa: int, width: int) -> int:
        """What a device answers."""
        self.accesses += 1
        offset = gpa - UART_BASE
        if 0 <= offset < UART_SIZE:
            return self._uart.read(offset)
        self._stray(gpa)
        return 0

    def write(self, gpa: int, width: int, value: int) -> None:
        """Give a device a value."""
        self.accesses += 1
        offset = gpa - UART_BASE
        if 0 <= offset < UART_SIZE:
            self._uart.write(offset, value)
        else:
            self._stray(gpa)

    def _stray(self, gpa: int) -> None:
        if gpa not in self.strays and len(self.strays) < 16:
            self.strays.append(gpa)
