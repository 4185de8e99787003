# SPDX-License-Identifier: Apache-2.0
"""Every mutant is a change of the series as it is now."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from prefault.lab import build, mutants, process, source
from prefault.lab.series import touched_by

pytestmark = pytest.mark.lab
MUTANTS = mutants.read()


@pytest.mark.parametrize("one", MUTANTS, ids=lambda one: one.name)
def test_every_mutant_applies_to_the_series(one: mutants.Mutant, tmp_path: Path) -> None:
    build.current()
    tree = source.packaged().tree
    for name in touched_by(one.patch.read_text()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / name, tmp_path / name)
    environment = {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    status, output = process.run(
        ["git", "apply", "--check", str(one.patch)], cwd=tmp_path, environment=environment
    )
    assert status == 0, output
