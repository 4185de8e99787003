# SPDX-License-Identifier: Apache-2.0
"""The lab's root file system: busybox and Python 3.11 from Debian's packages, as one cpio.

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
from dataclasses import dataclass
from pathlib import Path

from prefault.lab import cache, cpio, debian
from prefault.lab.arch import ARM64, Architecture

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
_KEEP = ("bin/busybox", "lib/", "usr/bin/python3.11", _LIBRARY + "/", "usr/lib/{triplet}/")
_DROP = (
    "usr/lib/{triplet}/gconv/",
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
            "config-3.11-{triplet}/",
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

MODULES = "lib/modules"
"""Where the modules of a kernel that is not the lab's own lie, in the order in which they are loaded."""
_LOAD_MODULES = f"""for module in /{MODULES}/*.ko; do
    name=${{module##*-}}; name=${{name%.ko}}
    insmod "$module" $(tr " " "\\n" </proc/cmdline | sed -n "s/^$name\\.//p")
done
"""
"""As modprobe would: ``kvm_amd.npt=0`` among the kernel's arguments is a parameter of that module."""


@dataclass(frozen=True)
class _Content:
    """What the root file system of an architecture is made of."""

    keep: tuple[str, ...]
    drop: tuple[str, ...]
    init: str

    def wants(self, name: str) -> bool:
        return name.startswith(self.keep) and not name.startswith(self.drop) and "/__pycache__/" not in name


def _content(arch: Architecture) -> _Content:
    keep = tuple(name.format(triplet=arch.triplet) for name in _KEEP)
    drop = tuple(name.format(triplet=arch.triplet) for name in _DROP)
    if not arch.stock:
        return _Content(keep, drop, INIT)
    # The loader of programs lies in a folder of its own there.
    return _Content((*keep, "lib64/"), drop, INIT.replace("export HOME", _LOAD_MODULES + "export HOME"))


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


def _entries(unpacked: Path, content: _Content) -> Iterator[cpio.Entry]:
    for name in ("dev", "proc", "sys", "tmp", "root", "run", "bin", "usr/bin", "etc"):
        yield cpio.folder(name)
    yield cpio.character_device("dev/console", 5, 1)
    yield cpio.character_device("dev/null", 1, 3, 0o666)
    yield cpio.file("init", content.init.encode(), 0o755)
    yield cpio.link("usr/bin/python3", "python3.11")
    for entry in cpio.tree(unpacked):
        if content.wants(entry.name):
            yield entry
            compiled = byte_code(entry.name, unpacked / entry.name)
            if compiled is not None:
                yield compiled


def _recipe(content: _Content) -> str:
    compiles = repr(importlib.util.MAGIC_NUMBER == LAB_PYTHON_MAGIC)
    parts = (SUITE, *PACKAGES, *content.keep, *content.drop, content.init, compiles)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def archive(arch: Architecture = ARM64) -> Path:
    """Where the archive is, or will be once it is made."""
    top = cache.root() / "rootfs"
    return (top if arch is ARM64 else top / arch.name) / f"{_recipe(_content(arch))}.cpio"


def base(arch: Architecture = ARM64) -> Path:
    """The root file system's archive, made if it is not in the cache.

    :raises ToolMissing: no apt, no Debian mirror, or the packages cannot be fetched
    :raises LabError: the disk is full
    """
    made = archive(arch)
    if made.exists():
        return made
    with cache.locked("rootfs"):
        if made.exists():
            return made
        cache.remove_leftovers(made.parent)
        cache.need_space(made.parent, UNPACKED_MIB << 20, "the root file system")
        _make(made, arch)
        for old in made.parent.glob("*.cpio"):
            if old != made:
                old.unlink()
    return made


def put_initrd(target: Path, rest: bytes, arch: Architecture = ARM64) -> None:
    """Write what a machine boots from: the root file system, and ``rest`` on top of it."""
    shutil.copyfile(base(arch), target)
    with target.open("ab") as file:
        file.write(rest)


def _make(target: Path, arch: Architecture) -> None:
    source = debian.Source(debian.main_mirror(), SUITE, arch.debian)
    place = "rootfs" if arch is ARM64 else f"rootfs-{arch.name}"
    apt = debian.PrivateApt(cache.root() / "apt" / place, (source,))
    apt.update()
    with cache.scratch_folder(target.parent) as work:
        packages = work / "packages"
        unpacked = work / "tree"
        packages.mkdir()
        for package in apt.download(tuple(f"{name}:{arch.debian}" for name in PACKAGES), packages):
            debian.unpack(package, unpacked)
        cache.write_file(target, cpio.write(_entries(unpacked, _content(arch))))
