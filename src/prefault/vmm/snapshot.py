# SPDX-License-Identifier: Apache-2.0
"""A snapshot's files, and how they are known to be whole.

A snapshot is a folder with two files:

``memory``
    the guest's memory, byte for byte from its first address on, with holes for chunks that are all zero;
``state``
    one line ``prefault-snapshot 1 LENGTH CRC32``, then that many bytes of JSON, which has everything
    else, and the size and a CRC-32 of each chunk of the memory.

Any flipped byte and any missing end is found by that; the sums are against accidents, not against
somebody who wants to deceive. What is no snapshot at all, or one of somebody else's making, is refused with
a reason, whatever it is. A folder appears under its name when all of it is on the disk, never before.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import re
import shutil
import stat
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefault.errors import BadSnapshot, PrefaultError, UsageError
from prefault.faults import foreign

CHUNK = 1 << 16
"""Bytes with a sum of their own: the largest page size that a host can have."""
VERSION = 1
STATE, MEMORY = "state", "memory"

MOST_STATE = 256 << 20
"""Bytes of a state: that of a guest with 1 TiB, the most that KVM's addresses have room for, has 190 MiB."""

_HEAD = re.compile(rb"prefault-snapshot (\d{1,9}) (\d{1,9}) ([0-9a-f]{8})\n")
_LONGEST_HEAD = 64
_LONGEST_REASON = 300
_FOREIGN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_MOST_SUM = (1 << 32) - 1
_ZEROES = bytes(CHUNK)
_ZERO_SUM = zlib.crc32(_ZEROES)


def refuse_existing(folder: Path) -> None:
    """Check that a snapshot can be written there, before anything has run.

    :raises UsageError: something has that name, or there is no folder to put it into
    """
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} is there already: name another folder, or move it away")
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"{folder.absolute().parent} is no folder to put a snapshot into: make it first")


@dataclass(frozen=True)
class Written:
    """What was written."""

    folder: Path
    memory: int
    """Bytes of the guest's memory."""
    stored: int
    """Bytes of it that are not zero, by chunks."""


