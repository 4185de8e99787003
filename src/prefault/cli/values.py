# SPDX-License-Identifier: Apache-2.0
"""Option types that more than one subcommand has."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click

_SUFFIXES = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """Bytes from ``4096``, ``0x1000``, ``4K``, ``32MiB``, ``1g``.

    :raises ValueError: it is none of these, or not positive
    """
    match = re.fullmatch(r"(0x[0-9a-f]+|\d+)([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE | re.ASCII)
    if not match or (match[1].lower().startswith("0x") and match[2]):
        raise ValueError(f"{text!r} is not a size; write bytes, or a number with K, M, G or T (32M)")
    size = int(match[1], 0 if match[1].lower().startswith("0x") else 10) << _SUFFIXES[match[2].upper()]
    if size == 0:
        raise ValueError("the size is 0; it must be at least one page")
    return size


class Size(click.ParamType[int]):
    """A size in bytes with an optional suffix."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Turn what the user typed into bytes."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Real(click.FloatRange):
    """A number within a range; not nan, which is within every one, and not infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Turn what the user typed into a number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no number that can be reckoned with", param, ctx)
        return number


class Percent(click.ParamType[int]):
    """A percentage from 0 to 100 with at most one decimal, kept as permille."""

    name = "percent"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Turn what the user typed into permille. Defaults are text, so that they come through here."""
        match = re.fullmatch(r"(\d{1,3})(?:\.(\d))?%?", str(value).strip(), re.ASCII)
        permille = int(match[1]) * 10 + int(match[2] or 0) if match else -1
        if not 0 <= permille <= 1000:
            self.fail(f"{value!r} is not a percentage; write 0 to 100, with one decimal at most", param, ctx)
        return permille


class KernelImage(click.Path):
    """An arm64 kernel Image, plain or compressed with gzip. Anything else would hang the machine."""

    name = "image"

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, readable=True, path_type=Path)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Check that the file begins as an Image does.

        Source: Documentation/arch/arm64/booting.rst
        """
        path = Path(str(super().convert(str(value), param, ctx)))
        with path.open("rb") as file:
            head = file.read(64)
        if head[56:60] != b"ARM\x64" and head[:2] != b"\x1f\x8b":
            self.fail(
                f"{path} is not an arm64 Image; a build leaves one in arch/arm64/boot/Image", param, ctx
            )
        return path
