# SPDX-License-Identifier: Apache-2.0
"""What was measured is divided, compared with what must be reached, and shown."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from prefault.bench.cases import MIB, Case, choose
from prefault.bench.measure import Measured
from prefault.report import bench as report
from prefault.report.bench import Profiled, Row
from prefault.report.profile import MMU_LOCK, Profile

(PAGES,) = choose(["private/resident"])
(BLOCKS,) = choose(["thp/resident"])
COUNT = PAGES.size // 4096


def measured(case: Case, cost: float, again: float = 1, **more: list[int]) -> Measured:
    unit = 2 * MIB if case.blocks else 4096
    count = case.size // unit
    samples = {"demand": [5000 * count], "prefault": [round(cost * count)], "again": [round(again * count)]}
    leaves = {"2" if case.blocks else "3": count}
    return Measured(case.name, case.size, unit, 4096, {**samples, **more}, leaves, 0.0)


def row(case: Case, cost: float, again: float = 1, mode: str = "nested", before: float = 0) -> Row:
    return Row(mode, case, measured(case, cost, again), measured(case, before) if before else None)


def test_a_figure_is_the_median_for_each_leaf() -> None:
    found = measured(PAGES, 0, prefault=[70 * COUNT, 71 * COUNT, 900 * COUNT])
    assert report.per_leaf(found, "prefault") == 71


def test_what_was_not_measured_has_no_figure() -> None:
    assert report.per_leaf(measured(PAGES, 1), "touch") is None


def test_what_costs_as_much_as_it_may_holds() -> None:
    assert report.failures([row(PAGES, 210, 20), row(BLOCKS, 2560, 20 * 512)]) == []


def test_what_costs_more_than_it_may_does_not_hold() -> None:
    (line,) = report.failures([row(PAGES, 211)])
    assert "pre-faulting costs 211, not 210 or less" in line


def test_mapped_memory_is_judged_by_pages_also_where_it_has_blocks() -> None:
    (line,) = report.failures([row(BLOCKS, 2000, 21 * 512)])
    assert "a page that is mapped costs 21.0" in line


def test_blocks_that_were_split_do_not_hold() -> None:
    one = row(BLOCKS, 2000)
    split = dataclasses.replace(one, found=dataclasses.replace(one.found, leaves={"3": 512, "2": 15}))
    (line,) = report.failures([split])
    assert "512 pages were mapped where blocks fit" in line


def test_under_pkvm_a_third_of_the_page_wise_cost_holds_and_more_does_not() -> None:
    assert report.failures([row(PAGES, 1500, 900, "protected", 4500)]) == []
    (line,) = report.failures([row(PAGES, 1501, 900, "protected", 4500)])
    assert "not 1,500 or less" in line


def test_under_pkvm_nothing_is_judged_without_the_page_wise_cost() -> None:
    assert row(PAGES, 99_999, mode="protected").bar is None


def test_nothing_is_asked_of_a_peer_and_its_share_stands_beside_ours() -> None:
    rows = [
        row(PAGES, 50),
        row(PAGES, 4000, 3000, report.PEER),
        row(PAGES.sized(64 * MIB), 9000, 1, report.PEER),
    ]
    assert report.failures(rows) == [] and rows[1].bar is None
    remarks = list(report.remarks(rows))
    assert any("x86 and here: private/resident 0.80 and 0.01" in line for line in remarks)
    assert not any("x86" in line for line in report.remarks(rows[:1]))


def test_sizes_within_five_percent_hold_and_others_do_not() -> None:
    large = PAGES.sized(1024 * MIB)
    assert report.failures([row(PAGES, 60), row(large, 63)]) == []
    (line,) = report.failures([row(PAGES, 60), row(large, 64)])
    assert "60.0 to 64.0 by size" in line


def test_another_fault_path_on_the_other_kernel_is_told() -> None:
    before = measured(PAGES, 4000, demand=[5200 * COUNT])
    one = Row("nested", PAGES, measured(PAGES, 60), before)
    assert any("the fault path is not the same" in line for line in report.remarks([one]))


def test_the_table_fits_its_width_and_says_what_holds() -> None:
    rows = [row(PAGES, 61.7, before=4000), row(BLOCKS, 4900), row(PAGES.sized(4096 * MIB), 62)]
    console = Console(width=report.WIDTH, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(report.table(rows))
    text = capture.get()
    assert "private/resident 4 GiB" in text and "…" not in text
    (pages,) = [line for line in text.splitlines() if line.startswith(" private/resident  ")]
    assert pages.split()[1:6] == ["4K", "5,000", "4,000", "61.7", "210"]
    assert "2,560 no" in text


def test_what_was_skipped_is_named_with_its_reason() -> None:
    one = Row("nested", PAGES, Measured(PAGES.name, PAGES.size, 0, 0, skipped="no memory"))
    assert "skipped private/resident: no memory" in list(report.remarks([one]))
    assert report.failures([one]) == []


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_figures_give_the_same_plot(tmp_path: Path, suffix: str) -> None:
    rows = [row(PAGES, 61, before=4000), row(BLOCKS, 4900, mode="protected")]
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for file in files:
        report.plot(rows, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert suffix != ".svg" or "pKVM: thp/resident" in files[0].read_text()


def test_quantiles_are_values_that_were_measured() -> None:
    assert report.quantiles(list(range(1000))) == (500, 900, 990, 999)
    assert report.quantiles([7]) == (7, 7, 7, 7)


def test_a_profile_is_divided_by_leaves() -> None:
    small = Profiled(BLOCKS.sized(8 * MIB), {report.PRE_FAULT: Profile(Counter(kvm_walk=400))})
    assert small.leaves == 4
    assert Profiled(PAGES.sized(2 * MIB)).leaves == 512
    console = Console(width=report.WIDTH)
    with console.capture() as capture:
        console.print(report.profile_table(small))
    assert ["kvm_walk", "100"] in [line.split() for line in capture.get().splitlines()]


@pytest.mark.parametrize(("longest", "verdict"), [(10_000, "holds"), (10_001, "does not hold")])
def test_a_hold_of_the_lock_has_a_limit(longest: int, verdict: str) -> None:
    one = Profiled(PAGES, {report.PRE_FAULT: Profile(longest=Counter({MMU_LOCK: longest}))})
    assert report.hold(one).startswith(f"{verdict}: ")
