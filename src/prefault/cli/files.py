# SPDX-License-Identifier: Apache-2.0
"""Files that commands write: whole or not at all, and over nothing unless that was asked for."""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from prefault.errors import UsageError


def check_target(path: Path, option: str, *, force: bool) -> None:
    """Whether a file can be written there, before any work is done.

    :raises UsageError: it is there already, is no file, or its folder is missing or read-only
    """
    try:
        _check_target(path, option, force=force)
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from error


def _check_target(path: Path, option: str, *, force: bool) -> None:
    if str(path) == "-":
        raise UsageError(f"{option} -: is not written to standard output; name a file")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} {path}: it must be a file, because it is written beside and renamed")
    if path.exists() and not force:
        raise UsageError(f"{option} {path}: is there already; name another file, or replace it with --force")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {path}: nothing may be written into the folder {path.parent}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file that gets its name when the block is done; compressed if that ends in .gz."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".gz":
            with gzip.open(
                beside, "wt", compresslevel=6, encoding="utf-8", errors="backslashreplace"
            ) as packed:
                yield packed
        else:
            with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
                yield file
        beside.replace(path)
    except OSError as error:
        error.filename = str(path)  # one of write() has none
        raise
    finally:
        beside.unlink(missing_ok=True)
