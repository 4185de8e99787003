# SPDX-License-Identifier: Apache-2.0
"""A small root file system for guests of the VMM: busybox and a script, from what the lab has already."""

from __future__ import annotations

from collections.abc import Mapping

from prefault.errors import LabError
from prefault.lab import cpio, rootfs

_BUSYBOX = "bin/busybox"

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
"""
"""What every guest's init begins with."""

SHELL = """echo "a guest of prefault: leave with poweroff -f"
setsid cttyhack sh
poweroff -f
"""
"""What it goes on with if nothing else is asked for."""


def archive(script: str = SHELL, files: Mapping[str, bytes] | None = None) -> bytes:
    """An initial RAM file system.

    :param script: shell commands that init runs at last; if they end, the kernel panics
    :param files: more files, by path, all executable
    :raises LabError: the lab's own root file system has no busybox
    """
    base = cpio.read(rootfs.base().read_bytes())
    busybox = next((entry for entry in base if entry.name == _BUSYBOX), None)
    if busybox is None:
        raise LabError(
            f"the lab's root file system lacks {_BUSYBOX}: `prefault lab clean rootfs`, then build"
        )
    folders = [cpio.folder(name) for name in ("dev", "proc", "sys", "tmp", "root", "bin")]
    devices = [cpio.character_device("dev/console", 5, 1), cpio.character_device("dev/null", 1, 3, 0o666)]
    more = [cpio.file(path, data, 0o755) for path, data in (files or {}).items()]
    return cpio.write(
        [*folders, *devices, busybox, cpio.file("init", (INIT + script).encode(), 0o755), *more]
    )
