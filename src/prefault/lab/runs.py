# SPDX-License-Identifier: Apache-2.0
"""The folder of each run: command line, console and kernel log, kept for the last KEEP runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from prefault.lab import cache

KEEP = 50


def folder() -> Path:
    """Where the runs are."""
    return cache.root() / "runs"


def new() -> Path:
    """A new, empty folder whose name sorts by time; the oldest ones beyond KEEP go, if nobody holds them."""
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


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keep the folder of a run that goes on from being removed by others, however many they are."""
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _prune(top: Path) -> None:
    kept = sorted((path for path in top.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for old in kept[:-KEEP]:
        with contextlib.suppress(OSError):
            _remove(old)


def _remove(run_dir: Path) -> None:
    """Remove the folder of a run that is over; raises BlockingIOError if somebody holds it."""
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(run_dir, ignore_errors=True)
    finally:
        os.close(descriptor)
