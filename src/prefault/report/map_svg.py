# SPDX-License-Identifier: Apache-2.0
"""Stage-2 tables as a picture for a browser.

One row of panels for each moment, one column for each table. A panel has a bar for each stretch of the IPA
space, and what a bar shows is coloured by access: with colours that people tell apart who do not see all of
them, blocks plain and pages striped. A table has at most ROWS bars of CELLS cells, however large the VM is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from prefault.guest.tables import leaf_size
from prefault.report.map import Kind, Part, TableMap, cells, regions
from prefault.report.map_text import describe, format_range, slots_in, summary
from prefault.report.units import round_size

ROWS = 24
CELLS = 256
REGIONS = 8

_CELL = 3
_BAR = CELLS * _CELL
_BAR_HEIGHT, _PITCH = 18, 26
_LABEL, _NAMES, _MARGIN, _LINE = 140, 90, 24, 20
_PANEL = _LABEL + _BAR + _NAMES + _MARGIN
_EMPTY_PANEL = 480
_GAP_HEIGHT = 18
_LEAST = 2.5

_ACCESS = {"RWX": "rwx", "RW-": "rw", "R-X": "rx", "R--": "r"}
"""Access → class; what is not here is ``other``. Colours: Okabe and Ito, Color Universal Design (2008)."""
_CLASS_NAMES = {
    "rwx": "read, write, execute",
    "rw": "read, write",
    "rx": "read, execute",
    "r": "read",
    "other": "other access",
}
_STYLE = """
svg { font: 13px system-ui, sans-serif; } .paper { fill: #fff; }
text { fill: #222; } .dim { fill: #666; } .head { font-weight: 600; }
.title { font-size: 16px; font-weight: 600; }
.ipa { font: 12px ui-monospace, monospace; fill: #444; }
.slot { fill: #ececec; stroke: #bbb; } .none { fill: none; stroke: #ccc; stroke-dasharray: 2 3; }
.rwx { fill: #0072b2; } .rw { fill: #56b4e9; } .rx { fill: #e69f00; } .r { fill: #f0e442; }
.other { fill: #cc79a7; }
.edge { stroke: #fff; stroke-width: 1; } .stripe { fill: #fff; fill-opacity: .45; }
.old { stroke: #000; stroke-opacity: .6; stroke-width: 1; }
@media (prefers-color-scheme: dark) {
text { fill: #e6e6e6; } .dim { fill: #9a9a9a; } .ipa { fill: #b8b8b8; }
.slot { fill: #2b2f36; stroke: #555; } .none { stroke: #4a4a4a; }
.paper { fill: #16181c; } .edge { stroke: #16181c; } .stripe { fill: #16181c; } .old { stroke: #fff; }
}
"""


@dataclass(frozen=True)
class Panel:
    """A table with its heading."""

    heading: str
    table: TableMap


@dataclass(frozen=True)
class _Bar:
    """A bar that shows [first, end) of a table."""

    first: int
    end: int
    cell: int


def svg(title: str, scenes: Sequence[Sequence[Panel]]) -> str:
    """The picture as an XML document.

    :param scenes: the panels of each moment, the canonical table first
    """
    columns = max(len(scene) for scene in scenes)
    bars = [
        _bars([scene[column].table for scene in scenes if column < len(scene)]) for column in range(columns)
    ]
    widths = [_PANEL if one else _EMPTY_PANEL for one in bars]
    root = Element("svg", xmlns="http://www.w3.org/2000/svg")
    SubElement(root, "title").text = title or "Stage-2 tables"
    SubElement(root, "style").text = _STYLE
    _patterns(SubElement(root, "defs"))
    SubElement(root, "rect", {"class": "paper"}, width="100%", height="100%")
    y = _MARGIN
    if title:
        y += _LINE
        _text(root, _MARGIN, y, title, "title")
        y += _LINE // 2
    for scene in scenes:
        y += _LINE
        y = max(
            _panel(root, _MARGIN + sum(widths[:column]), y, panel, bars[column])
            for column, panel in enumerate(scene)
        )
    width = _MARGIN + sum(widths)
    y = _legend(root, y + _LINE, width, [panel.table for scene in scenes for panel in scene])
    height = y + _MARGIN
    root.set("viewBox", f"0 0 {width} {height}")
    root.set("width", str(width))
    root.set("height", str(height))
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _bars(tables: Sequence[TableMap]) -> list[_Bar]:
    """The bars that show all of some tables: each is a table of the last level, or several if need be."""
    page_size = tables[0].page_size
    ranges = regions(tables, REGIONS)
    found = []
    for first, end in ranges:
        span = leaf_size(page_size, 2)
        while -(-(end - first) // span) > ROWS // len(ranges):
            span *= 2
        cell = max(span // CELLS, page_size)
        found += [_Bar(start, min(end, start + span), cell) for start in range(first, end, span)]
    return found


def _panel(root: Element, x: int, y: int, panel: Panel, bars: Sequence[_Bar]) -> int:
    """Draw one table; where it ends."""
    table = panel.table
    _text(root, x, y, panel.heading, "head")
    words = summary(table).split("; ")
    for half in (words[:3], words[3:]):
        y += _LINE
        _text(root, x, y, "; ".join(half), "dim")
    y += 8
    reached = 0
    for bar in bars:
        if bar.first > reached or bar is bars[0]:
            y += _GAP_HEIGHT
            gap = f"{round_size(bar.first - reached)} without memslots or leaves; then "
            _text(
                root, x + _LABEL, y - 5, f"{gap if bar.first else ''}{round_size(bar.cell)} per cell", "dim"
            )
        _draw(root, x, y, table, bar)
        y += _PITCH
        reached = bar.end
    return y


def _draw(root: Element, x: int, y: int, table: TableMap, bar: _Bar) -> None:
    """One bar with its address and its memslots."""
    _text(root, x, y + 13, f"{bar.first:#014x}", "ipa")
    left = x + _LABEL
    _text(root, left + _BAR + 10, y + 13, ", ".join(slots_in(table, bar.first, bar.end)), "dim")
    width = _cells_wide(bar.end - bar.first, bar.cell)
    _rect(root, left, y, width, _BAR_HEIGHT, "none", f"{format_range(bar.first, bar.end)}: in no memslot")
    for slot in table.slots:
        first, end = max(slot.gpa, bar.first), min(slot.gpa + slot.size, bar.end)
        if first < end:
            at = left + (first - bar.first) // bar.cell * _CELL
            wide = _cells_wide(end - first, bar.cell)
            _rect(
                root,
                at,
                y,
                wide,
                _BAR_HEIGHT,
                "slot",
                f"{format_range(first, end)}: hole in memslot {slot.name}",
            )
    at = left
    for count, part in _alike(cells(table, bar.first, bar.end, bar.cell)):
        if set(part.looks) != {None}:
            _stack(root, at, y, count * _CELL, table, part)
        at += count * _CELL
    _block_edges(root, left, y, table, bar)


def _cells_wide(size: int, cell: int) -> int:
    return max(1, -(-size // cell)) * _CELL


def _alike(row: Sequence[Part]) -> Iterator[tuple[int, Part]]:
    """Neighbouring cells that hold the same shares, as one with their number."""
    for _, group in itertools.groupby(row, key=lambda part: sorted(part.looks.items(), key=str)):
        found = list(group)
        size = sum(part.size for part in found)
        looks = {look: amount * len(found) for look, amount in found[0].looks.items()}
        yield len(found), Part(found[0].ipa, size, looks)


def _stack(root: Element, x: int, y: int, width: int, table: TableMap, part: Part) -> None:
    """What cells hold, each kind as high as its share."""
    group = SubElement(root, "g")
    SubElement(group, "title").text = _told(table, part)
    bottom = float(y + _BAR_HEIGHT)
    for look, amount in sorted(part.looks.items(), key=lambda item: str(item[0])):
        if look is None:
            continue
        height = max(_BAR_HEIGHT * amount / part.size, _LEAST)
        bottom -= height
        _rect(group, x, bottom, width, height, _class_of(look))
        if not look.block:
            _rect(group, x, bottom, width, height, "").set("fill", "url(#pages)")
        if not look.accessed:
            _rect(group, x, bottom, width, height, "").set("fill", "url(#old)")


def _told(table: TableMap, part: Part) -> str:
    """What the pointer is told."""
    held = [
        f"{table.number(look, amount):,} × {describe(look)}" if look else f"{round_size(amount)} hole"
        for look, amount in part.looks.items()
    ]
    names = ", ".join(slots_in(table, part.ipa, part.end))
    return f"{format_range(part.ipa, part.end)}: {', '.join(held)}{'; memslot ' if names else ''}{names}"


def _block_edges(root: Element, left: int, y: int, table: TableMap, bar: _Bar) -> None:
    """Lines between blocks, where they are far enough from each other."""
    for start, end, look in table.within(bar.first, bar.end):
        step = leaf_size(table.page_size, look.level) if look else 0
        if not look or not look.block or step // bar.cell < 2:
            continue
        for ipa in range(-(-start // step) * step, end, step):
            x = str(left + (ipa - bar.first) // bar.cell * _CELL)
            SubElement(root, "line", {"class": "edge"}, x1=x, x2=x, y1=str(y), y2=str(y + _BAR_HEIGHT))


def _class_of(look: Kind) -> str:
    return _ACCESS.get(look.access, "other")


def _legend(root: Element, y: int, width: int, tables: Sequence[TableMap]) -> int:
    """What the colours and patterns mean, those that were used."""
    used = {look for table in tables for look in table.looks}
    found: list[tuple[str, bool, bool, str]] = [
        (name, False, False, text)
        for name, text in _CLASS_NAMES.items()
        if name in {_class_of(look) for look in used}
    ]
    found += [("rwx", False, False, "plain: blocks")] if any(look.block for look in used) else []
    found += [("rwx", True, False, "striped: pages")] if any(not look.block for look in used) else []
    found += (
        [("rwx", False, True, "hatched: not accessed")] if any(not look.accessed for look in used) else []
    )
    found += [("slot", False, False, "hole in a memslot")] if any(table.slots for table in tables) else []
    found += [("none", False, False, "nothing")]
    x = _MARGIN
    for name, striped, hatched, text in found:
        wide = 46 + 7 * len(text)
        if x + wide > width:
            x, y = _MARGIN, y + _PITCH
        _rect(root, x, y, 24, 14, name)
        for on, pattern in ((striped, "pages"), (hatched, "old")):
            if on:
                _rect(root, x, y, 24, 14, "").set("fill", f"url(#{pattern})")
        _text(root, x + 30, y + 12, text, "")
        x += wide
    return y + 14


def _patterns(defs: Element) -> None:
    # Lines across, because cells that stand alone are lines upright.
    pages = SubElement(defs, "pattern", id="pages", width="8", height="4", patternUnits="userSpaceOnUse")
    _rect(pages, 0, 0, 8, 1, "stripe")
    old = SubElement(defs, "pattern", id="old", width="6", height="6", patternUnits="userSpaceOnUse")
    SubElement(old, "path", {"class": "old"}, d="M0 6L6 0", fill="none")


def _rect(
    parent: Element, x: float, y: float, width: float, height: float, name: str, title: str = ""
) -> Element:
    made = SubElement(parent, "rect", x=f"{x:g}", y=f"{y:g}", width=f"{width:g}", height=f"{height:g}")
    if name:
        made.set("class", name)
    if title:
        SubElement(made, "title").text = title
    return made


def _text(parent: Element, x: float, y: float, text: str, name: str) -> None:
    made = SubElement(parent, "text", x=f"{x:g}", y=f"{y:g}")
    if name:
        made.set("class", name)
    made.text = text
