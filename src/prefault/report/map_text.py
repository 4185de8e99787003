# SPDX-License-Identifier: Apache-2.0
"""Stage-2 tables for a terminal: what they hold in figures, as a strip of cells, and part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prefault.report.map import Change, Kind, Look, Part, TableMap, cells, changes, parts, regions
from prefault.report.units import exact_size, format_size, plural, round_size
from prefault.spec.descriptors import LAST_LEVEL

CELL_ROWS = 2
"""A region has at most this many rows of cells."""
LIMIT = 16
"""A table is listed in at most this many parts, unless it has more memslots."""
REGIONS = 6
"""A strip shows at most this many regions of the IPA space."""

_HOLE, _MIXED = "hole", "mixed"
_GLYPHS = {
    "block, writable": ("█", "B", "blue"),
    "block, not writable": ("▒", "b", "yellow"),
    "page, writable": ("■", "W", "blue"),
    "page, not writable": ("□", "r", "yellow"),
    _MIXED: ("◧", "%", "magenta"),
    _HOLE: ("·", ".", "dim"),
}
"""What a cell is → its sign, the sign where there is only ASCII, and its colour."""


def summary(table: TableMap) -> str:
    """The table in figures, in one line."""
    found = [f"{format_size(table.page_size)} granule"]
    if table.other_sizes:
        others = " or ".join(format_size(size) for size in table.other_sizes)
        found[0] += f" (or {others}: it does not tell)"
    found.append(f"{table.ipa_bits}-bit IPA" if table.ipa_bits else "size of the IPA space unknown")
    found.append(f"start level {table.start_level}")
    found.append("tables not shown" if table.flat else plural(sum(table.tables.values()), "table"))
    if table.mapped:
        leaves = ", ".join(_leaves(level, number) for level, number in table.leaves.items())
        found.append(f"{exact_size(table.mapped)} mapped by {leaves}")
    else:
        found.append("nothing mapped")
    return "; ".join(found)


def title(table: TableMap) -> str:
    """Which table it is."""
    if not table.shadow:
        return table.name
    on = "" if table.shadow.enabled else ", L1's stage 2 off"
    return f"{table.name}, VTTBR {table.shadow.vttbr:#x}, VTCR {table.shadow.vtcr:#x}{on}"


def _leaves(level: int, number: int) -> str:
    return plural(number, "page" if level == LAST_LEVEL else f"level-{level} block")


def describe(look: Look) -> str:
    """What is there, in a few words."""
    if look is None:
        return "hole"
    what = f"level-{look.level} block" if look.block else "page"
    return f"{what} {look.access}{'' if look.accessed else ', not accessed'}"


def strip(
    table: TableMap, ranges: Sequence[tuple[int, int]], width: int, *, ascii_only: bool = False
) -> Iterator[Text]:
    """Rows of cells for some ranges: the IPA, the cells, and what a cell is."""
    room = max(8, width - len(_address(0)) - _REMARK)
    across = 1 << room.bit_length() - 1
    for first, end in ranges:
        size = cell_size(end - first, table.page_size, across * CELL_ROWS)
        found = cells(table, first, end, size)
        for start in range(0, len(found), across):
            row = found[start : start + across]
            line = Text(_address(row[0].ipa) + "  ")
            for cell in row:
                line.append(*_sign(table, cell, ascii_only))
            if start == 0:
                line.append(f"  {format_size(size)} each{_named(table, first, end)}", "dim")
            yield line


_REMARK = 30
"""Columns that a row leaves beside its cells."""


def _sign(table: TableMap, cell: Part, ascii_only: bool) -> tuple[str, str]:
    """What a cell looks like. A hole outside of all memslots is nothing."""
    what = class_of(cell)
    if what == _HOLE and table.slots and not slots_in(table, cell.ipa, cell.end):
        return " ", ""
    glyph, letter, style = _GLYPHS[what]
    return letter if ascii_only else glyph, style


def _named(table: TableMap, first: int, end: int) -> str:
    names = slots_in(table, first, end)
    return f": {', '.join(names)}" if names else ""


def slots_in(table: TableMap, first: int, end: int) -> list[str]:
    """Names of the memslots that have something of a range."""
    return [slot.name for slot in table.slots if slot.gpa < end and first < slot.gpa + slot.size]


def cell_size(size: int, page_size: int, number: int) -> int:
    """The smallest power of two, at least a page, of which ``number`` cells reach."""
    least = max(page_size, -(-size // number))
    return 1 << (least - 1).bit_length()


def class_of(part: Part) -> str:
    """What a cell is drawn as."""
    classes = {_class(look) for look in part.looks}
    return classes.pop() if len(classes) == 1 else _MIXED


def _class(look: Look) -> str:
    if look is None:
        return _HOLE
    return f"{'block' if look.block else 'page'}, {'' if look.writable else 'not '}writable"


def legend(*, ascii_only: bool = False) -> Text:
    """What the cells mean."""
    line = Text()
    for name, (glyph, letter, style) in _GLYPHS.items():
        line.append(letter if ascii_only else glyph, style)
        line.append(f" {name}   ")
    line.rstrip()
    return line


def part_table(table: TableMap, limit: int) -> Table:
    """The whole table part by part."""
    found = Table(box=None, pad_edge=False)
    found.add_column("IPA", no_wrap=True)
    for heading in ("size", "leaves"):
        found.add_column(heading, justify="right", overflow="fold")
    found.add_column("access", overflow="fold")
    if table.slots:
        found.add_column("memslot", overflow="fold")
    for part in parts(table, limit):
        hole = set(part.looks) == {None}
        looks = sorted(part.looks.items(), key=_order)
        columns = [_look_columns(table, look, size) for look, size in looks]
        row = [format_range(part.ipa, part.end), round_size(part.size)]
        row += ["\n".join(lines) for lines in zip(*columns, strict=True)]
        row += [part.slot] if table.slots else []
        found.add_row(*row, style="dim" if hole else "")
    return found


def _order(item: tuple[Look, int]) -> tuple[int, ...]:
    """Leaves by level and attributes, holes last."""
    return tuple(item[0]) if item[0] else (LAST_LEVEL + 1,)


def _look_columns(table: TableMap, look: Look, size: int) -> tuple[str, str]:
    if look is None:
        return "hole", ""
    return _leaves(look.level, table.number(look, size)), f"{look.access} {'AF' if look.accessed else '--'}"


def _address(ipa: int) -> str:
    """Twelve hexadecimal digits in groups, as wide as any IPA of 48 bits."""
    text = f"{ipa:012x}"
    return "0x" + "_".join([text[:-8], text[-8:-4], text[-4:]])


def format_range(first: int, end: int) -> str:
    """``0x0001_0000_0000-0x0001_0020_0000``; the end is the first IPA after it."""
    return f"{_address(first)}-{_address(end)}"


def change_line(before: TableMap, after: TableMap) -> str:
    """How two tables differ, in one line."""
    totals = {"mapped": 0, "unmapped": 0, "changed": 0}
    for change in changes(before, after):
        totals[_change(change)] += change.size
    said = [f"{exact_size(size)} {what}" for what, size in totals.items() if size]
    return ", ".join(said) or "nothing changed"


def _change(change: Change) -> str:
    return "mapped" if change.before is None else "unmapped" if change.after is None else "changed"


def change_table(before: TableMap, after: TableMap, limit: int) -> Table:
    """Where two tables differ; of more than ``limit`` places, the first."""
    found = Table(box=None, pad_edge=False)
    found.add_column("")
    found.add_column("IPA", no_wrap=True)
    found.add_column("size", justify="right", no_wrap=True)
    for heading in ("was", "is"):
        found.add_column(heading, overflow="fold")
    signs: Mapping[str, tuple[str, str]] = {
        "mapped": ("+", "green"),
        "unmapped": ("-", "red"),
        "changed": ("~", "yellow"),
    }
    listed = changes(before, after)
    shown = listed[:limit] if limit else listed
    for one in shown:
        sign, style = signs[_change(one)]
        row = (format_range(one.ipa, one.ipa + one.size), round_size(one.size))
        found.add_row(
            sign, *row, _counted(before, one.before, one.size), _counted(after, one.after, one.size)
        )
        found.rows[-1].style = style
    if len(shown) < len(listed):
        found.add_row("", f"and {len(listed) - len(shown):,} more places")
    return found


def _counted(table: TableMap, look: Kind | None, size: int) -> str:
    if look is None:
        return "hole"
    number = table.number(look, size)
    return f"{number:,} × {describe(look)}" if number > 1 else describe(look)


def drawing(
    table: TableMap,
    ranges: Sequence[tuple[int, int]],
    width: int,
    limit: int,
    *,
    ascii_only: bool = False,
) -> RenderableType:
    """All of one table."""
    rows = list(strip(table, ranges, width, ascii_only=ascii_only))
    return Group(Text(summary(table)), *([Text(), *rows] if rows else []), Text(), part_table(table, limit))


def shown_regions(tables: Sequence[TableMap]) -> list[tuple[int, int]]:
    """What the strips of some tables show, the same for all."""
    return regions(tables, REGIONS)
