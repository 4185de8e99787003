# SPDX-License-Identifier: Apache-2.0
"""A program of its own that takes a CPU away from whoever runs there, when and as long as it is told.

It has a real-time priority from who starts it. For each number of seconds (a double) on its standard input it
sleeps so long, takes the CPU, says so with a byte on its standard output, and keeps the CPU until the first
byte of the file whose descriptor is its argument is not 0, or until it loses patience: whoever should
write that may be waiting for who has lost the CPU.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time

ORDER = struct.Struct("d")
_PATIENCE = 0.02


def main() -> None:
    """Do what the module says, to the end of the standard input."""
    shared = mmap.mmap(int(sys.argv[1]), mmap.PAGESIZE)
    while order := os.read(0, ORDER.size):
        time.sleep(*ORDER.unpack(order))
        shared[0] = 0
        os.write(1, b"!")
        end = time.monotonic() + _PATIENCE
        while not shared[0] and time.monotonic() < end:
            pass


if __name__ == "__main__":
    main()
