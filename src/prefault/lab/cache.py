# SPDX-License-Identifier: Apache-2.0
"""Where the lab keeps what it downloads and builds, and how it stays whole.

Everything is made under a temporary name beside its place and renamed when it is complete; a name
without ``.part-`` in it is therefore whole, whatever ended the process that made it. A lock file per
part keeps concurrent users apart.

Failure modes: ``LabError`` if the file system is full or not writable. What was half written is removed
at once when an exception passes, and by ``remove_leftovers`` when the process was killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from prefault.errors import LabError

PART = ".part-"


def root() -> Path:
    """The cache folder, by XDG: $XDG_CACHE_HOME/prefault or ~/.cache/prefault."""
    return Path(platformdirs.user_cache_dir("prefault", appauthor=False))


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LabError(
                f"no space left for {path}: free some, run `prefault lab clean`, "
                "or set XDG_CACHE_HOME to a folder on a bigger file system"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS):
            raise LabError(f"cannot write {path}: {error.strerror}; set XDG_CACHE_HOME") from error
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path``, replacing it, if the block ends without an exception."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{path.name}{PART}", dir=path.parent))
        try:
            part.chmod(0o755)
            yield part
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f"{path.name}{PART}", dir=path.parent))
                path.rename(old / "old")
                part.rename(path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder in ``parent`` that is gone when the block ends."""
    with _explained(parent):
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"scratch{PART}", dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or whole."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f"{path.name}{PART}", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of one part of the cache; others wait. The kernel drops it with the process."""
    path = root() / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(
            f"the cache folder {path.parent} cannot be made: {error.strerror}; set XDG_CACHE_HOME"
        ) from error
    with _explained(path), path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def is_locked(name: str) -> bool:
    """Whether somebody holds the lock of that part of the cache at this moment."""
    try:
        with (root() / f"{name}.lock").open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no lock, or none that we may look at
    return False


def need_space(where: Path, size: int, what: str) -> None:
    """Fail early and clearly rather than late and half done.

    :raises LabError: the file system of ``where`` has less than ``size`` bytes free
    """
    existing = where
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < size:
        raise LabError(
            f"{what} needs {size >> 20} MiB under {where}, {free >> 20} MiB are free: free some, "
            "run `prefault lab clean`, or set XDG_CACHE_HOME to a folder on a bigger file system"
        )


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half made. The caller holds the lock of that part."""
    for path in folder.glob(f"*{PART}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes that ``path`` and what is below it take on disk."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_blocks * 512
    return sum(inner.lstat().st_blocks * 512 for inner in path.rglob("*") if not inner.is_dir())
