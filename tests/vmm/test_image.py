# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import UsageError
from prefault.vmm import image
from prefault.vmm.config import MIB, RAM_BASE
from prefault.vmm.image import Image


def header(text_offset: int = 0, size: int = 4096, flags: int = 0, magic: bytes = b"ARM\x64") -> bytes:
    return struct.pack("<8xQQQ24x4s4x", text_offset, size, flags, magic)


def test_an_image_is_read_plain_and_compressed() -> None:
    data = header(size=8 * MIB) + b"code"
    assert image.parse(data) == image.parse(gzip.compress(data)) == Image(data, 0, 8 * MIB)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x7fELF" + bytes(100), "not an arm64 Linux Image"),
        (b"", "not an arm64 Linux Image"),
        (header(magic=b"RISC"), "not an arm64 Linux Image"),
        (header(flags=1), "big-endian"),
        (gzip.compress(header(), mtime=0)[:20], "damaged"),
    ],
)
def test_anything_else_is_refused_with_its_name(data: bytes, why: str) -> None:
    with pytest.raises(UsageError, match=f"vmlinuz.*{why}"):
        image.parse(data, "vmlinuz")


def test_an_old_image_that_does_not_tell_its_size_goes_where_old_ones_go() -> None:
    assert image.parse(header(text_offset=0, size=0) + bytes(100)).text_offset == 0x8_0000


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Image cannot be read: No such file"):
        image.read(tmp_path / "Image")


@given(
    st.integers(1, 64 * MIB), st.sampled_from([0, 0x8_0000]), st.integers(0, 64 * MIB), st.integers(8, 256)
)
def test_nothing_overlaps_and_all_is_in_memory(size: int, offset: int, initrd: int, double_mib: int) -> None:
    memory = double_mib * 2 * MIB
    try:
        placed = image.place(Image(b"", offset, size), initrd, memory)
    except UsageError as error:
        assert "not enough" in str(error)
        assert size + offset + initrd + 8 * MIB > memory
        return
    assert placed.kernel % (2 * MIB) == offset
    assert placed.kernel + size <= placed.dtb
    assert placed.dtb % (2 * MIB) == 0  # and so is its end within the same 2 MiB
    assert placed.dtb + 2 * MIB <= placed.initrd
    assert placed.initrd + initrd <= RAM_BASE + memory
