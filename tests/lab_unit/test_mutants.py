# SPDX-License-Identifier: Apache-2.0
"""A mutant says what is wrong with it, and in which mode that shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefault.errors import UsageError
from prefault.lab import mutants
from prefault.lab.series import touched_by

MUTANTS = mutants.read()
PATCH = """SPDX-License-Identifier: GPL-2.0-only

Something is
wrong.

Mode: protected
Equivalent: nobody looks

---
--- a/virt/kvm/kvm_main.c
+++ b/virt/kvm/kvm_main.c
"""


def test_the_text_before_the_diff_is_the_mistake(tmp_path: Path) -> None:
    (tmp_path / "some-thing.patch").write_text(PATCH)
    (one,) = mutants.read(tmp_path)
    assert (one.name, one.mistake) == ("some-thing", "Something is wrong.")
    assert (one.mode, one.equivalent) == ("protected", "nobody looks")


def test_a_folder_without_mutants_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no mutants"):
        mutants.read(tmp_path)


def test_a_name_that_is_none_is_told_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"no mutant is called nobody; there are: .*current-mmu"):
        mutants.choose(("nobody",), MUTANTS)


@pytest.mark.parametrize("one", MUTANTS, ids=lambda one: one.name)
def test_every_mutant_says_what_is_wrong_and_changes_the_kernel(one: mutants.Mutant) -> None:
    assert one.mistake.endswith(".")
    assert touched_by(one.patch.read_text())
