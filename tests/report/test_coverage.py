# SPDX-License-Identifier: Apache-2.0
"""The table of scenarios in docs/conform.md is what the scenarios say."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefault.report.coverage import BEGIN, END, coverage_table, updated
from prefault.scenarios import Scenario

PAGE = Path(__file__).parents[2] / "docs/conform.md"


def test_the_page_has_every_scenario() -> None:
    page = PAGE.read_text()
    assert updated(page) == page, "run: python -m prefault.report.coverage docs/conform.md"


def test_cases_are_counted_and_named_once() -> None:
    listed = [Scenario(name, ("M2",), lambda stage: None) for name in ("a[1]", "b", "a[2]")]
    assert "| M2 | 3 | `a` (2), `b` |" in coverage_table(listed).splitlines()


def test_a_page_without_a_place_for_it_is_refused() -> None:
    with pytest.raises(ValueError, match="coverage"):
        updated(f"{END} {BEGIN}")
