# SPDX-License-Identifier: Apache-2.0
"""Numbers and structures of userfaultfd(2).

Source: include/uapi/linux/userfaultfd.h
"""

import ctypes
from typing import ClassVar

UFFD_API = 0xAA
UFFD_EVENT_PAGEFAULT = 0x12
UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0
UFFD_PAGEFAULT_FLAG_WP = 1 << 1

UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
UFFD_FEATURE_MISSING_SHMEM = 1 << 5
UFFD_FEATURE_THREAD_ID = 1 << 8
UFFD_FEATURE_MINOR_SHMEM = 1 << 10

UFFDIO_REGISTER_MODE_MISSING = 1 << 0
UFFDIO_REGISTER_MODE_WP = 1 << 1
UFFDIO_REGISTER_MODE_MINOR = 1 << 2
UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0

_WRITE, _READ = 1, 2


def _ioctl(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | 0xAA << 8 | number


class uffdio_api(ctypes.Structure):
    """The API and its features."""

    _fields_: ClassVar = (
        ("api", ctypes.c_uint64),
        ("features", ctypes.c_uint64),
        ("ioctls", ctypes.c_uint64),
    )


class uffdio_range(ctypes.Structure):
    """Addresses."""

    _fields_: ClassVar = (("start", ctypes.c_uint64), ("len", ctypes.c_uint64))


class uffdio_ranged(ctypes.Structure):
    """struct uffdio_register, uffdio_zeropage, uffdio_continue and uffdio_poison, alike but for a name."""

    _fields_: ClassVar = (("range", uffdio_range), ("mode", ctypes.c_uint64), ("result", ctypes.c_int64))


class uffdio_writeprotect(ctypes.Structure):
    """A change of protection."""

    _fields_: ClassVar = (("range", uffdio_range), ("mode", ctypes.c_uint64))


class uffdio_copy(ctypes.Structure):
    """A page and what it shall hold."""

    _fields_: ClassVar = (
        ("dst", ctypes.c_uint64),
        ("src", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("copy", ctypes.c_int64),
    )


class uffd_msg(ctypes.Structure):
    """A message; the fields of UFFD_EVENT_PAGEFAULT."""

    _pack_ = 1
    _fields_: ClassVar = (
        ("event", ctypes.c_uint8),
        ("reserved1", ctypes.c_uint8),
        ("reserved2", ctypes.c_uint16),
        ("reserved3", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("ptid", ctypes.c_uint32),
        ("reserved4", ctypes.c_uint32),
    )


UFFDIO_API = _ioctl(_READ | _WRITE, 0x3F, ctypes.sizeof(uffdio_api))
UFFDIO_REGISTER = _ioctl(_READ | _WRITE, 0x00, ctypes.sizeof(uffdio_ranged))
UFFDIO_COPY = _ioctl(_READ | _WRITE, 0x03, ctypes.sizeof(uffdio_copy))
UFFDIO_ZEROPAGE = _ioctl(_READ | _WRITE, 0x04, ctypes.sizeof(uffdio_ranged))
UFFDIO_WRITEPROTECT = _ioctl(_READ | _WRITE, 0x06, ctypes.sizeof(uffdio_writeprotect))
UFFDIO_CONTINUE = _ioctl(_READ | _WRITE, 0x07, ctypes.sizeof(uffdio_ranged))
UFFDIO_POISON = _ioctl(_READ | _WRITE, 0x08, ctypes.sizeof(uffdio_ranged))
