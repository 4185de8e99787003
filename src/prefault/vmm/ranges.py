# SPDX-License-Identifier: Apache-2.0
"""Ranges of guest memory that a user names: in a plan, or one by one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prefault.errors import UsageError
from prefault.faults import plan

Range = tuple[int, int]
"""(ipa, size)"""


def parse(text: str) -> list[Range]:
    """Ranges from ``0x40000000+0x200000,0x48000000+4096``, or from a plan, a file whose name ends with .json.

    :raises UsageError: this is neither
    """
    if text.endswith(".json"):
        return [(one.ipa, one.size) for one in plan.load(Path(text)).ranges]
    found = []
    for one in text.split(","):
        ipa, plus, size = one.strip().partition("+")
        try:
            found.append((int(ipa, 0), int(size, 0)))
        except ValueError:
            plus = ""
        if not plus:
            raise UsageError(f"{one!r} is no range: write IPA+SIZE, as in 0x40000000+0x200000, or plan.json")
    return found


def fitted(ranges: Iterable[Range], base: int, size: int, page_size: int) -> list[Range]:
    """The ranges in whole pages, without what lies outside of ``[base, base+size)``."""
    found = []
    for ipa, length in ranges:
        start = max(base, ipa // page_size * page_size)
        end = min(base + size, -(-(ipa + length) // page_size) * page_size)
        if start < end:
            found.append((start, end - start))
    return found
