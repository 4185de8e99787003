# SPDX-License-Identifier: Apache-2.0
"""Sizes, durations and counts as people read them."""

from __future__ import annotations


def format_size(size: int) -> str:
    """The shortest exact form: ``4 KiB``, ``32 MiB``, ``4097 B``."""
    for suffix, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift} {suffix}"
    return f"{size} B"


def format_duration(ns: float) -> str:
    """Three digits and a unit: ``1.53 s``, ``27 ms``."""
    for unit, scale in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= scale:
            return f"{ns / scale:.3g} {unit}"
    return f"{ns:.0f} ns"


def plural(count: int, noun: str) -> str:
    """``1 page``, ``8,192 pages``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
