# SPDX-License-Identifier: Apache-2.0
"""The page-at-a-time version is the beginning of the series, up to the patch that a file names."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefault.errors import UsageError
from prefault.lab import build, compare, series
from prefault.lab.series import Series


def made(folder: Path, mark: str | None, *names: str) -> Series:
    for name in names:
        (folder / name).write_text("")
    if mark is not None:
        (folder / compare.MARK).write_text(mark)
    return Series(tuple(folder / name for name in names))


def test_a_patch_is_found_whatever_its_number(tmp_path: Path) -> None:
    whole = made(tmp_path, "# why\n0007-b.patch\n", "0001-a.patch", "0002-b.patch", "0003-c.patch")
    assert [patch.name for patch in compare.first_part(whole).patches] == ["0001-a.patch", "0002-b.patch"]


@pytest.mark.parametrize("mark", [None, "", "# nothing\n", "0001-other.patch\n"])
def test_a_series_that_does_not_say_where_is_told(tmp_path: Path, mark: str | None) -> None:
    with pytest.raises(UsageError, match="page-at-a-time must name the last patch"):
        compare.first_part(made(tmp_path, mark, "0001-a.patch"))


def test_the_series_says_where_its_page_wise_part_ends() -> None:
    whole = series.read(build.KERNEL_FOLDER / "v7.3")
    part = compare.first_part(whole)
    assert 0 < len(part.patches) < len(whole.patches)
    text = "".join(patch.read_text() for patch in part.patches)
    assert "kvm_arch_vcpu_pre_fault_memory" in text
