# SPDX-License-Identifier: Apache-2.0
"""Ranges of guest memory that a user names: in a plan, or one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from prefault.errors import UsageError

Range = tuple[int, int]
"""(ipa, size)"""


def parse(text: str) -> list[Range]:
    """Ranges from ``0x40000000+0x200000,0x48000000+4096``, or from a plan, a file whose name ends with .json.

    :raises UsageError: this is neither
    """
    if text.endswith(".json"):
        return read_plan(Path(text))
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


def read_plan(path: Path) -> list[Range]:
    """The ranges of a plan: an object with ``ranges``, a list of objects with ``ipa`` and ``size``.

    :raises UsageError: the file cannot be read, or is no plan
    """
    try:
        raw = json.loads(path.read_text())
        return [(_number(one["ipa"]), _number(one["size"])) for one in raw["ranges"]]
    except OSError as error:
        raise UsageError(f"the plan {path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is no plan: it needs ranges with ipa and size each ({error!r})") from error


def _number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is no number")
    return int(value, 0) if isinstance(value, str) else value


def fitted(ranges: Iterable[Range], base: int, size: int, page_size: int) -> list[Range]:
    """The ranges in whole pages, without what lies outside of ``[base, base+size)``."""
    found = []
    for ipa, length in ranges:
        start = max(base, ipa // page_size * page_size)
        end = min(base + size, -(-(ipa + length) // page_size) * page_size)
        if start < end:
            found.append((start, end - start))
    return found
