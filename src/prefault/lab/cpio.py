# SPDX-License-Identifier: Apache-2.0
"""A newc cpio archive, the form of an initial RAM file system, written in plain Python.

Needs no root: device nodes and owners are only numbers in the archive. The same entries give the same
bytes. Several archives written one after the other are unpacked in that order by the kernel, so a job's
files can follow a cached base.

Source: Documentation/driver-api/early-userspace/buffer-format.rst
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_FIELDS = 13
_HEADER_SIZE = len(_MAGIC) + 8 * _FIELDS


@dataclass(frozen=True)
class Entry:
    """One file, folder, link or device. ``name`` has no leading slash."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def file(name: str, data: bytes, mode: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(name.lstrip("/"), stat.S_IFREG | mode, data)


def folder(name: str, mode: int = 0o755) -> Entry:
    """A folder."""
    return Entry(name.lstrip("/"), stat.S_IFDIR | mode)


def link(name: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(name.lstrip("/"), stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    """A character device node."""
    return Entry(name.lstrip("/"), stat.S_IFCHR | mode, device=(major, minor))


def with_parents(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries, each parent folder that is not among them coming before its first child."""
    seen: set[str] = set()
    for entry in entries:
        for parent in reversed(PurePosixPath(entry.name).parents):
            if str(parent) not in seen | {"."}:
                seen.add(str(parent))
                yield folder(str(parent))
        if stat.S_ISDIR(entry.mode):
            if entry.name in seen:
                continue
            seen.add(entry.name)
        yield entry


def tree(top: Path) -> Iterator[Entry]:
    """Entries for everything below ``top``, by name. Owners and times are not kept."""
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            yield link(name, str(path.readlink()))
        elif stat.S_ISDIR(status.st_mode):
            yield folder(name, stat.S_IMODE(status.st_mode))
        elif stat.S_ISREG(status.st_mode):
            yield file(name, path.read_bytes(), stat.S_IMODE(status.st_mode))


def _pad(length: int) -> bytes:
    return b"\0" * (-length % 4)


def _encode(entry: Entry, inode: int) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    head = _MAGIC + b"".join(b"%08X" % value for value in fields) + name
    return head + _pad(len(head)) + entry.data + _pad(len(entry.data))


def write(entries: Iterable[Entry]) -> bytes:
    """The archive; its length is a multiple of 4, so another one may follow."""
    pieces = [_encode(entry, inode) for inode, entry in enumerate(with_parents(entries), start=1)]
    pieces.append(_encode(Entry(_TRAILER, 0), 0))
    return b"".join(pieces)


def read(archive: bytes) -> Iterator[Entry]:
    """Entries of one archive, for checking what was written.

    :raises ValueError: the bytes are not a newc archive
    """
    at = 0
    while True:
        if archive[at : at + len(_MAGIC)] != _MAGIC:
            raise ValueError(f"no newc header at byte {at}")
        header = archive[at + len(_MAGIC) : at + _HEADER_SIZE]
        values = [int(header[8 * i : 8 * i + 8], 16) for i in range(_FIELDS)]
        mode, size, name_size = values[1], values[6], values[11]
        name = archive[at + _HEADER_SIZE : at + _HEADER_SIZE + name_size - 1].decode()
        data_at = at + _HEADER_SIZE + name_size
        data_at += -data_at % 4
        if name == _TRAILER:
            return
        yield Entry(name, mode, archive[data_at : data_at + size], (values[9], values[10]))
        at = data_at + size + (-size % 4)
