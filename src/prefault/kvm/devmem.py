# SPDX-License-Identifier: Apache-2.0
"""/dev/mem, for memory that has no struct pages: the NOR flash of the machine.

Flash is what there is to map that reading does no harm to. The device tree says where it is; an
ordinary machine has none, and then there is nothing to map.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from prefault.errors import CapabilityMissing

_DEVICE = "/dev/mem"
_NODES = Path("/proc/device-tree")


def flash(size: int) -> int:
    """Physical address of the last bank of the flash, which has ``size`` bytes.

    :raises CapabilityMissing: there is no such flash
    """
    for node in sorted(_NODES.glob("flash@*/reg")):
        cells = node.read_bytes()
        banks = list(struct.iter_unpack(">QQ", cells)) if len(cells) % 16 == 0 else []
        if banks and banks[-1][1] >= size:
            return int(banks[-1][0])
    raise CapabilityMissing(
        f"this machine's device tree has no flash of {size:#x} bytes; use another backing"
    )


def open_devmem() -> int:
    """A descriptor of /dev/mem.

    :raises CapabilityMissing: the kernel has none, or we may not use it
    """
    try:
        return os.open(_DEVICE, os.O_RDWR | os.O_SYNC | os.O_CLOEXEC)
    except OSError as error:
        raise CapabilityMissing(
            f"{_DEVICE} cannot be opened: {error.strerror}; it takes CONFIG_DEVMEM and root"
        ) from error
