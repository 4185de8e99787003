# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from prefault.errors import UsageError
from prefault.lab import series, source
from prefault.lab.series import Series
from tests.lab_unit.test_series import make_patch, tree_of

MAKEFILE = "VERSION = 7\nPATCHLEVEL = 3\nSUBLEVEL = 9\nEXTRAVERSION = -rc1\n"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """Something that passes for a kernel tree, with the leftovers of a build."""
    tree = tmp_path / "linux"
    for name, text in {
        "Makefile": MAKEFILE,
        "arch/arm64/kvm/mmu.c": "int mmu;\n",
        "arch/arm64/kvm/mmu.o": "object",
        ".config": "CONFIG_OLD=y",
        ".git/HEAD": "ref",
        "include/generated/autoconf.h": "old",
        "include/linux/kvm.h": "struct kvm;\n",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    return tree


WANTED = {"Makefile", "arch/arm64/kvm/mmu.c", "include/linux/kvm.h"}


def test_the_version_is_read_from_the_makefile(kernel: Path) -> None:
    assert source.version_of(kernel) == "7.3.9-rc1"


def test_what_is_no_kernel_tree_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("all:\n")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError, match="not a Linux kernel tree"):
            source.own(folder)


def test_a_copy_has_the_source_and_nothing_built(kernel: Path, own_cache: Path) -> None:
    copied = source.own(kernel)
    assert copied.tree.is_relative_to(own_cache)
    assert set(tree_of(copied)) == WANTED


def test_an_equal_tree_is_the_same_source_and_is_not_written_again(kernel: Path, own_cache: Path) -> None:
    first = source.own(kernel)
    inode = (first.tree / "Makefile").stat().st_ino
    second = source.own(kernel)
    assert second == first
    assert (second.tree / "Makefile").stat().st_ino == inode


def test_changes_in_the_users_tree_arrive_under_the_series(
    kernel: Path, own_cache: Path, tmp_path: Path
) -> None:
    before = {"arch/arm64/kvm/mmu.c": "int mmu;\n"}
    after = {"arch/arm64/kvm/mmu.c": "int mmu;\nint more;\n", "new.c": "int new;\n"}
    patches = Series((make_patch(tmp_path / "1.patch", before, after),))
    first = source.own(kernel)
    series.apply(patches, first)

    (kernel / "arch/arm64/kvm/mmu.c").write_text("/* theirs */\n\n\n\nint mmu;\n")
    (kernel / "include/linux/kvm.h").unlink()
    (kernel / "include/linux/other.h").write_text("")
    second = source.own(kernel)
    assert second.identity != first.identity
    series.apply(Series(()), second)
    assert tree_of(second) == {
        "Makefile": MAKEFILE,
        "arch/arm64/kvm/mmu.c": "/* theirs */\n\n\n\nint mmu;\n",
        "include/linux/other.h": "",
    }


def test_the_users_tree_is_not_changed(kernel: Path, own_cache: Path, tmp_path: Path) -> None:
    def state() -> dict[Path, tuple[int, bytes]]:
        files = (path for path in kernel.rglob("*") if path.is_file())
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    patches = Series((make_patch(tmp_path / "1.patch", {"Makefile": MAKEFILE}, {"Makefile": "x\n"}),))
    series.apply(patches, source.own(kernel))
    assert state() == before
