# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import UsageError
from prefault.faults.plan import dumps
from prefault.faults.planning import PlanConfig, make_plan
from prefault.vmm import ranges
from tests.faults.recordings import Fault, recording_of

BASE, SIZE, PAGE = 0x4000_0000, 1 << 24, 4096


def test_ranges_are_read_in_any_base() -> None:
    assert ranges.parse("0x1000+0x2000, 4096+1") == [(0x1000, 0x2000), (4096, 1)]


@pytest.mark.parametrize("text", ["", "0x1000", "a+b", "1+2,", "1-2"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no range"):
        ranges.parse(text)


def test_a_plan_is_read_in_its_order(tmp_path: Path) -> None:
    made = make_plan([recording_of([Fault(100), Fault(1, 5)])], PlanConfig(4096)).plan
    path = tmp_path / "plan.json"
    path.write_text(dumps(made))
    assert ranges.parse(str(path)) == [(one.ipa, one.size) for one in made.ranges]
    assert len(made.ranges) == 2


def test_a_plan_that_is_none_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(UsageError, match="No such file"):
        ranges.parse(str(path))
    path.write_text("{}")
    with pytest.raises(UsageError, match="no plan"):
        ranges.parse(str(path))


@given(st.lists(st.tuples(st.integers(BASE - SIZE, BASE + 2 * SIZE), st.integers(1, SIZE))))
def test_fitted_ranges_are_the_pages_that_the_guest_has(asked: list[tuple[int, int]]) -> None:
    def pages(some: list[tuple[int, int]]) -> set[int]:
        return {page for ipa, size in some for page in range(ipa // PAGE, -(-(ipa + size) // PAGE))}

    fitted = ranges.fitted(asked, BASE, SIZE, PAGE)
    assert all(ipa % PAGE == 0 and size % PAGE == 0 and size for ipa, size in fitted)
    assert pages(fitted) == pages(asked) & set(range(BASE // PAGE, (BASE + SIZE) // PAGE))