def write(folder: Path, state: Mapping[str, object], memory: memoryview) -> Written:
    """Write a snapshot: all of it, or nothing.

    :param memory: of the guest, which is stopped
    :raises PrefaultError: the disk is full, or something else is wrong with the folder
    """
    refuse_existing(folder)
    partial = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        with _removed_on_failure(partial):
            partial.mkdir()
            sums, stored = _write_memory(partial / MEMORY, memory)
            facts = {"size": len(memory), "chunk": CHUNK, "crc32": sums}
            _write_state(partial / STATE, {**state, "memory": facts})
            _sync(partial)
            partial.rename(folder)
        _sync(folder.absolute().parent)
    except OSError as error:
        raise PrefaultError(f"the snapshot {folder} could not be written: {error.strerror}") from error
    return Written(folder, len(memory), stored)


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_memory(path: Path, memory: memoryview) -> tuple[list[int | None], int]:
    """The sums of the chunks, None for those that are all zero; and the bytes of the others."""
    sums: list[int | None] = []
    stored = 0
    with path.open("xb", buffering=0) as file:
        os.truncate(file.fileno(), len(memory))
        for start in range(0, len(memory), CHUNK):
            chunk = bytes(memory[start : start + CHUNK])
            if chunk == _ZEROES[: len(chunk)]:
                sums.append(None)
                continue
            sums.append(zlib.crc32(chunk))
            _write_all(file.fileno(), chunk, start)
            stored += len(chunk)
        os.fsync(file.fileno())
    return sums, stored


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _write_state(path: Path, state: Mapping[str, object]) -> None:
    body = json.dumps(state, separators=(",", ":")).encode()
    head = f"prefault-snapshot {VERSION} {len(body)} {zlib.crc32(body):08x}\n".encode()
    with path.open("xb") as file:
        file.write(head + body)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def foreign_refused(folder: Path) -> Iterator[None]:
    """Whatever is wrong with what somebody else may have written is a reason to refuse it.

    :raises BadSnapshot: in place of what Python raises on values that are not what they should be
    """
    try:
        yield
    except (*_FOREIGN, UsageError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise BadSnapshot(
            folder, f"its state is not what it should be: {reason[:_LONGEST_REASON]}"
        ) from error


def _open(folder: Path, name: str) -> int:
    """Open one of the files for reading.

    :raises BadSnapshot: it cannot be, or is a pipe or the like, which might never answer or never end
    """
    try:
        fd = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise BadSnapshot(folder, f"its {name} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise BadSnapshot(folder, f"its {name} is no regular file")
    return fd


def _read_state(folder: Path) -> bytes:
    try:
        with open(_open(folder, STATE), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _LONGEST_HEAD + MOST_STATE:
                raise BadSnapshot(folder, f"its state has over {MOST_STATE >> 20} MiB, more than any guest's")
            return file.read(size + 1)  # files of procfs have more than they say, without end
    except OSError as error:
        raise BadSnapshot(folder, f"its state cannot be read: {error.strerror}") from error


def _parsed(folder: Path, text: bytes) -> tuple[dict[str, Any], int, list[int | None]]:
    """The state, and what it says of the memory: bytes, and sums of the chunks.

    :raises BadSnapshot: it is not the state of a snapshot
    """
    with foreign_refused(folder):
        found = foreign.loads(_body(folder, text))
        if not isinstance(found, dict) or not isinstance(found.get("memory"), dict):
            raise ValueError("it says nothing of its memory")
        facts = found["memory"]
        size, chunk, sums = facts["size"], facts["chunk"], facts["crc32"]
        if type(size) is not int or size <= 0 or type(chunk) is not int or not isinstance(sums, list):
            raise ValueError("it does not say how large its memory is")
        if chunk != CHUNK or len(sums) != -(-size // CHUNK):
            raise ValueError(f"{len(sums)} chunks of {chunk} bytes do not make {size}")
        if not all(one is None or (type(one) is int and 0 <= one <= _MOST_SUM) for one in sums):
            raise ValueError("the checksums of its memory are none")
        return found, size, sums


def _body(folder: Path, text: bytes) -> bytes:
    """What comes after the first line, if that fits it."""
    head = _HEAD.match(text)
    if not head:
        raise BadSnapshot(folder, "its state does not begin as a snapshot's does")
    version, length, body = int(head[1]), int(head[2]), text[head.end() :]
    if version != VERSION:
        raise BadSnapshot(folder, f"it has version {version}, this prefault reads version {VERSION}")
    if len(body) != length:
        raise BadSnapshot(folder, f"its state has {len(body)} bytes, not {length}: it is truncated")
    if f"{zlib.crc32(body):08x}".encode() != head[3]:
        raise BadSnapshot(folder, "its state is damaged: the checksum is another one")
    return body


class Snapshot:
    """A snapshot to restore from. Its memory file stays open until ``close``.

    :ivar raw: the state file
    :ivar state: what was given to ``write``
    :ivar size: bytes of guest memory
    :ivar sums: CRC-32 of each chunk, None for those that are all zero
    :raises BadSnapshot: it is no snapshot, truncated, or its state is damaged
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw = _read_state(folder)
        self.state, self.size, self.sums = _parsed(folder, self.raw)
        self._file = self._open_memory()

    def _open_memory(self) -> int:
        fd = _open(self.folder, MEMORY)
        found = os.fstat(fd).st_size
        if found != self.size:
            os.close(fd)
            raise BadSnapshot(self.folder, f"its memory has {found} bytes in place of {self.size}")
        return fd

    @property
    def descriptor(self) -> int:
        """The memory file."""
        return self._file

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of each chunk that is not all zero, each checked; the others are checked, too.

        :raises BadSnapshot: a chunk is damaged
        """
        for index, expected in enumerate(self.sums):
            start = index * CHUNK
            if expected is None and _is_hole(self._file, start, self._end(index)):
                continue
            chunk = self._read(start, self._end(index) - start)
            self.check_chunk(index, chunk)
            if expected is not None:
                yield start, chunk

    def check(self) -> None:
        """Check all of the memory.

        :raises BadSnapshot: a chunk is damaged
        """
        for _ in self.pieces():
            pass

    def check_chunk(self, index: int, chunk: bytes | memoryview) -> None:
        """Check one chunk.

        :raises BadSnapshot: it is damaged
        """
        expected = self.sums[index]
        if expected is None:
            expected = _ZERO_SUM if len(chunk) == CHUNK else zlib.crc32(bytes(len(chunk)))
        if zlib.crc32(chunk) != expected:
            raise BadSnapshot(self.folder, f"its memory is damaged at byte {index * CHUNK:#x} or soon after")

    def _end(self, index: int) -> int:
        return min(self.size, (index + 1) * CHUNK)

    def _read(self, start: int, size: int) -> bytes:
        try:
            chunk = os.pread(self._file, size, start)
        except OSError as error:
            raise BadSnapshot(self.folder, f"its memory cannot be read: {error.strerror}") from error
        if len(chunk) < size:
            raise BadSnapshot(self.folder, f"its memory is truncated at byte {start + len(chunk):#x}")
        return chunk

    def close(self) -> None:
        """Close the memory file. Safe to call again."""
        fd, self._file = self._file, -1
        if fd >= 0:
            os.close(fd)


def _is_hole(fd: int, start: int, end: int) -> bool:
    """Whether the file has nothing there, so that it reads as zeroes."""
    try:
        return os.lseek(fd, start, os.SEEK_DATA) >= end
    except OSError:  # no data from there to the end of the file
        return True


# A snapshot as one stream, for ways that know nothing of holes.

_PACK = b"prefault-snapshot-pack 1\n"


def pack(folder: Path, target: Path) -> None:
    """Put a snapshot into one file without its holes."""
    snapshot = Snapshot(folder)
    try:
        with target.open("xb") as file:
            file.write(_PACK + len(snapshot.raw).to_bytes(8, "little") + snapshot.raw)
            for _, chunk in snapshot.pieces():
                file.write(chunk)
    finally:
        snapshot.close()


def unpack(data: bytes, folder: Path) -> None:
    """Make a snapshot again of what ``pack`` wrote. Whoever opens it checks it.

    :raises BadSnapshot: these are not the bytes of one
    :raises PrefaultError: the disk is full, or something else is wrong with the folder
    """
    refuse_existing(folder)
    at = len(_PACK) + 8
    if not data.startswith(_PACK) or len(data) < at:
        raise BadSnapshot(folder, "what came is not a packed snapshot")
    length = int.from_bytes(data[at - 8 : at], "little")
    state, chunks = data[at : at + length], memoryview(data)[at + length :]
    _, size, sums = _parsed(folder, state)
    partial = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        with _removed_on_failure(partial):
            partial.mkdir()
            (partial / STATE).write_bytes(state)
            _unpack_memory(partial / MEMORY, size, sums, chunks)
            partial.rename(folder)
    except OSError as error:
        raise PrefaultError(f"the snapshot {folder} could not be written: {error.strerror}") from error


def _unpack_memory(path: Path, size: int, sums: list[int | None], chunks: memoryview) -> None:
    with path.open("xb", buffering=0) as file:
        os.truncate(file.fileno(), size)
        for index, expected in enumerate(sums):
            if expected is not None:
                length = min(CHUNK, size - index * CHUNK)
                _write_all(file.fileno(), bytes(chunks[:length]), index * CHUNK)
                chunks = chunks[length:]


@contextlib.contextmanager
def mapped(snapshot: Snapshot) -> Iterator[tuple[memoryview, int]]:
    """The memory file as a view and an address, for copying from it without copies of our own."""
    # A private mapping is writable, which ctypes asks for; nobody writes to it.
    area = mmap.mmap(snapshot.descriptor, snapshot.size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    cell = (ctypes.c_ubyte * snapshot.size).from_buffer(area)
    view = memoryview(cell).cast("B")
    try:
        yield view, ctypes.addressof(cell)
    finally:
        view.release()
        del cell
        area.close()
