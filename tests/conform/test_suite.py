# SPDX-License-Identifier: Apache-2.0
"""Choosing scenarios by name, pattern and requirement."""

from __future__ import annotations

import pytest

from prefault.conform.suite import Suite, choose
from prefault.errors import UsageError
from prefault.scenarios import SCENARIOS
from prefault.scenarios.program import HostRead, VmmProgram


def test_nothing_named_is_all() -> None:
    assert choose(()) == tuple(SCENARIOS)


def test_a_name_without_its_case_is_all_cases() -> None:
    found = choose(["copy_on_write_is_not_broken"])
    assert len(found) > 1
    assert all(name.startswith("copy_on_write_is_not_broken[") for name in found)


def test_brackets_in_a_pattern_are_those_of_a_case() -> None:
    assert choose(["copy_on_write_is_not_broken[private-*]"]) == (
        "copy_on_write_is_not_broken[private-nothing]",
        "copy_on_write_is_not_broken[private-read]",
    )


def test_requirements_narrow_what_names_chose() -> None:
    found = choose(["nested_*"], ["m3"])
    assert found
    assert all({"M3", "M4"} <= set(SCENARIOS[name].requirements) for name in found)


@pytest.mark.parametrize(("names", "needs"), [(["no_such_law"], []), (["nested_*"], ["M8"]), ([], ["M99"])])
def test_what_chooses_nothing_is_a_mistake(names: list[str], needs: list[str]) -> None:
    with pytest.raises(UsageError, match="--list"):
        choose(names, needs)


def test_a_part_keeps_the_order() -> None:
    program = VmmProgram((HostRead(0),))
    suite = Suite(("a", "b", "c"), {"p": program, "q": program})
    assert suite.only(["q", "c", "a"]).order() == ["a", "c", "q"]
