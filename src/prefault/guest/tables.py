# SPDX-License-Identifier: Apache-2.0
"""The stage-2 tables that an L1 makes for its L2, as bytes in L1's memory.

39 bits of IPA for every granule, so that the first level is one table and nothing is concatenated.

Source: Arm ARM (DDI 0487), D8.2 "Translation process", D8.3 "Translation table descriptor formats"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from prefault.errors import UsageError
from prefault.guest.program import L2Mapping

IPA_BITS = 39

_START_LEVEL = {0x1000: 1, 0x4000: 1, 0x1_0000: 2}
_SL0 = {0x1000: 1, 0x4000: 2, 0x1_0000: 1}
_TG0 = {0x1000: 0, 0x4000: 2, 0x1_0000: 1}
_TLBI_TG = {0x1000: 1, 0x4000: 2, 0x1_0000: 3}
_FIRST_BLOCK_LEVEL = {0x1000: 1, 0x4000: 2, 0x1_0000: 2}

_VTCR_RES1 = 1 << 31
_VTCR_CACHEABLE = 3 << 12 | 1 << 10 | 1 << 8
_TABLE = 0b11
_PAGE = 0b11
_BLOCK = 0b01
_NORMAL_WB = 0xF << 2
_S2AP_READ = 1 << 6
_S2AP_WRITE = 1 << 7
_INNER_SHAREABLE = 3 << 8
_ACCESSED = 1 << 10
_XN = 2 << 53


def check_granule(page_size: int) -> None:
    """Refuse what is not a granule."""
    if page_size not in _START_LEVEL:
        raise UsageError(f"page size {page_size:#x} is not a granule; use 0x1000, 0x4000 or 0x10000")


def leaf_size(page_size: int, level: int) -> int:
    """Bytes that a leaf of ``level`` maps with a granule."""
    shift = page_size.bit_length() - 1
    return 1 << (shift + (3 - level) * (shift - 3))


def tlbi_ipa(page_size: int, ipa: int, level: int) -> int:
    """The operand of TLBI IPAS2E1. Source: Arm ARM (DDI 0487), C5.5 "TLB maintenance instructions" """
    hint = _TLBI_TG[page_size] << 46 | level << 44 if level else 0
    return hint | ipa >> 12


def tlbi_range(page_size: int, ipa: int, size: int) -> int:
    """The operand of TLBI RIPAS2E1.

    :raises UsageError: no range has this size
    """
    for scale in range(4):
        number, rest = divmod(size, page_size << 5 * scale + 1)
        if not rest and 1 <= number <= 32:
            return _TLBI_TG[page_size] << 46 | scale << 44 | number - 1 << 39 | ipa // page_size
    raise UsageError(
        f"a TLBI has no range of {size:#x} bytes: it is 1 to 32 times 2, 64, 2048 or 65536 pages"
    )


@dataclass
class Stage2Builder:
    """Builds one stage-2 table whose tables lie one after the other from ``base``, the root first.

    :ivar page_size: the granule
    :ivar base: L1 IPA of the root
    """

    page_size: int
    base: int
    _tables: list[dict[int, int]] = field(default_factory=lambda: [{}])
    _ps: int = 2
    """VTCR_EL2.PS: 2 for output addresses of 40 bits, 5 for 48."""

    def map(self, mapping: L2Mapping) -> None:
        """Add leaves."""
        self._check(mapping)
        step = leaf_size(self.page_size, mapping.level)
        for offset in range(0, mapping.size, step):
            self._set(mapping.ipa + offset, mapping.level, _leaf(mapping, mapping.gpa + offset))
        if mapping.gpa + mapping.size > 1 << 40:
            self._ps = 5

    @property
    def vtcr(self) -> int:
        """The value of VTCR_EL2 that fits the tables."""
        shape = _TG0[self.page_size] << 14 | _SL0[self.page_size] << 6 | (64 - IPA_BITS)
        return _VTCR_RES1 | self._ps << 16 | _VTCR_CACHEABLE | shape

    def finish(self) -> bytes:
        """All tables."""
        data = bytearray(self.page_size * len(self._tables))
        for number, table in enumerate(self._tables):
            for index, descriptor in table.items():
                at = number * self.page_size + 8 * index
                data[at : at + 8] = descriptor.to_bytes(8, "little")
        return bytes(data)

    def _check(self, mapping: L2Mapping) -> None:
        if not _FIRST_BLOCK_LEVEL[self.page_size] <= mapping.level <= 3:
            raise UsageError(
                f"L2Mapping: a granule of {self.page_size:#x} has no leaves at level {mapping.level}"
            )
        step = leaf_size(self.page_size, mapping.level)
        for name, value in (("ipa", mapping.ipa), ("gpa", mapping.gpa), ("size", mapping.size)):
            if value % step:
                raise UsageError(f"L2Mapping: {name} {value:#x} is not a multiple of {step:#x}")
        if mapping.ipa + mapping.size > 1 << IPA_BITS:
            raise UsageError(f"L2Mapping: ipa {mapping.ipa:#x} is beyond {IPA_BITS} bits")

    def _set(self, ipa: int, level: int, descriptor: int) -> None:
        table = 0
        for above in range(_START_LEVEL[self.page_size], level):
            table = self._below(table, self._index(ipa, above), ipa)
        entries, index = self._tables[table], self._index(ipa, level)
        if index in entries:
            raise UsageError(f"L2Mapping: ipa {ipa:#x} is mapped twice; the port or code may be there")
        entries[index] = descriptor

    def _below(self, table: int, index: int, ipa: int) -> int:
        entries = self._tables[table]
        if index not in entries:
            entries[index] = self.base + self.page_size * len(self._tables) | _TABLE
            self._tables.append({})
        if entries[index] & 3 != _TABLE:
            raise UsageError(f"L2Mapping: ipa {ipa:#x} is mapped twice, by a block and below it")
        return ((entries[index] & ~_TABLE) - self.base) // self.page_size

    def _index(self, ipa: int, level: int) -> int:
        return (ipa // leaf_size(self.page_size, level)) % (self.page_size // 8)


def _leaf(mapping: L2Mapping, gpa: int) -> int:
    permissions = (
        mapping.readable * _S2AP_READ | mapping.writable * _S2AP_WRITE | (not mapping.executable) * _XN
    )
    kind = _PAGE if mapping.level == 3 else _BLOCK
    return gpa | permissions | _ACCESSED | _INNER_SHAREABLE | _NORMAL_WB | kind


def identity(mappings: Sequence[L2Mapping], ipa: int, size: int, page_size: int) -> list[L2Mapping]:
    """One-to-one mappings for the pages of a range that ``mappings`` do not have already."""
    missing = []
    for page in range(ipa, ipa + size, page_size):
        covering = [one for one in mappings if one.ipa <= page < one.ipa + one.size]
        if not covering:
            missing.append(L2Mapping(page, page, page_size))
        elif covering[0].gpa - covering[0].ipa:
            raise UsageError(
                f"L2Mapping: ipa {page:#x} is needed one to one for the program itself, "
                f"but is mapped to {covering[0].gpa + page - covering[0].ipa:#x}"
            )
    return missing
