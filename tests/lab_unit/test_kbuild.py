# SPDX-License-Identifier: Apache-2.0
"""Command lines of the kernel's build."""

from __future__ import annotations

from pathlib import Path

from prefault.lab import kbuild
from prefault.lab.build import KERNEL_FOLDER, recipe_for
from prefault.lab.kbuild import Make


def test_a_selftest_keeps_its_folder() -> None:
    make = Make(Path("/tree"), Path("/build"), Path("/log"), 1)
    command = kbuild.selftest_command(make, ("pre_fault_memory_test", "arm64/nested_pre_fault_test"))
    folder = "/build/kselftest-kvm"
    assert command[-2:] == (f"{folder}/pre_fault_memory_test", f"{folder}/arm64/nested_pre_fault_test")


def test_listed_selftests_are_those_that_the_series_has_built() -> None:
    added = {
        line.removeprefix("+TEST_GEN_PROGS_arm64 += ")
        for patch in (KERNEL_FOLDER / "v7.3").glob("*.patch")
        for line in patch.read_text().splitlines()
        if line.startswith("+TEST_GEN_PROGS_arm64 += ")
    }
    assert set(recipe_for("7.3").selftests) == added
