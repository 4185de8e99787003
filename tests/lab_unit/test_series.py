# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import difflib
import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefault.errors import BuildFailed, UsageError
from prefault.lab import series
from prefault.lab.series import Series
from prefault.lab.source import Source

BASE = {"a.c": "one\ntwo\nthree\nfour\n", "d/b.c": "alpha\nbeta\n", "Makefile": "all:\n"}


def make_source(folder: Path) -> Source:
    for name, text in BASE.items():
        path = folder / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Source(folder, "test", "1")


def make_patch(path: Path, before: dict[str, str], after: dict[str, str]) -> Path:
    lines: list[str] = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        lines.append(f"diff --git a/{name} b/{name}\n")
        lines += ["new file mode 100644\n"] if old is None else []
        lines += ["deleted file mode 100644\n"] if new is None else []
        lines += difflib.unified_diff(
            (old or "").splitlines(True),
            (new or "").splitlines(True),
            f"a/{name}" if old is not None else "/dev/null",
            f"b/{name}" if new is not None else "/dev/null",
        )
    path.write_text("".join(lines))
    return path


def tree_of(source: Source) -> dict[str, str]:
    files = (path for path in source.tree.rglob("*") if path.is_file())
    return {str(path.relative_to(source.tree)): path.read_text() for path in files}


ONE = {**BASE, "a.c": "one\nTWO\nthree\nfour\n", "new.c": "new\n"}
TWO = {**ONE, "a.c": "one\nTWO\nTHREE\nfour\n", "d/b.c": "alpha\nBETA\n"}
THREE = {name: text for name, text in BASE.items() if name != "d/b.c"}
STATES: tuple[tuple[dict[str, str], ...], ...] = ((), (ONE,), (ONE, TWO), (TWO,), (THREE,))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(order=st.lists(st.sampled_from(range(len(STATES))), min_size=1, max_size=5))
def test_the_tree_is_base_plus_series_whatever_was_applied_before(
    order: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("series")
    source = make_source(folder / "source")
    for number, choice in enumerate(order):
        states = [BASE, *STATES[choice]]
        patches = [
            make_patch(folder / f"{number}-{i}.patch", before, after)
            for i, (before, after) in enumerate(itertools.pairwise(states))
        ]
        series.apply(Series(tuple(patches)), source)
        assert tree_of(source) == states[-1]


def test_only_files_that_come_out_different_are_written(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    one = make_patch(tmp_path / "1.patch", BASE, ONE)
    series.apply(Series((one,)), source)
    before = {path: path.stat().st_mtime_ns for path in source.tree.rglob("*.c")}
    two = make_patch(tmp_path / "2.patch", ONE, {**ONE, "d/b.c": "alpha\nBETA\n"})
    series.apply(Series((one, two)), source)
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed == ["b.c"]


def test_a_patch_that_does_not_apply_is_named_and_changes_nothing(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    good = make_patch(tmp_path / "0001-good.patch", BASE, ONE)
    bad = make_patch(tmp_path / "0002-bad.patch", {"a.c": "other\n"}, {"a.c": "text\n"})
    with pytest.raises(BuildFailed, match=r"0002-bad.patch does not apply to test"):
        series.apply(Series((good, bad)), source)
    assert tree_of(source) == BASE


def test_context_must_match(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    fuzzy = make_patch(
        tmp_path / "fuzzy.patch",
        {"a.c": "one\ntwo\nthree\nFOUR\n"},
        {"a.c": "one\nTWO\nthree\nFOUR\n"},
    )
    with pytest.raises(BuildFailed):
        series.apply(Series((fuzzy,)), source)


def test_a_pristine_copy_is_the_base_and_leaves_the_tree_alone(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    patches = Series((make_patch(tmp_path / "1.patch", BASE, TWO),))
    series.apply(patches, source)
    series.pristine_copy(patches, source, tmp_path / "copy")
    copy = {
        str(p.relative_to(tmp_path / "copy")): p.read_text()
        for p in (tmp_path / "copy").rglob("*")
        if p.is_file()
    }
    assert copy == BASE
    assert tree_of(source) == TWO


def test_the_series_file_gives_the_order_and_must_name_files(tmp_path: Path) -> None:
    assert series.read(tmp_path).patches == ()
    (tmp_path / "b.patch").touch()
    (tmp_path / "a.patch").touch()
    (tmp_path / "series").write_text("# order\nb.patch\n\na.patch\n")
    assert [path.name for path in series.read(tmp_path).patches] == ["b.patch", "a.patch"]
    (tmp_path / "series").write_text("c.patch\n")
    with pytest.raises(UsageError, match=r"c\.patch"):
        series.read(tmp_path)


def test_the_hash_changes_with_a_name_and_with_a_byte(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("x")
    first = Series((tmp_path / "a",)).sha256
    assert Series((tmp_path / "b",)).sha256 != first
    (tmp_path / "a").write_text("y")
    assert Series((tmp_path / "a",)).sha256 != first
