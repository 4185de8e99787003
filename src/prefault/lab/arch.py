# SPDX-License-Identifier: Apache-2.0
"""The architectures that the lab's machine can have, as data: what each is called by whom."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    :ivar debian: its name in Debian
    :ivar triplet: its name to the C library
    :ivar qemu: the program that emulates it
    :ivar qemu_package: Debian's package of that program
    :ivar board: which of its boards the machine is
    :ivar console: the kernel's name for the first serial port
    :ivar stock: the lab boots Debian's own kernel, as it is; otherwise one that it builds, with the series
    """

    name: str
    debian: str
    triplet: str
    qemu: str
    qemu_package: str
    board: str
    console: str
    stock: bool = False


ARM64 = Architecture(
    "arm64", "arm64", "aarch64-linux-gnu", "qemu-system-aarch64", "qemu-system-arm", "virt", "ttyAMA0"
)
X86_64 = Architecture(
    "x86_64",
    "amd64",
    "x86_64-linux-gnu",
    "qemu-system-x86_64",
    "qemu-system-x86",
    "pc-q35",
    "ttyS0",
    stock=True,
)
ARCHITECTURES = {one.name: one for one in (ARM64, X86_64)}
