# SPDX-License-Identifier: Apache-2.0
"""mmap(2) and madvise(2) with chosen addresses, which Python's mmap module does not offer.

Source: include/uapi/asm-generic/mman-common.h, include/uapi/linux/memfd.h, include/uapi/linux/falloc.h
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from prefault.errors import CapabilityMissing, PrefaultError

MADV_DONTNEED = 4
MADV_REMOVE = 9
MADV_MERGEABLE = 12
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE = 25
MADV_HWPOISON = 100
MADV_SOFT_OFFLINE = 101

_NR_MEMFD_SECRET = 447
"""On all architectures but those that have none."""
_PROT_NONE = 0
_FALLOC_FL_KEEP_SIZE = 1
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _map(hva: int, size: int, protection: int, flags: int, fd: int, offset: int = 0) -> int:
    result = _libc.mmap(hva or None, size, protection, flags, fd, offset)
    if result is None or result == _MAP_FAILED:
        error = ctypes.get_errno()
        raise PrefaultError(
            f"mmap of {size:#x} bytes failed: {os.strerror(error)}; "
            "ask for less memory, or free some (huge pages must be reserved beforehand)"
        )
    return int(result)


def secret_file() -> int:
    """A file of secret memory, by its descriptor (memfd_secret(2)).

    :raises CapabilityMissing: this kernel has none
    """
    fd = int(_libc.syscall(_NR_MEMFD_SECRET, os.O_CLOEXEC))
    if fd < 0:
        raise CapabilityMissing(
            f"this kernel has no secret memory: {os.strerror(ctypes.get_errno())}; it needs "
            "CONFIG_SECRETMEM, and secretmem.enable=1 before Linux 6.5"
        )
    return fd


def map_shared(fd: int, size: int, offset: int = 0) -> int:
    """Map a file anywhere, MAP_SHARED; returns the address."""
    return _map(0, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, offset)


def reserve(size: int, alignment: int) -> tuple[int, int]:
    """Reserve address space: (address of the whole, first aligned address within it)."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    whole = _map(0, size + alignment, _PROT_NONE, flags, -1)
    return whole, -(-whole // alignment) * alignment


def map_at(
    hva: int, size: int, *, shared: bool, fd: int = -1, offset: int = 0, populate: bool = False
) -> None:
    """Map anonymous memory, or the file ``fd`` from ``offset``, at an address that ``reserve`` gave."""
    flags = _MAP_FIXED | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
    flags |= mmap.MAP_POPULATE if populate else 0
    flags |= mmap.MAP_ANONYMOUS if fd < 0 else 0
    _map(hva, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset)


def unmap(hva: int, size: int) -> None:
    """munmap(2)."""
    if _libc.munmap(hva, size):
        error = ctypes.get_errno()
        raise PrefaultError(f"munmap of {size:#x} bytes failed: {os.strerror(error)}")


def protect(hva: int, size: int, protection: int) -> None:
    """mprotect(2), with PROT_* of the mmap module, 0 for none."""
    if _libc.mprotect(hva, size, protection):
        error = ctypes.get_errno()
        raise PrefaultError(f"mprotect of {size:#x} bytes failed: {os.strerror(error)}")


def allocate(fd: int, offset: int, size: int) -> None:
    """fallocate(2) of a part of a file, whose size stays."""
    if _libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_long(offset), ctypes.c_long(size)):
        error = ctypes.get_errno()
        raise CapabilityMissing(f"fallocate of {size:#x} bytes failed: {os.strerror(error)}")


def poison(hva: int, size: int) -> None:
    """madvise(2) with MADV_HWPOISON."""
    # EBUSY: poisoned, but still in somebody's hands, as guest_memfd's pages always are.
    advise(hva, size, MADV_HWPOISON, "MADV_HWPOISON", tolerated=errno.EBUSY)


def advise(hva: int, size: int, advice: int, what: str, *, tolerated: int = 0) -> None:
    """madvise(2); ``what`` names the advice in the error."""
    if _libc.madvise(hva, size, advice) == 0:
        return
    error = ctypes.get_errno()
    if error == tolerated:
        return
    raise CapabilityMissing(
        f"madvise({what}) of {size:#x} bytes failed: {os.strerror(error)}; "
        "this kernel lacks it, or memory is short: use another backing or less memory"
    )
