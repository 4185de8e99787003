# SPDX-License-Identifier: Apache-2.0
"""Applying the kernel series to a tree, again and again, touching only files that come out different.

The unpatched form of each touched file is kept in ``orig/`` beside the tree. Applying means: patch those
copies in a scratch folder, strictly, and write to the tree what differs there. So a change of one patch
rebuilds what that patch concerns, and the tree can always be brought back.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from prefault.errors import BuildFailed, UsageError
from prefault.lab import cache, process
from prefault.lab.source import Source

_TOUCHED = re.compile(r"^(?:---|\+\+\+) (?:a|b)/(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Series:
    """Patches, in order."""

    patches: tuple[Path, ...]

    @property
    def sha256(self) -> str:
        """Hash of names and contents."""
        digest = hashlib.sha256()
        for patch in self.patches:
            digest.update(patch.name.encode() + b"\0" + patch.read_bytes())
        return digest.hexdigest()

    def touched(self) -> tuple[str, ...]:
        """Names of all files that the patches change, create or delete."""
        names = {name for patch in self.patches for name in touched_by(patch.read_text())}
        return tuple(sorted(names))


def touched_by(patch: str) -> set[str]:
    """Names of the files that one patch changes, creates or deletes."""
    return set(_TOUCHED.findall(patch))


def read(folder: Path) -> Series:
    """The series in ``folder``, in the order of its file ``series``; none if there is no such file.

    :raises UsageError: ``series`` names a patch that is not there
    """
    index = folder / "series"
    lines = index.read_text().splitlines() if index.exists() else []
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{index} names {', '.join(missing)}, not found in {folder}")
    return Series(tuple(folder / name for name in names))


def apply(series: Series, source: Source) -> None:
    """Bring the tree of ``source`` to exactly its base plus ``series``.

    :raises BuildFailed: a patch does not apply; the tree is then as it was
    """
    before = set(source.touched())
    touched = sorted(before.union(series.touched()))
    with cache.scratch_folder(source.folder) as scratch:
        for name in touched:
            _copy_if_there((source.orig if name in before else source.tree) / name, scratch / name)
        pristine = {name for name in touched if (scratch / name).exists()}
        for name in set(touched) - before:
            (source.orig / name).unlink(missing_ok=True)
            _copy_if_there(scratch / name, source.orig / name)
        for patch in series.patches:
            _apply_one(patch, scratch, source.name)
        # From here on the tree may be mixed; what is remembered lets the next call repair it.
        source.remember_touched(touched)
        for name in touched:
            _replace_if_different(scratch / name, source.tree / name)
    source.remember_touched(series.touched())
    for name in pristine.difference(series.touched()):
        (source.orig / name).unlink(missing_ok=True)


def _copy_if_there(origin: Path, target: Path) -> None:
    if origin.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(origin, target)


def _apply_one(patch: Path, folder: Path, base: str) -> None:
    # The ceiling keeps git from taking a repository around the cache for its own.
    status, output = process.run(
        ["git", "apply", "--whitespace=nowarn", str(patch.resolve())],
        cwd=folder,
        environment={"GIT_CEILING_DIRECTORIES": str(folder.parent), "LC_ALL": "C"},
    )
    if status != 0:
        raise BuildFailed(f"{patch.name} does not apply to {base}:\n{output.rstrip()}")


def _replace_if_different(new: Path, old: Path) -> None:
    if not new.exists():
        old.unlink(missing_ok=True)
    elif not old.exists() or old.read_bytes() != new.read_bytes():
        cache.write_file(old, new.read_bytes())
        old.chmod(new.stat().st_mode & 0o777)


def pristine_copy(series: Series, source: Source, folder: Path) -> None:
    """The tree without the series, in ``folder``: hard links, and copies of what the series touches."""
    shutil.copytree(source.tree, folder, copy_function=_hard_link, symlinks=True)
    for name in series.touched():
        (folder / name).unlink(missing_ok=True)
        _copy_if_there(source.orig / name, folder / name)


def _hard_link(origin: str, target: str) -> None:
    Path(target).hardlink_to(origin)
