# SPDX-License-Identifier: Apache-2.0
"""The file of a capture: pages of the kernel's ring buffers as they are, and what it takes to read them.

A file begins with ``MAGIC``; frames follow, each with a head of 8 bytes (kind, CPU, length) and its bytes:
first one HEAD (JSON: architecture, event formats, page layout), then pages, at the end one TAIL (JSON: lost
events, threads). A file whose writer was killed has no TAIL, and is readable up to there.

Standard library only. Source: Documentation/trace/ring-buffer-map.rst, kernel/trace/ring_buffer.c
"""

from __future__ import annotations

import enum
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from prefault.errors import UsageError
from prefault.faults.foreign import check_page_size, known, threads

MAGIC = b"prefault-capture 1\n"
_FRAME = struct.Struct("<BxHI")
_LONGEST = 16 << 20
"""A frame beyond this is no frame."""

MOST_PAGE = 1 << 20
"""More than any kernel's trace pages have."""


class Kind(enum.IntEnum):
    """What a frame holds."""

    HEAD = 1
    PAGE = 2
    TAIL = 3


@dataclass(frozen=True)
class Layout:
    """Of a page, which begins with a timestamp of 8 bytes.

    :ivar commit: offset of the word that says how much of the page is used
    :ivar commit_size: its size in bytes
    :ivar data: offset of the first event
    :ivar size: of the page
    """

    commit: int
    commit_size: int
    data: int
    size: int


@dataclass(frozen=True)
class Head:
    """What was known when the capture began.

    :ivar formats: the text of each event's ``format`` file, by name
    :ivar header_page: the text of ``events/header_page``
    """

    machine: str
    kernel: str
    page_size: int
    clock: str
    began: str
    pid: int | None
    formats: dict[str, str]
    header_page: str
    byte_order: str = "little"

    @property
    def layout(self) -> Layout:
        """Where things are in a page."""
        return layout(self.header_page)


@dataclass(frozen=True)
class Tail:
    """What was known when it ended.

    :ivar lost: events that the kernel had to drop
    :ivar threads: thread id → (process id, name), as far as they were seen
    :ivar seconds: how long it took
    """

    lost: int
    seconds: float
    threads: dict[int, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """One page of one CPU's buffer, what is not used cut off."""

    cpu: int
    data: bytes


def layout(header_page: str) -> Layout:
    """Read ``events/header_page``.

    :raises UsageError: it says something else
    """
    fields = {
        name: (int(offset), int(size))
        for name, offset, size in re.findall(
            r"field: [\w ]+? (\w+);\s*offset:(\d+);\s*size:(\d+);", header_page
        )
    }
    if not {"commit", "data"} <= fields.keys():
        raise UsageError("the layout of the kernel's trace pages is not known: " + header_page[:200])
    (commit, commit_size), (data, size) = fields["commit"], fields["data"]
    if commit_size not in (4, 8) or not commit + commit_size <= data < data + size <= MOST_PAGE:
        raise UsageError("the layout of the kernel's trace pages makes no sense: " + header_page[:200])
    return Layout(commit, commit_size, data, data + size)


def frame(kind: Kind, data: bytes, cpu: int = 0) -> bytes:
    """One frame as it is written."""
    return _FRAME.pack(kind, cpu, len(data)) + data


def head_frame(head: Head) -> bytes:
    """The first frame."""
    return frame(Kind.HEAD, json.dumps(vars(head)).encode())


def tail_frame(tail: Tail) -> bytes:
    """The last frame."""
    return frame(Kind.TAIL, json.dumps(vars(tail)).encode())


def read(file: BinaryIO, name: str) -> Iterator[Head | Page | Tail]:
    """What is in a capture, in order: the head first, the tail last if its writer came to it.

    :raises UsageError: it is no capture, or damaged
    """
    if file.read(len(MAGIC)) != MAGIC:
        raise UsageError(f"{name}: no capture of `prefault record`")
    began, at = False, len(MAGIC)
    while len(head := file.read(_FRAME.size)) == _FRAME.size:
        kind, cpu, length = _FRAME.unpack(head)
        if length > _LONGEST or kind not in iter(Kind) or (kind == Kind.HEAD) == began:
            raise UsageError(f"{name}: damaged at byte {at}")
        began, at = True, at + _FRAME.size + length
        data = file.read(length)
        if len(data) < length:
            return
        yield Page(cpu, data) if kind == Kind.PAGE else _facts(Kind(kind), data, name)


def _head(head: Head) -> Head:
    check_page_size(head.page_size)
    if not isinstance(head.formats, dict) or not all(isinstance(one, str) for one in head.formats.values()):
        raise TypeError("its formats are no texts")
    if head.pid is not None and not 0 < head.pid < 1 << 31:
        raise ValueError(f"{head.pid} is no process id")
    return head


def _facts(kind: Kind, data: bytes, name: str) -> Head | Tail:
    try:
        facts = json.loads(data)
        if kind is Kind.HEAD:
            return _head(Head(**known(Head, facts)))
        return Tail(**{**known(Tail, facts), "threads": threads(facts["threads"])})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{name}: damaged: its {kind.name.lower()} cannot be read ({error})") from error
