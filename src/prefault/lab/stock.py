# SPDX-License-Identifier: Apache-2.0
"""Debian's own kernel as the lab boots it: fetched, not built, its image and the modules that a run needs.

The metapackage ``linux-image-ARCH`` names the packages of the newest kernel; those that hold the image and
the modules are unpacked. Of the modules only KVM's are kept, and what these depend on.

Failure modes: ``ToolMissing`` where apt has no such package or cannot fetch it; ``LabError`` where a package
does not hold what it should.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from prefault.errors import LabError, ToolMissing
from prefault.lab import cache, cpio, debian, rootfs, source
from prefault.lab.arch import Architecture
from prefault.lab.progress import Progress, Silent

SUITE = source.SUITES[source.SERIES_VERSION]
"""The suite whose source the lab's own kernel is built from: both have the same version."""
MODULES = ("kvm", "kvm-amd")
"""What a run needs that is no part of the image itself."""
UNPACKED_MIB = 500
"""The packages, and what is in them."""

_PARTS = re.compile(r"linux-(?:image|binary|modules)-\d")
"""Packages that may hold an image or modules: newer kernels have the two apart."""
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


@dataclass(frozen=True)
class Record:
    """What was fetched.

    :ivar packages: name and version of each
    :ivar modules: in the order in which they are loaded
    """

    version: str
    suite: str
    packages: tuple[str, ...]
    modules: tuple[str, ...]
    downloaded: int


@dataclass(frozen=True)
class StockKernel:
    """A kernel in the cache, whole."""

    folder: Path
    record: Record

    @property
    def image(self) -> Path:
        """What QEMU boots."""
        return self.folder / "vmlinuz"

    @property
    def modules(self) -> Path:
        """An archive for the initial RAM file system."""
        return self.folder / "modules.cpio"


def _folder(arch: Architecture) -> Path:
    return cache.root() / "stock" / arch.name


def current(arch: Architecture) -> StockKernel:
    """The kernel that was fetched last.

    :raises ToolMissing: there is none
    """
    folder = _folder(arch)
    try:
        raw = json.loads((folder / "stock.json").read_text())
        record = Record(**{**raw, "packages": tuple(raw["packages"]), "modules": tuple(raw["modules"])})
    except (OSError, ValueError, KeyError, TypeError):
        raise ToolMissing(
            f"the lab has no kernel for {arch.name} yet: run `prefault lab build --arch {arch.name}`"
        ) from None
    return StockKernel(folder, record)


def fetch(arch: Architecture, progress: Progress | None = None) -> StockKernel:
    """Have Debian's kernel and the root file system, fetching what is not there.

    :raises ToolMissing: the mirror has no such kernel, or it cannot be fetched
    :raises LabError: the disk is full, or a package does not hold what it should
    """
    progress = progress or Silent()
    progress.stage("root file system")
    rootfs.base(arch)
    with cache.locked("stock"):
        try:
            return current(arch)
        except ToolMissing:
            pass
        progress.stage("Debian's kernel")
        folder = _folder(arch)
        cache.need_space(folder, UNPACKED_MIB << 20, "Debian's kernel")
        cache.remove_leftovers(folder.parent)
        _fetch(arch, folder)
    return current(arch)


def commands(arch: Architecture) -> tuple[tuple[str, ...], ...]:
    """Command lines that fetching it would run, for reading."""
    return (("apt-get", "download", f"linux-image-{arch.debian}", f"# what it depends on, from {SUITE}"),)


def _fetch(arch: Architecture, folder: Path) -> None:
    apt = debian.PrivateApt(
        cache.root() / "apt" / f"stock-{arch.name}",
        (debian.Source(debian.mirror_for(SUITE), SUITE, arch.debian),),
    )
    apt.update()
    meta = f"linux-image-{arch.debian}"
    names = tuple(name for name in apt.dependencies(f"{meta}:{arch.debian}") if _PARTS.match(name))
    if not names:
        raise ToolMissing(f"the mirror has no {meta} in {SUITE}: `prefault lab build` needs one that has")
    with cache.new_folder(folder) as made, cache.scratch_folder(folder.parent) as work:
        archives = apt.download(tuple(f"{name}:{arch.debian}" for name in names), work)
        downloaded = sum(one.stat().st_size for one in archives)
        for one in archives:
            debian.unpack(one, work / "tree")
        image = next((work / "tree").rglob("vmlinuz*"), None)
        if image is None:
            raise LabError(f"{', '.join(names)} have no vmlinuz: have the packages changed?")
        modules = dict(in_order(_modules(work / "tree"), MODULES))
        (made / "vmlinuz").write_bytes(image.read_bytes())
        (made / "modules.cpio").write_bytes(archive(modules))
        versions = {one.name.split("_")[1] for one in archives}
        record = Record(min(versions), SUITE, names, tuple(modules), downloaded)
        (made / "stock.json").write_text(json.dumps(asdict(record), indent=2))


def _modules(tree: Path) -> dict[str, Path]:
    """All modules, by name; a dash in a file's name is an underscore to the kernel."""
    return {path.name.split(".ko")[0].replace("-", "_"): path for path in tree.rglob("*.ko*")}


def in_order(modules: dict[str, Path], wanted: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Modules and what they depend on, by name, each after what it needs.

    :raises LabError: one is not there
    """
    for name in wanted:
        key = name.replace("-", "_")
        if key not in modules:
            raise LabError(f"Debian's kernel has no module {name}: it may be a part of the kernel now")
        data = _unpacked(modules[key])
        needed = _DEPENDS.search(data)
        names = needed[1].decode().split(",") if needed and needed[1] else []
        yield from in_order(modules, tuple(names))
        yield key, data


def _unpacked(path: Path) -> bytes:
    """A module as the kernel loads it: unpacked here, where that is fast.

    :raises LabError: it is packed in another way
    """
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix != ".ko":
        raise LabError(f"{path.name} is packed in a way that is not known here")
    return data


def archive(modules: dict[str, bytes]) -> bytes:
    """The archive that init loads modules from, by name in order."""
    return cpio.write(
        cpio.file(f"{rootfs.MODULES}/{number:02}-{name}.ko", data)
        for number, (name, data) in enumerate(modules.items())
    )
