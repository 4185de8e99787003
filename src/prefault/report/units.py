# SPDX-License-Identifier: Apache-2.0
"""Sizes, durations and counts as people read them."""

from __future__ import annotations

_UNITS = (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10))


def format_size(size: int) -> str:
    """The shortest exact form: ``4 KiB``, ``32 MiB``, ``4097 B``."""
    for suffix, shift in _UNITS:
        if size and size % (1 << shift) == 0:
            return f"{size >> shift} {suffix}"
    return f"{size} B"


def exact_size(size: int) -> str:
    """All of it, in units that people can add: ``128 MiB + 4 KiB``."""
    terms = [size >> 30 << 30, *(size >> shift << shift & (1 << shift + 10) - 1 for shift in (20, 10, 0))]
    return " + ".join(format_size(term) for term in terms if term) or format_size(0)


def round_size(size: int) -> str:
    """The exact size if it is short, else four digits of it: ``1020 GiB``, ``~3.004 GiB``."""
    exact = format_size(size)
    if len(exact) <= len("1234 KiB"):
        return exact
    unit, shift = next((unit, shift) for unit, shift in _UNITS if size >> shift or shift == _UNITS[-1][1])
    return f"~{size / (1 << shift):.4g} {unit}"


def format_duration(ns: float) -> str:
    """Three digits and a unit: ``1.53 s``, ``27 ms``."""
    for unit, scale in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= 0.9995 * scale:  # what three digits round up to 1 of this unit
            value = ns / scale
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"
    return f"{ns:.0f} ns"


def plural(count: int, noun: str) -> str:
    """``1 page``, ``8,192 pages``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
