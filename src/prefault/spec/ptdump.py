# SPDX-License-Identifier: Apache-2.0
"""Tables as text, as debugfs shows them.

Mirrors: arch/arm64/kvm/ptdump.c, note_page() of arch/arm64/mm/ptdump.c
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

from prefault.spec.descriptors import AF, S2AP_R, S2AP_W, TABLE, VALID, XN, Prot, executable
from prefault.spec.memory import Table
from prefault.spec.pgtable import PageTable
from prefault.spec.state import S2Mmu

_SHOWN = VALID | TABLE | S2AP_R | S2AP_W | XN | AF
_UNITS = "KMGTPE"
_EXEC = {
    Prot.PX | Prot.UX: "px ux ",
    Prot.UX: "PXNux ",
    Prot.NONE: "PXNUXN",
    Prot.PX: "px UXN",
}


def show(mmu: S2Mmu) -> str:
    """Mirrors: kvm_ptdump_guest_show()"""
    lines = []
    if mmu.shadow:
        on = "enabled" if mmu.nested_stage2_enabled else "disabled"
        lines.append(f"VTCR: {mmu.tlb_vtcr:#018x} VTTBR: {mmu.tlb_vttbr or 0:#018x} s2: {on}")
    lines.append("---[ Guest IPA ]---")
    runs = [(next(run)[0], key) for key, run in groupby(_entries(mmu.pgt), itemgetter(1, 2))]
    ends = [*(start for start, _ in runs[1:]), 1 << mmu.pgt.ia_bits]
    lines += [_row(start, end, *key) for (start, key), end in zip(runs, ends, strict=True)]
    return "\n".join(lines) + "\n"


def _entries(pgt: PageTable) -> Iterator[tuple[int, int, int]]:
    """(IPA, level, what is shown of the descriptor) of every entry that is no table."""
    for number, table in enumerate(pgt.pgd):
        yield from _of_table(pgt, table, pgt.start_level, number * pgt.granule.size(pgt.start_level - 1))


def _of_table(pgt: PageTable, table: Table, level: int, ipa: int) -> Iterator[tuple[int, int, int]]:
    size = pgt.granule.size(level)
    for index, pte in enumerate(table.entries):
        if ipa + index * size >> pgt.ia_bits:
            return
        if pgt.is_table(pte, level):
            yield from _of_table(pgt, pgt.child(pte), level + 1, ipa + index * size)
        else:
            yield ipa + index * size, level, pte & _SHOWN


def _row(start: int, end: int, level: int, pte: int) -> str:
    size, unit = end - start >> 10, 0
    while not size & 1023 and unit < len(_UNITS) - 1:
        size, unit = size >> 10, unit + 1
    return f"{start:#018x}-{end:#018x}   {size:9}{_UNITS[unit]} {level}{_attributes(pte)}"


def _attributes(pte: int) -> str:
    """Mirrors: dump_prot() with stage2_pte_bits"""
    if not pte:
        return ""
    words = (
        " " if pte & VALID else "F",
        "R" if pte & S2AP_R else " ",
        "W" if pte & S2AP_W else " ",
        _EXEC[executable(pte)],
        "AF" if pte & AF else "  ",
        "BLK" if pte & (VALID | TABLE) == VALID else "   ",
    )
    return "".join(f" {word}" for word in words)
