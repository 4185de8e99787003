# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.cli.values import KernelImage, Percent, parse_size
from prefault.report.units import format_size


@given(st.integers(1, 1 << 60))
def test_a_formatted_size_reads_back_as_itself(size: int) -> None:
    assert parse_size(format_size(size).replace(" ", "")) == size


@given(st.integers(1, 1 << 40), st.sampled_from("KMGTkmgt"), st.sampled_from(["", "B", "iB", "ib"]))
def test_a_suffix_multiplies_by_a_power_of_1024(number: int, suffix: str, unit: str) -> None:
    assert parse_size(f"{number}{suffix}{unit}") == number * 1024 ** (" KMGT".index(suffix.upper()))


@given(st.integers(1, 1 << 60))
def test_hexadecimal_is_understood(number: int) -> None:
    assert parse_size(hex(number)) == number


@pytest.mark.parametrize("text", ["", "M", "-4K", "0", "0M", "4.5M", "4X", "0x10K", "4 K x", "٤K", "1e6"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@given(st.integers(0, 1000))
def test_a_percentage_keeps_its_decimal_as_permille(permille: int) -> None:
    text = f"{permille // 10}.{permille % 10}"
    assert Percent().convert(text, None, None) == permille
    assert Percent().convert(text + "%", None, None) == permille


@pytest.mark.parametrize("text", ["", "101", "100.1", "-1", "5.55", "half", "999"])
def test_what_is_not_a_percentage_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="percentage"):
        Percent().convert(text, None, None)


@pytest.mark.parametrize("head", [b"x" * 56 + b"ARM\x64" + b"x" * 8, b"\x1f\x8b\x08"])
def test_an_image_is_known_by_its_head(tmp_path: Path, head: bytes) -> None:
    image = tmp_path / "Image"
    image.write_bytes(head)
    assert KernelImage().convert(str(image), None, None) == image


@pytest.mark.parametrize("head", [b"", b"\x7fELF" + b"x" * 80, b"MZ"])
def test_a_file_that_is_no_image_is_refused(tmp_path: Path, head: bytes) -> None:
    image = tmp_path / "vmlinux"
    image.write_bytes(head)
    with pytest.raises(click.BadParameter, match="not an arm64 Image"):
        KernelImage().convert(str(image), None, None)
