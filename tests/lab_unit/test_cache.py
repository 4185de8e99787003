# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from prefault.errors import LabError
from prefault.lab import cache


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    with cache.new_folder(tmp_path / "it") as part:
        (part / "file").write_text("new")
        assert not (tmp_path / "it").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    assert (tmp_path / "it/file").read_text() == "new"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupted_folder_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, stop: type[BaseException]
) -> None:
    with cache.new_folder(tmp_path / "it") as part:
        (part / "file").write_text("old")
    with pytest.raises(stop), cache.new_folder(tmp_path / "it") as part:
        (part / "file").write_text("half")
        raise stop
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    assert (tmp_path / "it/file").read_text() == "old"


def test_a_folder_replaces_the_old_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with cache.new_folder(tmp_path / "it") as part:
            (part / "file").write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    assert (tmp_path / "it/file").read_text() == "new"


def test_a_full_disk_leaves_the_old_file_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    cache.write_file(target, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LabError, match=r"no space left.*XDG_CACHE_HOME"):
        cache.write_file(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_too_little_space_is_told_before_it_is_used(tmp_path: Path) -> None:
    cache.need_space(tmp_path / "not/yet/there", 0, "nothing")
    with pytest.raises(LabError, match=r"the thing needs \d+ MiB"):
        cache.need_space(tmp_path / "not/yet/there", 1 << 60, "the thing")


def _killed_while_making(folder: Path) -> None:
    with cache.new_folder(folder / "it") as part:
        (part / "file").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_is_not_taken_for_whole_and_goes(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed_while_making, args=(tmp_path,))
    process.start()
    process.join()
    assert not (tmp_path / "it").exists()
    assert len(list(tmp_path.iterdir())) == 1
    cache.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _hold(name: str, seconds: float) -> None:
    with cache.locked(name):
        time.sleep(seconds)


def test_a_second_user_waits_for_the_lock(own_cache: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_hold, args=("kernel", 0.5))
    process.start()
    while not (own_cache / "kernel.lock").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    began = time.monotonic()
    with cache.locked("kernel"):
        waited = time.monotonic() - began
    process.join()
    assert waited > 0.2


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(LabError, match="cannot be made"), cache.locked("kernel"):
        pass
