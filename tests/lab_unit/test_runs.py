# SPDX-License-Identifier: Apache-2.0
"""The folders of runs: the oldest go, but not while they are needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prefault.lab import runs


@pytest.fixture
def _few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(runs, "KEEP", 3)


def _oldest() -> Path:
    made = runs.new()
    os.utime(made, (0, 0))
    return made


@pytest.mark.usefixtures("_few")
def test_the_oldest_run_goes_when_there_are_too_many() -> None:
    first = _oldest()
    for _ in range(3):
        runs.new()
    assert not first.exists()


@pytest.mark.usefixtures("_few")
def test_a_run_that_goes_on_stays_however_many_there_are() -> None:
    first = _oldest()
    with runs.held(first):
        for _ in range(5):
            runs.new()
        assert first.is_dir()
    runs.new()
    assert not first.exists()
