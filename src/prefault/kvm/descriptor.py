# SPDX-License-Identifier: Apache-2.0
"""A file descriptor that takes KVM ioctls.

``fcntl.ioctl`` cannot pass an argument of ``1 << 31``, which is a machine type, and has no way to
say that an argument is an address; so ioctl(2) is called through ctypes, which also lets other
threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import os

from prefault.abi import ioctls, x86
from prefault.closing import Closing
from prefault.errors import KvmError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.ioctl.restype = ctypes.c_int


def _number(name: str) -> int:
    return int(getattr(ioctls, name, None) or getattr(x86, name))


def ioctl(fd: int, number: int, argument: int | ctypes.Structure = 0) -> tuple[int, int]:
    """ioctl(2), without an opinion on the outcome: (result, errno), errno 0 unless result is -1."""
    value = argument if isinstance(argument, int) else ctypes.addressof(argument)
    ctypes.set_errno(0)
    result = int(_libc.ioctl(fd, number, value))
    return result, ctypes.get_errno() if result < 0 else 0


class Descriptor(Closing):
    """Owns a file descriptor; every use after ``close`` fails with EBADF."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def try_ioctl(self, name: str, argument: int | ctypes.Structure = 0) -> tuple[int, int]:
        """Like ``ioctl``, by the name of the ioctl."""
        return ioctl(self.fd, _number(name), argument)

    def ioctl(self, name: str, argument: int | ctypes.Structure = 0, *, hint: str = "") -> int:
        """The result of an ioctl that must not fail.

        :raises KvmError: it failed; ``hint`` says what to do about it
        """
        result, errno = self.try_ioctl(name, argument)
        if result < 0:
            raise KvmError(name, errno, hint=hint)
        return result

    def close(self) -> None:
        """Close the descriptor. Safe to call again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
