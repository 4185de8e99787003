# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from prefault.report.units import exact_size, format_duration, format_size, plural, round_size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (1, "1 B"),
        (4096, "4 KiB"),
        (32 << 20, "32 MiB"),
        (3 << 29, "1536 MiB"),
        (4097, "4097 B"),
    ],
)
def test_a_size_is_written_exactly(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("size", "exact", "short"),
    [
        (0, "0 B", "0 B"),
        (4096, "4 KiB", "4 KiB"),
        ((128 << 20) + 4096, "128 MiB + 4 KiB", "~128 MiB"),
        ((3 << 30) + (4 << 20), "3 GiB + 4 MiB", "3076 MiB"),
        ((3 << 30) + 4096, "3 GiB + 4 KiB", "~3 GiB"),
        ((1 << 50) + (1 << 40) + 7, "1025 TiB + 7 B", "~1025 TiB"),
        (123_456_789, "117 MiB + 755 KiB + 277 B", "~117.7 MiB"),
    ],
)
def test_a_size_is_added_up_or_rounded(size: int, exact: str, short: str) -> None:
    assert (exact_size(size), round_size(size)) == (exact, short)


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1500, "1.5 µs"),
        (27_000_000, "27 ms"),
        (1.534e9, "1.53 s"),
        (999_600, "1 ms"),
        (999_950_000, "1 s"),
        (999.6, "1 µs"),
        (1234e9, "1,234 s"),
    ],
)
def test_a_duration_has_three_digits_and_a_unit(ns: float, text: str) -> None:
    assert format_duration(ns) == text


def test_one_is_singular_and_thousands_are_grouped() -> None:
    assert plural(1, "page") == "1 page"
    assert plural(8192, "page") == "8,192 pages"
