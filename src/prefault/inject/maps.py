# SPDX-License-Identifier: Apache-2.0
"""What a process has mapped, and whether a stack pointer is in a stack.

Source: Documentation/filesystems/proc.rst; include/uapi/linux/fs.h, PROCMAP_QUERY
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")

_NAME_BYTES = 4096


class _Query(ctypes.Structure):
    """struct procmap_query"""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("size", "query_flags", "query_addr", "vma_start", "vma_end")),
        *((name, ctypes.c_uint64) for name in ("vma_flags", "vma_page_size", "vma_offset", "inode")),
        *((name, ctypes.c_uint32) for name in ("dev_major", "dev_minor", "vma_name_size", "build_id_size")),
        *((name, ctypes.c_uint64) for name in ("vma_name_addr", "build_id_addr")),
    ]


_PROCMAP_QUERY = 3 << 30 | ctypes.sizeof(_Query) << 16 | ord("f") << 8 | 17
_ACCESS = ((1, "r", "-"), (2, "w", "-"), (4, "x", "-"), (8, "s", "p"))
"""PROCMAP_QUERY_VMA_*, as a line of the file has them."""


@dataclass(frozen=True)
class Mapping:
    """A line of /proc/PID/maps."""

    start: int
    end: int
    access: str
    name: str


def mappings(pid: int) -> list[Mapping]:
    """What a process has mapped; nothing if it is gone."""
    found = []
    with contextlib.suppress(OSError):
        # Not splitlines(): a file's name may have what that takes for an end. A zombie has no line.
        for line in filter(None, (PROC / str(pid) / "maps").read_text(errors="replace").split("\n")):
            span, access, *rest = line.split(maxsplit=5)
            start, _, end = span.partition("-")
            found.append(Mapping(int(start, 16), int(end, 16), access, rest[3] if len(rest) > 3 else ""))
    return found


def mapping_at(pid: int, address: int) -> Mapping | None:
    """The mapping that an address is in; None if there is none.

    Asked for alone (Linux 6.11): a process may have so many that reading all takes longer than a thread may
    stand still.
    """
    try:
        fd = os.open(PROC / str(pid) / "maps", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _asked(fd, address)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            return None
        return next((one for one in mappings(pid) if one.start <= address < one.end), None)
    finally:
        os.close(fd)


def _asked(fd: int, address: int) -> Mapping:
    name = ctypes.create_string_buffer(_NAME_BYTES)
    query = _Query(size=ctypes.sizeof(_Query), query_addr=address)
    query.vma_name_size, query.vma_name_addr = len(name), ctypes.addressof(name)
    fcntl.ioctl(fd, _PROCMAP_QUERY, query)
    access = "".join(yes if query.vma_flags & bit else no for bit, yes, no in _ACCESS)
    return Mapping(query.vma_start, query.vma_end, access, name.value.decode(errors="replace"))


def stack_at(pid: int, address: int) -> tuple[int, str]:
    """Where the mapping begins that a thread's stack pointer is in, and why that can be no stack.

    Below a stack pointer, only a stack of its own has nothing else. Others are made of a piece of the heap
    (Go's goroutines have them) or of a variable.

    :returns: (address, ""), if it can be a stack; otherwise where the pointer is, as a part of a sentence
    """
    one = mapping_at(pid, address)
    if one is None:
        return 0, "where nothing is mapped"
    return one.start, _why_no_stack(one, mapping_at(pid, one.start - 1) if one.start else None)


def _why_no_stack(one: Mapping, before: Mapping | None) -> str:
    if not (one.access.startswith("rw") and one.access.endswith("p")):
        return f"in memory that is {one.access}, no stack"
    if one.name.startswith("[stack") or (one.name.startswith("[anon:") and "stack" in one.name):
        return ""
    if one.name:
        return f"in {one.name}, where other data may lie below it"
    if before and before.name.startswith("/"):
        return f"in what {before.name} has for its variables (.bss)"
    return ""
