# SPDX-License-Identifier: Apache-2.0
"""A small root file system for guests of the VMM: busybox and a script, from what the lab has already."""

from __future__ import annotations

from collections.abc import Mapping

from prefault.errors import LabError
from prefault.lab import cpio, payload, rootfs

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


_PYTHON = """mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
export HOME=/root PYTHONPATH=/prefault
cd /root
"""
"""What it needs besides where there is Python."""


def archive(script: str = SHELL, files: Mapping[str, bytes] | None = None, *, python: bool = False) -> bytes:
    """An initial RAM file system.

    :param script: shell commands that init runs at last; if they end, the kernel panics
    :param files: more files, by path, all executable
    :param python: have all that the lab has, Python and the package prefault, which guests with EL2 can
        boot guests of their own with: ``python3 -S -m prefault.vmm ORDER RESULT``
    :raises LabError: the lab's own root file system has no busybox
    """
    more = [cpio.file(path, data, 0o755) for path, data in (files or {}).items()]
    init = cpio.file("init", (INIT + (_PYTHON if python else "") + script).encode(), 0o755)
    if python:
        # The kernel unpacks one after the other; the second has an init of its own.
        return rootfs.base().read_bytes() + cpio.write([*payload.package(), init, *more])
    folders = [cpio.folder(name) for name in ("dev", "proc", "sys", "tmp", "root", "bin")]
    devices = [cpio.character_device("dev/console", 5, 1), cpio.character_device("dev/null", 1, 3, 0o666)]
    return cpio.write([*folders, *devices, _busybox(), init, *more])


def _busybox() -> cpio.Entry:
    base = cpio.read(rootfs.base().read_bytes())
    found = next((entry for entry in base if entry.name == _BUSYBOX), None)
    if found is None:
        raise LabError(
            f"the lab's root file system lacks {_BUSYBOX}: `prefault lab clean rootfs`, then build"
        )
    return found
