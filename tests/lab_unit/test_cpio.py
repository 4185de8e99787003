# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.lab import cpio

names = st.lists(st.text("abcé-", min_size=1, max_size=8), min_size=1, max_size=4).map("/".join)


def possible(wanted: dict[str, bytes]) -> bool:
    """Whether no name is a file and a folder at once."""
    return not any(str(parent) in wanted for name in wanted for parent in Path(name).parents)


files = st.dictionaries(names, st.binary(max_size=100), max_size=8).filter(possible)


def contents(archive: bytes) -> dict[str, bytes]:
    return {entry.name: entry.data for entry in cpio.read(archive) if stat.S_ISREG(entry.mode)}


@given(files)
def test_what_is_written_is_read_back(wanted: dict[str, bytes]) -> None:
    archive = cpio.write(cpio.file(name, data) for name, data in wanted.items())
    assert contents(archive) == wanted
    assert len(archive) % 4 == 0


@given(files)
def test_every_parent_comes_once_and_before_its_children(wanted: dict[str, bytes]) -> None:
    seen: set[str] = set()
    for entry in cpio.read(cpio.write(cpio.file(name, data) for name, data in wanted.items())):
        parent = str(Path(entry.name).parent)
        assert parent == "." or parent in seen
        assert entry.name not in seen
        seen.add(entry.name)


def test_the_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/program").write_bytes(b"#!")
    (tmp_path / "d/program").chmod(0o755)
    (tmp_path / "link").symlink_to("d/program")
    first = cpio.write(cpio.tree(tmp_path))
    (tmp_path / "d/program").touch()
    assert cpio.write(cpio.tree(tmp_path)) == first
    by_name = {entry.name: entry for entry in cpio.read(first)}
    assert by_name["link"].data == b"d/program"
    assert by_name["d/program"].mode == stat.S_IFREG | 0o755


def test_what_is_no_archive_is_refused() -> None:
    with pytest.raises(ValueError, match="no newc header at byte 0"):
        list(cpio.read(b"PK" * 100))


@pytest.mark.skipif(shutil.which("cpio") is None, reason="the program cpio is not installed")
def test_the_program_cpio_reads_it() -> None:
    entries = [cpio.file("a/b", b"x"), cpio.link("l", "a/b"), cpio.character_device("dev/null", 1, 3)]
    done = subprocess.run(["cpio", "-t"], input=cpio.write(entries), capture_output=True, check=True)
    assert done.stdout.decode().split() == ["a", "a/b", "l", "dev", "dev/null"]
