# SPDX-License-Identifier: Apache-2.0
"""The lab's root file system: busybox and Python 3.11 from Debian's arm64 packages, as one cpio.

The archive is not compressed: unpacking gzip under emulation costs more than loading the bytes. Python's
library comes with its byte code where the host's Python can make it, because compiling under emulation
costs more than everything else in a short job.
"""

from __future__ import annotations

import hashlib
import importlib.util
import marshal
import shutil
from collections.abc import Iterator
from pathlib import Path

from prefault.lab import cache, cpio, debian

SUITE = "bookworm"
PACKAGES = (
    "busybox-static",
    "libc6",
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    # What Python's binary and the modules that the project uses link to.
    "libexpat1",
    "libffi8",
    "zlib1g",
)
_UNCHECKED = 1
"""Flags of byte code that goes by a hash that nobody checks."""
LAB_PYTHON_MAGIC = (3495).to_bytes(2, "little") + b"\r\n"
"""importlib.util.MAGIC_NUMBER of Python 3.11: byte code made by another Python is of no use there."""

UNPACKED_MIB = 256

_LIBRARY = "usr/lib/python3.11"
_KEEP = ("bin/busybox", "lib/", "usr/bin/python3.11", _LIBRARY + "/", "usr/lib/aarch64-linux-gnu/")
_DROP = (
    "usr/lib/aarch64-linux-gnu/gconv/",
    *(
        f"{_LIBRARY}/{name}"
        for name in (
            "distutils/",
            "ensurepip/",
            "idlelib/",
            "lib2to3/",
            "pydoc_data/",
            "turtle.py",
            "unittest/",
            "venv/",
            "wsgiref/",
            "xmlrpc/",
            "tkinter/",
            "curses/",
            "dbm/",
            "sqlite3/",
            "lib-dynload/_codecs_",
            "lib-dynload/_sqlite3",
            "lib-dynload/_curses",
            "lib-dynload/_dbm",
            "lib-dynload/readline",
            "lib-dynload/_ssl",
            "lib-dynload/_hashlib",
            "lib-dynload/_bz2",
            "lib-dynload/_lzma",
            "lib-dynload/_uuid",
            "lib-dynload/nis",
            "config-3.11-aarch64-linux-gnu/",
        )
    ),
)

INIT = """#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o size=90% tmp /tmp
mkdir -p /dev/shm /dev/hugepages
mount -t tmpfs -o size=90% shm /dev/shm
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing 2>/dev/null
mount -t hugetlbfs huge /dev/hugepages 2>/dev/null
export HOME=/root PYTHONPATH=/prefault
cd /root
if [ -e /job.json ]; then
    exec python3 -S -m prefault.lab.agent
fi
echo "prefault lab: python3 and busybox are here; leave with \\`exit\\` or Ctrl-A x"
setsid cttyhack sh
poweroff -f
"""


def _wanted(name: str) -> bool:
    return name.startswith(_KEEP) and not name.startswith(_DROP) and "/__pycache__/" not in name


def byte_code(name: str, source: Path) -> cpio.Entry | None:
    """Byte code of a module as the lab's Python will look for it, or None if this Python cannot make it.

    Unchecked: the lab never edits its modules, and a check would cost a stat() and a hash for each.
    Nothing is written beside the source, which may be read-only, or in use by another run.

    Source: PEP 552, "Deterministic pycs"
    """
    if importlib.util.MAGIC_NUMBER != LAB_PYTHON_MAGIC or not name.endswith(".py"):
        return None
    text = source.read_bytes()
    try:
        code = compile(text, f"/{name}", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None  # The library has modules that are meant not to compile.
    header = importlib.util.MAGIC_NUMBER + _UNCHECKED.to_bytes(4, "little") + importlib.util.source_hash(text)
    folder, _, file = name.rpartition("/")
    cached = f"{folder}/__pycache__/{file.removesuffix('.py')}.cpython-311.pyc"
    return cpio.file(cached, header + marshal.dumps(code))


def _entries(unpacked: Path) -> Iterator[cpio.Entry]:
    for name in ("dev", "proc", "sys", "tmp", "root", "run", "bin", "usr/bin", "etc"):
        yield cpio.folder(name)
    yield cpio.character_device("dev/console", 5, 1)
    yield cpio.character_device("dev/null", 1, 3, 0o666)
    yield cpio.file("init", INIT.encode(), 0o755)
    yield cpio.link("usr/bin/python3", "python3.11")
    for entry in cpio.tree(unpacked):
        if _wanted(entry.name):
            yield entry
            compiled = byte_code(entry.name, unpacked / entry.name)
            if compiled is not None:
                yield compiled


def _recipe() -> str:
    parts = (SUITE, *PACKAGES, *_KEEP, *_DROP, INIT, repr(importlib.util.MAGIC_NUMBER == LAB_PYTHON_MAGIC))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def archive() -> Path:
    """Where the archive is, or will be once it is made."""
    return cache.root() / "rootfs" / f"{_recipe()}.cpio"


def base() -> Path:
    """The root file system's archive, made if it is not in the cache.

    :raises ToolMissing: no apt, no Debian mirror, or the packages cannot be fetched
    :raises LabError: the disk is full
    """
    made = archive()
    if made.exists():
        return made
    with cache.locked("rootfs"):
        if made.exists():
            return made
        cache.remove_leftovers(made.parent)
        cache.need_space(made.parent, UNPACKED_MIB << 20, "the root file system")
        _make(made)
        for old in made.parent.glob("*.cpio"):
            if old != made:
                old.unlink()
    return made


def put_initrd(target: Path, rest: bytes) -> None:
    """Write what a machine boots from: the root file system, and ``rest`` on top of it."""
    shutil.copyfile(base(), target)
    with target.open("ab") as file:
        file.write(rest)


def _make(target: Path) -> None:
    source = debian.Source(debian.main_mirror(), SUITE, "arm64")
    apt = debian.PrivateApt(cache.root() / "apt" / "rootfs", (source,))
    apt.update()
    with cache.scratch_folder(target.parent) as work:
        packages = work / "packages"
        unpacked = work / "tree"
        packages.mkdir()
        for package in apt.download(tuple(f"{name}:arm64" for name in PACKAGES), packages):
            debian.unpack(package, unpacked)
        cache.write_file(target, cpio.write(_entries(unpacked)))
