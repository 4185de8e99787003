# SPDX-License-Identifier: Apache-2.0
"""The kernel's source: Debian's package, or a copy of the user's own tree.

The lab patches and builds a tree of its own in the cache. A user's tree is only read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prefault.errors import LabError, ToolMissing, UsageError
from prefault.lab import cache, debian, process

SERIES_VERSION = "7.3"
"""What the series is made for in the first place."""
SUITES = {SERIES_VERSION: "trixie-backports", "6.12": "bookworm-security"}
"""By kernel version: the suite that has its source as a package."""
UNPACKED_MIB = 3000
"""The package, the archive in it, and the tree."""

_PRODUCTS = re.compile(r".*\.(?:o|a|ko|cmd|mod|order|symvers)|\.config(?:\.old)?|vmlinux|System\.map")
_PRODUCT_FOLDERS = ("include/config", "include/generated", "usr/include")


@dataclass(frozen=True)
class Source:
    """A kernel tree in the cache, as it came: the series not yet applied, or applied by us."""

    folder: Path
    """Everything about this source; the tree is below it."""
    name: str
    """Package version, or the user's path."""
    identity: str
    """Changes whenever the source does."""

    @property
    def tree(self) -> Path:
        """The tree that is patched and built."""
        return self.folder / "tree"

    @property
    def orig(self) -> Path:
        """The unpatched form of the files that the series touches."""
        return self.folder / "orig"

    def touched(self) -> tuple[str, ...]:
        """Files of the tree that the series may have changed; what counts of these is in ``orig``."""
        record = self.folder / "touched.json"
        return tuple(json.loads(record.read_text())) if record.exists() else ()

    def remember_touched(self, names: Iterable[str]) -> None:
        """Record what ``touched`` returns."""
        cache.write_file(self.folder / "touched.json", json.dumps(sorted(names)).encode())


def version_of(tree: Path) -> str:
    """Kernel version by the tree's Makefile, for instance ``7.3.4``.

    :raises UsageError: this is no kernel tree
    """
    makefile = tree / "Makefile"
    text = makefile.read_text(errors="replace") if makefile.is_file() else ""
    found: dict[str, str] = dict(
        re.findall(r"^(VERSION|PATCHLEVEL|SUBLEVEL|EXTRAVERSION) *= *(\S*)$", text, re.MULTILINE)
    )
    if not {"VERSION", "PATCHLEVEL", "SUBLEVEL"} <= set(found) or not (tree / "arch/arm64/kvm").is_dir():
        raise UsageError(
            f"{tree} is not a Linux kernel tree: it has no Makefile with VERSION, or no arch/arm64/kvm"
        )
    number = ".".join(found[key] for key in ("VERSION", "PATCHLEVEL", "SUBLEVEL"))
    return number + found.get("EXTRAVERSION", "")


def package(base: str) -> str:
    """The name of Debian's package of a kernel's source."""
    return f"linux-source-{base}"


def folder_of(directory: Path | None, base: str = SERIES_VERSION) -> Path | None:
    """Where a user's tree, or (None) Debian's source, has its place; None if that was not fetched yet."""
    top = cache.root() / "kernel"
    if directory is not None:
        key = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:12]
        return top / f"own-{key}"
    whole = (folder for folder in top.glob(f"debian-{base}.*") if cache.PART not in folder.name)
    return max((folder for folder in whole if (folder / "tree").is_dir()), default=None)


def packaged(base: str = SERIES_VERSION) -> Source:
    """Debian's source package, fetched and unpacked if it is not in the cache.

    :param base: one of SUITES
    :raises ToolMissing: it cannot be fetched
    :raises LabError: the disk is full
    """
    here = folder_of(None, base)
    if here is not None:
        version = (here / "version").read_text()
        return Source(here, version, version)
    top, suite = cache.root() / "kernel", SUITES[base]
    cache.need_space(top, UNPACKED_MIB << 20, "the kernel source")
    apt = debian.PrivateApt(
        cache.root() / "apt" / f"kernel-{base}",
        (debian.Source(debian.mirror_for(suite), suite, debian.architecture()),),
    )
    apt.update()
    offers = apt.offers(package(base)).get(suite)
    if not offers:
        raise ToolMissing(
            f"the mirror has no {package(base)} in {suite}: use `prefault lab build --source DIR`"
        )
    version = offers[0]
    folder = top / f"debian-{version.replace(':', '_')}"  # make takes no colon in a path
    with cache.new_folder(folder) as made:
        _unpack_package(apt, package(base), made)
        (made / "version").write_text(version)
    return Source(folder, version, version)


def _unpack_package(apt: debian.PrivateApt, name: str, folder: Path) -> None:
    with cache.scratch_folder(folder) as work:
        (archived,) = apt.download((name,), work)
        debian.unpack(archived, work)
        archived.unlink()
        archive = next(iter((work / "usr/src").glob("*.tar.xz")), None)
        if archive is None:
            raise LabError(f"{name} has no source archive in usr/src: has the package changed?")
        (folder / "tree").mkdir()
        process.check(
            [
                "tar",
                "--extract",
                "--strip-components=1",
                "--file",
                str(archive),
                "--directory",
                str(folder / "tree"),
            ]
        )


def own(directory: Path) -> Source:
    """A copy of the user's tree, brought up to date file by file so that a rebuild stays small.

    :raises UsageError: ``directory`` is no kernel tree
    """
    directory = directory.resolve()
    version_of(directory)
    folder = folder_of(directory)
    assert folder is not None
    cache.need_space(folder, 0 if folder.exists() else UNPACKED_MIB << 19, "the copy of the kernel tree")
    folder.mkdir(parents=True, exist_ok=True)
    files = list(_source_files(directory))
    source = Source(folder, str(directory), _identity(directory, files))
    _synchronise(directory, files, source)
    return source


def _identity(tree: Path, files: list[str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        status = (tree / name).lstat()
        digest.update(f"{name}\0{status.st_mode}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _synchronise(theirs: Path, files: list[str], source: Source) -> None:
    """Make the tree of ``source`` equal ``theirs``, but for what the series touches: there, ``orig``."""
    touched = set(source.touched())

    def ours(name: str) -> Path:
        return (source.orig if name in touched else source.tree) / name

    for name in files:
        if not _same(theirs / name, ours(name)):
            ours(name).parent.mkdir(parents=True, exist_ok=True)
            ours(name).unlink(missing_ok=True)
            shutil.copy2(theirs / name, ours(name), follow_symlinks=False)
    for name in touched.union(_source_files(source.tree)).difference(files):
        ours(name).unlink(missing_ok=True)


def _same(one: Path, other: Path) -> bool:
    try:
        a, b = one.lstat(), other.lstat()
    except FileNotFoundError:
        return False
    return (a.st_mode, a.st_size, a.st_mtime_ns) == (b.st_mode, b.st_size, b.st_mtime_ns)


def _source_files(tree: Path) -> Iterator[str]:
    """Relative names of a tree's files, without what a build left there and without .git."""
    for folder, folders, files in os.walk(tree):
        inner = Path(folder).relative_to(tree)
        folders[:] = [
            name for name in folders if name != ".git" and str(inner / name) not in _PRODUCT_FOLDERS
        ]
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in (*files, *links):
            if not _PRODUCTS.fullmatch(name):
                yield str(inner / name)
