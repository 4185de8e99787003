# SPDX-License-Identifier: Apache-2.0
"""The program of thief.py: takes a CPU away from whoever runs there, when and as long as it is told.

It has a real-time priority from who starts it. For each order on its standard input, a delay and a patience
in seconds (two doubles), it sleeps for the delay, takes the CPU, says so with a byte on its standard output,
and keeps the CPU until it is told to leave, or until it loses patience: who should tell it may be gone, or be
waiting for who has lost the CPU. Its argument is the descriptor of a file of one page, where LEAVE is what it
is told, and HAS is whether it has the CPU.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time

ORDER = struct.Struct("dd")
LEAVE, HAS = 0, 1


def main() -> None:
    """Do what the module says, to the end of the standard input."""
    shared = mmap.mmap(int(sys.argv[1]), mmap.PAGESIZE)
    while order := os.read(0, ORDER.size):
        delay, patience = ORDER.unpack(order)
        time.sleep(delay)
        shared[LEAVE], shared[HAS] = 0, 1
        os.write(1, b"!")
        end = time.monotonic() + patience
        while not shared[LEAVE] and time.monotonic() < end:
            pass
        shared[HAS] = 0


if __name__ == "__main__":
    main()
