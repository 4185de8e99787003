# SPDX-License-Identifier: Apache-2.0
"""Tables as debugfs prints them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import CapabilityMissing, UsageError
from prefault.kvm import stage2
from prefault.kvm.stage2 import Hole, Shadow
from prefault.machine import Leaf

# The columns of a kernel's own output; holes have a size and a level, and nothing else.
TEXT = """---[ Guest IPA ]---
0x0000000000000000-0x0000000040000000           1G 1
0x0000000040000000-0x0000000040001000           4K 3   R   px ux  AF    
0x0000000040001000-0x0000000040003000           8K 3   R W PXNUXN AF    
0x0000000040003000-0x0000000040200000        2036K 3
0x0000000040200000-0x0000000040400000           2M 2   R W PXNux  AF BLK
0x0000000040400000-0x0000000040600000           2M 2   R W px UXN    BLK
0x0000000040600000-0x0000000080000000        1018M 2 F             
"""  # noqa: W291


# What Linux 6.12 says of the same table: nothing of its end, and here it has begun a second time.
OLD_TEXT = """0x0000000040600000-0x0000000040000000   17592186044410M 1
0x0000000040000000-0x0000000040001000           4K 3   R     AF    
0x0000000040001000-0x0000000040003000           8K 3   R W X AF    
0x0000000040003000-0x0000000040200000        2036K 3
0x0000000040200000-0x0000000040400000           2M 2   R W   AF BLK
"""  # noqa: W291


def test_holes_and_invalid_entries_are_no_leaves() -> None:
    assert [hex(leaf.ipa) for leaf in stage2.parse(TEXT)] == [
        "0x40000000",
        "0x40001000",
        "0x40200000",
        "0x40400000",
    ]


def test_every_attribute_is_read() -> None:
    assert stage2.parse(TEXT) == [
        Leaf(0x4000_0000, 0x1000, 3, True, False, True, True, True, False),
        Leaf(0x4000_1000, 0x2000, 3, True, True, False, False, True, False),
        Leaf(0x4020_0000, 0x20_0000, 2, True, True, False, True, True, True),
        Leaf(0x4040_0000, 0x20_0000, 2, True, True, True, False, False, True),
    ]


def test_the_format_of_linux_6_12_is_read_as_well() -> None:
    (dump,) = stage2.read(OLD_TEXT.splitlines())
    assert dump.runs[0] == Hole(0, 0x4000_0000, 1)
    assert dump.leaves == [
        Leaf(0x4000_0000, 0x1000, 3, True, False, True, True, True, False),
        Leaf(0x4000_1000, 0x2000, 3, True, True, False, False, True, False),
        Leaf(0x4020_0000, 0x20_0000, 2, True, True, True, True, True, True),
    ]


def test_a_first_row_with_nothing_of_the_table_in_it_is_left_out() -> None:
    stray = "0x0000000040600000-0x0000000000000000   17592186043386M 2"
    assert [*stage2.read([stray, *TEXT.splitlines()[1:]])] == [*stage2.read(TEXT.splitlines())]


def test_a_dump_has_its_holes_and_ends_where_the_space_does() -> None:
    (dump,) = stage2.read(TEXT.splitlines())
    assert [run.level for run in dump.runs if isinstance(run, Hole)] == [1, 3, 2]
    assert dump.leaves == stage2.parse(TEXT)
    assert dump.end == 0x8000_0000


def test_tables_follow_each_other_in_one_text() -> None:
    shadow = "VTCR: 0x0000000080023559 VTTBR: 0x000a000040002000 s2: disabled\n"
    dumps = list(stage2.read((TEXT + "\n" + shadow + TEXT + TEXT).splitlines()))
    assert [dump.shadow for dump in dumps] == [None, Shadow(0x8002_3559, 0xA_0000_4000_2000, False), None]
    assert dumps[0].runs == dumps[1].runs == dumps[2].runs


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (lambda lines: [*lines[:3], "what is this", *lines[3:]], 4),
        (lambda lines: lines[:2] + lines[3:], 3),
        (lambda lines: lines[1:4] + lines[2:], 4),
        (lambda lines: [lines[0], lines[1].replace(" 1", " 7")], 2),
        (lambda lines: [*lines[:2], "0x0000000040000000-0x0000000000000000 4K 3"], 3),
        (lambda lines: ["\x7fELF\x02"], 1),
    ],
)
def test_what_is_no_dump_is_told_by_its_line(change: Callable[[list[str]], list[str]], number: int) -> None:
    with pytest.raises(UsageError, match=f"^file, line {number}: "):
        list(stage2.read(change(TEXT.splitlines()), "file"))


@given(cuts=st.sets(st.integers(1, 15)), gap=st.integers(0, 1))
def test_merging_is_the_same_however_a_run_was_cut(cuts: set[int], gap: int) -> None:
    edges = [0, *sorted(cuts), 16]
    pieces = [Leaf(0x1000 * start, 0x1000 * (end - start), 3) for start, end in itertools.pairwise(edges)]
    beyond = Leaf(0x1000 * (16 + gap), 0x1000, 3, writable=not gap)
    assert stage2.merge([*pieces, beyond]) == [Leaf(0, 0x1_0000, 3), beyond]


def shadow(folder: Path, index: int, text: str) -> None:
    (folder / "nested").mkdir(exist_ok=True)
    (folder / "nested" / f"nested_mmu{index}").write_text(text)


def test_shadows_in_use_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    line = "0x0000000000000000-0x0000000000001000           4K 3   R   px ux  AF\n"
    for index, start in ((10, "1"), (2, "0")):
        shadow(
            tmp_path,
            index,
            "VTCR: 0x1 VTTBR: 0x2 s2: enabled\n" + line.replace("R  ", "R W" if start == "1" else "R  "),
        )
    shadow(tmp_path, 0, "")
    assert [[leaf.writable for leaf in table] for table in stage2.shadows(tmp_path)] == [[False], [True]]


def test_a_vm_without_shadows_has_none(tmp_path: Path) -> None:
    assert stage2.shadows(tmp_path) == []


def test_a_table_that_cannot_be_read_says_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(CapabilityMissing, match="CONFIG_PTDUMP_STAGE2_DEBUGFS"):
        stage2.canonical(tmp_path)
