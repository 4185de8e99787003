# SPDX-License-Identifier: Apache-2.0
"""What a machine boots: a kernel, and the initial RAM file system that goes with it.

On arm64 that is the kernel that the lab has built; elsewhere Debian's own, with its modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefault.lab import build, rootfs, stock
from prefault.lab.arch import Architecture


@dataclass(frozen=True)
class Bootable:
    """A kernel for an architecture.

    :ivar modules: an archive with what it needs besides
    """

    arch: Architecture
    image: Path
    modules: Path | None = None

    def put_initrd(self, target: Path, rest: bytes) -> None:
        """Write its initial RAM file system: the lab's own, and ``rest`` on top of it."""
        modules = self.modules.read_bytes() if self.modules else b""
        rootfs.put_initrd(target, modules + rest, self.arch)


def bootable(arch: Architecture, kernel: Path | None = None) -> Bootable:
    """The kernel to boot.

    :param kernel: an image of the caller's own, which has all that it needs in itself
    :raises ToolMissing: the lab has none for this architecture
    """
    if kernel is not None:
        return Bootable(arch, kernel)
    if not arch.stock:
        return Bootable(arch, build.kernel_image())
    found = stock.current(arch)
    return Bootable(arch, found.image, found.modules)
