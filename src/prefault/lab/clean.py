# SPDX-License-Identifier: Apache-2.0
"""Removing parts of the cache."""

from __future__ import annotations

import shutil

from prefault.lab import cache

PARTS = {
    "kernel": ("kernel",),
    "stock": ("stock",),
    "rootfs": ("rootfs",),
    "packages": ("apt",),
    "runs": ("runs",),
}
"""Names of the parts, and the folders of the cache that each one is."""


def sizes() -> dict[str, int]:
    """Bytes on disk of each part."""
    return {part: sum(_size(name) for name in folders) for part, folders in PARTS.items()}


def _size(name: str) -> int:
    folder = cache.root() / name
    return cache.size_of(folder) if folder.exists() else 0


def remove(part: str) -> int:
    """Remove one part, once nobody works on it.

    :returns: bytes freed
    """
    freed = sizes()[part]
    with cache.locked(part):
        for name in PARTS[part]:
            folder = cache.root() / name
            if folder.exists():
                # Renamed first: an interrupted removal leaves nothing that looks whole.
                with cache.scratch_folder(cache.root()) as scratch:
                    folder.rename(scratch / name)
                    shutil.rmtree(scratch / name)
    return freed
