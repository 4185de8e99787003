# SPDX-License-Identifier: Apache-2.0
"""Programs of Debian's that single jobs want besides the root file system, with their libraries.

Most jobs do without, and each byte costs time to boot, so these come as files of the job that wants them:
``Job(…, files=programs.files(programs.QEMU))``. Packages are fetched once, as those of the root file system
are; of them only the program is kept and what it is linked to.

Failure modes: ``ToolMissing`` where a package cannot be fetched; ``LabError`` where a library is in none of
the packages.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from prefault.errors import LabError
from prefault.lab import cache, cpio, debian, process, rootfs, tools
from prefault.lab.arch import ARM64
from prefault.lab.payload import JobFile

UNPACKED_MIB = 400
"""The packages of the largest program, and what is in them."""

_NEEDED = re.compile(r"\(NEEDED\).*\[([^\]]+)\]")


@dataclass(frozen=True)
class Program:
    """A program of the suite that the root file system is of.

    :ivar path: where it is in its package, and where it will be
    :ivar packages: its own, and those of its libraries that the root file system lacks
    """

    path: str
    packages: tuple[str, ...]


QEMU = Program(
    "usr/bin/qemu-system-aarch64",
    (
        "qemu-system-arm",
        *("libaio1", "libblkid1", "libbpf1", "libcapstone4", "libdaxctl1", "libelf1", "libfdt1"),
        *("libfuse3-3", "libgcc-s1", "libglib2.0-0", "libgmp10", "libgnutls30", "libhogweed6", "libibverbs1"),
        *("libidn2-0", "libjpeg62-turbo", "libkmod2", "liblzma5", "libmount1", "libndctl6", "libnettle8"),
        *("libnl-3-200", "libnl-route-3-200", "libnuma1", "libp11-kit0", "libpcre2-8-0", "libpixman-1-0"),
        *("libpmem1", "libpng16-16", "librdmacm1", "libsasl2-2", "libseccomp2", "libselinux1", "libslirp0"),
        *("libssl3", "libtasn1-6", "libudev1", "libunistring2", "liburing2", "libuuid1", "libvdeplug2"),
        "libzstd1",
    ),
)
"""QEMU, as the VMM of guests in the lab: the board `virt` with a kernel that it is given; no firmware."""


def files(program: Program) -> dict[str, JobFile]:
    """What a job has to bring along to run the program, fetched if it is not in the cache.

    :raises ToolMissing: no apt, no Debian mirror, or the packages cannot be fetched
    :raises LabError: the disk is full, or a library is in none of the packages
    """
    folder = _folder(program)
    rootfs.base()  # before the lock, which it takes itself
    with cache.locked("rootfs"):
        if not folder.exists():
            cache.remove_leftovers(folder.parent)
            cache.need_space(folder.parent, UNPACKED_MIB << 20, program.packages[0])
            _make(program, folder)
    return {
        f"/{path.relative_to(folder)}": JobFile(path.read_bytes(), 0o755)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _folder(program: Program) -> Path:
    recipe = hashlib.sha256("\n".join((rootfs.SUITE, program.path, *program.packages)).encode())
    return cache.root() / "rootfs" / "programs" / recipe.hexdigest()[:16]


def _make(program: Program, folder: Path) -> None:
    apt = debian.PrivateApt(
        cache.root() / "apt" / "programs",
        (debian.Source(debian.main_mirror(), rootfs.SUITE, ARM64.debian),),
    )
    apt.update()
    with cache.new_folder(folder) as made, cache.scratch_folder(folder.parent) as work:
        names = tuple(f"{name}:{ARM64.debian}" for name in program.packages)
        for package in apt.download(names, work):
            debian.unpack(package, work / "tree")
        there = {path.name: path for path in (work / "tree").rglob("*.so*") if path.is_file()}
        wanted = closure(work / "tree" / program.path, there, _in_root_file_system())
        for inside, path in {program.path: work / "tree" / program.path, **wanted}.items():
            (made / inside).parent.mkdir(parents=True, exist_ok=True)
            (made / inside).write_bytes(path.read_bytes())


def _in_root_file_system() -> frozenset[str]:
    """Names of the libraries that are there anyway."""
    entries = cpio.read(rootfs.base().read_bytes())
    return frozenset(PurePosixPath(entry.name).name for entry in entries if ".so" in entry.name)


def closure(program: Path, there: Mapping[str, Path], without: frozenset[str]) -> dict[str, Path]:
    """The libraries that a program is linked to, and those that these are linked to, by their place inside.

    :param there: what there is, by name
    :param without: what is not wanted, because it is in the root file system
    :raises LabError: a library is neither here nor there
    """
    found: dict[str, Path] = {}
    left = [program]
    while left:
        asks = left.pop()
        for name in _NEEDED.findall(process.check([f"{tools.CROSS_COMPILE}readelf", "-d", str(asks)])):
            if name in found or name in without:
                continue
            if name not in there:
                raise LabError(
                    f"{asks.name} is linked to {name}, which is in none of the packages: add its own"
                )
            found[name] = there[name]
            left.append(there[name])
    return {f"usr/lib/{ARM64.triplet}/{name}": path for name, path in found.items()}
