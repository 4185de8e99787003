# SPDX-License-Identifier: Apache-2.0
"""An arm64 Linux Image: what its header says, and where it goes in guest memory.

Source: Documentation/arch/arm64/booting.rst
"""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from prefault.errors import UsageError
from prefault.vmm.config import MIB, RAM_BASE

_HEADER = struct.Struct("<8xQQQ24x4s4x")
_MAGIC = b"ARM\x64"
_GZIP = b"\x1f\x8b"
_BIG_ENDIAN = 1
_OLD_TEXT_OFFSET = 0x8_0000
"""Where kernels go whose header does not tell their size (before Linux 3.17)."""
_DTB_ROOM = 2 * MIB
"""No device tree is larger, and none crosses a boundary of this size."""


@dataclass(frozen=True)
class Image:
    """A kernel to load."""

    data: bytes
    text_offset: int
    """Where it wants to be, from a 2 MiB boundary."""
    size: int
    """What it takes of memory, the parts that are not in the file included."""


def parse(data: bytes, name: str = "the kernel") -> Image:
    """An Image from its bytes, compressed with gzip or not.

    :raises UsageError: this is no arm64 Image, or one that the guest could not run
    """
    if data.startswith(_GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{name} is compressed and damaged: {error}") from error
    if len(data) < _HEADER.size or _HEADER.unpack_from(data)[3] != _MAGIC:
        raise UsageError(
            f"{name} is not an arm64 Linux Image: it lacks the magic number at byte 56; a build leaves one "
            "in arch/arm64/boot/Image, distributions have it as /boot/vmlinuz-… (not as an EFI zboot file)"
        )
    text_offset, size, flags, _ = _HEADER.unpack_from(data)
    if flags & _BIG_ENDIAN:
        raise UsageError(f"{name} is a big-endian kernel; build one without CONFIG_CPU_BIG_ENDIAN")
    if not size:
        return Image(data, _OLD_TEXT_OFFSET, len(data))
    return Image(data, text_offset, max(size, len(data)))


def read(path: Path) -> bytes:
    """A file that a guest boots from.

    :raises UsageError: it cannot be read
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Placement:
    """Where things are in guest memory."""

    kernel: int
    dtb: int
    initrd: int
    initrd_size: int


def place(image: Image, initrd_size: int, memory: int) -> Placement:
    """Put kernel, device tree and initial RAM disk one after the other.

    :raises UsageError: the guest has not enough memory
    """
    kernel = RAM_BASE + image.text_offset
    dtb = _up(kernel + image.size, _DTB_ROOM)
    initrd = dtb + _DTB_ROOM
    end = _up(initrd + initrd_size, 2 * MIB)
    if end > RAM_BASE + memory:
        raise UsageError(
            f"{memory // MIB} MiB of memory are not enough: the kernel takes {image.size // MIB} MiB, the "
            f"initial RAM disk {initrd_size // MIB} MiB, with room between; give the guest "
            f"{2 * (end - RAM_BASE) // MIB} MiB"
        )
    return Placement(kernel, dtb, initrd, initrd_size)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
