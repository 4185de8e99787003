# SPDX-License-Identifier: Apache-2.0
"""The folder of each run: command line, console and kernel log, kept for the last KEEP runs."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

from prefault.lab import cache

KEEP = 50


def folder() -> Path:
    """Where the runs are."""
    return cache.root() / "runs"


def new() -> Path:
    """A new, empty folder whose name sorts by time; the oldest ones beyond KEEP go."""
    top = folder()
    top.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1, 10000):
        with contextlib.suppress(FileExistsError):
            (made := top / f"{stamp}-{number}").mkdir()
            _prune(top)
            return made
    raise AssertionError("10000 runs in one second")


def dry() -> Path:
    """The folder of the last run that was only printed."""
    made = folder() / "dry-run"
    made.mkdir(parents=True, exist_ok=True)
    return made


def _prune(top: Path) -> None:
    kept = sorted((path for path in top.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for old in kept[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
