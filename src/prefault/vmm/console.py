# SPDX-License-Identifier: Apache-2.0
"""What the guest says: passed on in pieces, and searched for words that something hangs on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_PIECE = 512


class Console:
    """Takes the serial port's bytes.

    :param out: given pieces of output, by the thread that said it last or by ``flush``
    :ivar size: bytes that were said
    """

    def __init__(self, out: Callable[[bytes], None]) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._piece = bytearray()
        self._line = bytearray()
        self._watched: list[tuple[bytes, Callable[[], None]]] = []
        self.size = 0
        self.first: float | None = None

    def watch(self, text: str, then: Callable[[], None]) -> None:
        """Call ``then`` each time a line has ``text`` in it, as soon as it is there whole.

        Several may wait for the same text; they are called in the order in which they came.
        """
        self._watched.append((text.encode(), then))

    def send(self, byte: int) -> None:
        """Take one byte from the guest."""
        with self._lock:
            if self.first is None:
                self.first = time.monotonic()
            self.size += 1
            self._piece.append(byte)
            self._line.append(byte)
            for text, then in self._watched:
                if self._line.endswith(text):
                    then()
            if byte == 10:
                self._line.clear()
            if byte == 10 or len(self._piece) >= _PIECE:
                self._pass_on()

    def flush(self) -> None:
        """Pass on what was said since."""
        with self._lock:
            self._pass_on()

    def _pass_on(self) -> None:
        if self._piece:
            piece = bytes(self._piece)
            self._piece.clear()
            self._out(piece)
