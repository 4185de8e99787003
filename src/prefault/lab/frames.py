# SPDX-License-Identifier: Apache-2.0
"""The frames in which the lab's agent reports over the job port.

A frame is one byte of kind, four bytes of big-endian length, and that many bytes. The stream begins
with HELLO; everything that follows it belongs to one job. A stream that ends without END is a lost
machine. Standard library only: this module also runs inside the lab.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass

VERSION = 1
LIMIT = 1 << 20
"""Longest payload of one frame; longer data goes in several."""

_HEADER = struct.Struct(">BI")


class Kind(enum.IntEnum):
    """What a frame carries."""

    HELLO = 1
    """The machine is up and the job starts; the payload is the protocol's version in decimal."""
    HEARTBEAT = 2
    """The agent is alive although the job says nothing."""
    STDOUT = 3
    STDERR = 4
    STATUS = 5
    """The job ended: its status in decimal, negative for the signal that ended it."""
    FILE = 6
    """A piece of a collected file: its path, a zero byte, the piece."""
    KERNEL_LOG = 7
    """A piece of the kernel log, all levels."""
    END = 8
    """Nothing follows."""


@dataclass(frozen=True)
class Frame:
    """One frame."""

    kind: Kind
    payload: bytes = b""


class BadFrame(ValueError):
    """The stream has something that is not a frame."""


def encode(frame: Frame) -> bytes:
    """Bytes of one frame on the wire."""
    return _HEADER.pack(frame.kind, len(frame.payload)) + frame.payload


def split(kind: Kind, data: bytes, prefix: bytes = b"") -> Iterator[Frame]:
    """Frames of one kind for ``data`` of any length, each payload beginning with ``prefix``."""
    step = LIMIT - len(prefix)
    for start in range(0, max(len(data), 1), step):
        yield Frame(kind, prefix + data[start : start + step])


class Decoder:
    """Turns pieces of the stream, cut anywhere, into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Add what was read and yield every frame that is now whole.

        :raises BadFrame: the kind is unknown or the length over LIMIT
        """
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            number, length = _HEADER.unpack_from(self._buffer)
            if length > LIMIT:
                raise BadFrame(f"frame of {length} bytes, the limit is {LIMIT}")
            if number not in Kind._value2member_map_:
                raise BadFrame(f"frame of unknown kind {number}")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            yield Frame(Kind(number), payload)
