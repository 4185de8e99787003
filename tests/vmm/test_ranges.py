# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import UsageError
from prefault.vmm import ranges

BASE, SIZE, PAGE = 0x4000_0000, 1 << 24, 4096


def test_ranges_are_read_in_any_base() -> None:
    assert ranges.parse("0x1000+0x2000, 4096+1") == [(0x1000, 0x2000), (4096, 1)]


@pytest.mark.parametrize("text", ["", "0x1000", "a+b", "1+2,", "1-2"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no range"):
        ranges.parse(text)


def test_a_plan_is_read_in_its_order(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(
        json.dumps({"ranges": [{"ipa": "0x2000", "size": 4096}, {"ipa": 0, "size": 1, "why": "x"}]})
    )
    assert ranges.parse(str(plan)) == [(0x2000, 4096), (0, 1)]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"ranges": [1]}', '{"ranges": [{"ipa": true, "size": 1}]}']
)
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(text)
    with pytest.raises(UsageError, match="is no plan"):
        ranges.parse(str(plan))


def test_a_plan_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        ranges.parse(str(tmp_path / "plan.json"))


@given(st.lists(st.tuples(st.integers(BASE - SIZE, BASE + 2 * SIZE), st.integers(1, SIZE))))
def test_fitted_ranges_are_the_pages_that_the_guest_has(asked: list[tuple[int, int]]) -> None:
    def pages(some: list[tuple[int, int]]) -> set[int]:
        return {page for ipa, size in some for page in range(ipa // PAGE, -(-(ipa + size) // PAGE))}

    fitted = ranges.fitted(asked, BASE, SIZE, PAGE)
    assert all(ipa % PAGE == 0 and size % PAGE == 0 and size for ipa, size in fitted)
    assert pages(fitted) == pages(asked) & set(range(BASE // PAGE, (BASE + SIZE) // PAGE))
