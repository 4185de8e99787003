# SPDX-License-Identifier: Apache-2.0
"""Stage-2 tables: walk, map, unmap and change permissions.

Functions return 0 or a negative errno, as in the kernel. Callers hold the mmu_lock: for reading
where others may change descriptors at the same time (``map``, ``relax_perms``, ``mkyoung``), for
writing elsewhere.

Break-before-make and the reference counts are checked wherever a descriptor is written; ``check``
looks at a whole table.

Mirrors: arch/arm64/kvm/hyp/pgtable.c
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

from prefault.spec import descriptors
from prefault.spec.descriptors import (
    AF,
    LAST_LEVEL,
    LOCKED,
    PERMS,
    S2AP_R,
    S2AP_W,
    TABLE,
    VALID,
    XN,
    Granule,
    Prot,
)
from prefault.spec.memory import PhysicalMemory, Table
from prefault.spec.steps import Violation, step
from prefault.spec.tlb import Tlb

_IS_TABLE = VALID | TABLE
_MAY_CHANGE_LIVE = PERMS | AF | descriptors.SW

Allocate = Callable[[], Table]
"""Takes a zeroed table from a cache that was filled beforehand."""

Visit = Callable[[Table, int, int, int], None]
"""Called with a table, an index, a level and the first IPA of the entry within the range."""


class PageTable:
    """A stage-2 table. Mirrors: struct kvm_pgtable

    :ivar ia_bits: size of the IPA space
    :ivar start_level: where the walk begins
    :ivar pgd: the tables of the start level, concatenated
    """

    def __init__(self, memory: PhysicalMemory, granule: Granule, ia_bits: int) -> None:
        self.memory = memory
        self.granule = granule
        self.ia_bits = ia_bits
        self.start_level = granule.start_level(ia_bits)
        self.tlb = Tlb(granule.page_shift)
        self._pgd_shift = granule.shift(self.start_level - 1)
        self.pgd = memory.allocate_tables(((1 << ia_bits) - 1 >> self._pgd_shift) + 1)
        # Tables lie below 2**48, where the address is in the same place in every format.
        self._address = (1 << 48) - granule.page_size
        self._attributes: dict[int, int] = {}
        self._shifts = {level: granule.shift(level) for level in range(self.start_level, LAST_LEVEL + 1)}
        self._levels = tuple(self._shifts.items())

    # Looking.

    def get_leaf(self, ipa: int) -> tuple[int, int]:
        """The entry at which the walk stops, and its level. Mirrors: kvm_pgtable_get_leaf()

        :raises ValueError: beyond the IPA space
        """
        table, index, level = self.find(ipa)
        return table.entries[index], level

    def find(self, ipa: int) -> tuple[Table, int, int]:
        """Where the walk stops: an entry that is no table."""
        if ipa >> self.ia_bits:
            raise ValueError(f"ipa {ipa:#x} is beyond {self.ia_bits} bits")
        table = self.pgd[ipa >> self._pgd_shift]
        mask, tables, address = self.granule.mask, self.memory.tables, self._address
        for level, shift in self._levels:
            index = ipa >> shift & mask
            pte = table.entries[index]
            if pte & _IS_TABLE != _IS_TABLE or level == LAST_LEVEL:
                break
            table = tables[pte & address]
        return table, index, level

    def leaves(self) -> Iterator[tuple[int, int, int]]:
        """(IPA, level, descriptor) of every valid leaf, by IPA."""
        for number, table in enumerate(self.pgd):
            yield from self._leaves(table, self.start_level, number << self._pgd_shift)

    def _leaves(self, table: Table, level: int, ipa: int) -> Iterator[tuple[int, int, int]]:
        size = self.granule.size(level)
        for index, pte in enumerate(table.entries) if table.refs > 1 else ():
            if not pte:
                continue
            if self.is_table(pte, level):
                yield from self._leaves(self.child(pte), level + 1, ipa + index * size)
            elif pte & VALID:
                yield ipa + index * size, level, pte

    @staticmethod
    def is_table(pte: int, level: int) -> bool:
        """Mirrors: kvm_pte_table()"""
        return pte & _IS_TABLE == _IS_TABLE and level != LAST_LEVEL

    def child(self, pte: int) -> Table:
        """Mirrors: kvm_pte_follow()"""
        return self.memory.tables[pte & self._address]

    # Writing one entry.

    def _set(self, table: Table, index: int, pte: int) -> None:
        """Write an entry, holding the writer to break-before-make."""
        old = table.entries[index]
        if old & VALID and pte & VALID and (old ^ pte) & ~_MAY_CHANGE_LIVE:
            raise Violation(
                f"break-before-make: {old:#x} became {pte:#x} at {table.pa + 8 * index:#x} without "
                "an invalid descriptor and a TLB invalidation between"
            )
        table.entries[index] = pte

    def _try_break(self, table: Table, index: int, old: int, level: int, ipa: int) -> bool:
        """Mirrors: stage2_try_break_pte()"""
        step("pte.break")
        if old & (LOCKED | VALID) == LOCKED or table.entries[index] != old:
            return False
        table.entries[index] = LOCKED
        if old & VALID:
            size = self.granule.size(level)
            self.tlb.flush_range(ipa & -size, size)
        if old:
            table.refs -= 1
        return True

    def _make(self, table: Table, index: int, pte: int) -> None:
        """Mirrors: stage2_make_pte()"""
        if table.entries[index] != LOCKED:
            raise Violation(
                f"{pte:#x} was made at {table.pa + 8 * index:#x} over an entry that was not broken"
            )
        table.refs += 1
        table.entries[index] = pte

    # Mapping.

    def attributes(self, prot: int) -> int:
        """Mirrors: stage2_set_prot_attr()"""
        attr = self._attributes.get(prot)
        if attr is None:
            attr = self._attributes[prot] = self.granule.attributes(prot)
        return attr

    def map(self, ipa: int, size: int, phys: int, prot: int, allocate: Allocate | None) -> int:
        """Mirrors: kvm_pgtable_stage2_map()"""
        end = ipa + size
        if end > 1 << self.ia_bits:
            return -errno.ERANGE
        attr = self.attributes(prot)
        while ipa < end:
            level = LAST_LEVEL if size == self.granule.page_size else self._leaf_level(ipa, end, phys)
            ret = self._map_leaf(ipa, level, self.granule.leaf(phys, attr, level), allocate)
            if ret:
                return ret
            span = self.granule.size(level)
            ipa, phys = ipa + span, phys + span
        return 0

    def _leaf_level(self, ipa: int, end: int, phys: int) -> int:
        """The first level at which the walk may put a leaf. Mirrors: kvm_block_mapping_supported()"""
        for level in range(max(self.start_level, self.granule.min_block_level), LAST_LEVEL):
            size = self.granule.size(level)
            if size <= end - ipa and not (ipa | phys) & (size - 1):
                return level
        return LAST_LEVEL

    def _map_leaf(self, ipa: int, target: int, pte: int, allocate: Allocate | None) -> int:
        """Mirrors: stage2_map_walker()"""
        mask, shifts = self.granule.mask, self._shifts
        table, level = self.pgd[ipa >> self._pgd_shift], self.start_level
        while level < target:
            index = ipa >> shifts[level] & mask
            old = table.entries[index]
            if old & _IS_TABLE == _IS_TABLE:
                table = self.memory.tables[old & self._address]
            else:
                below = self._map_table(table, index, old, level, ipa, allocate)
                if isinstance(below, int):
                    return below
                table = below
            level += 1
        return self._map_try_leaf(table, ipa >> shifts[level] & mask, level, ipa, pte)

    def _map_table(
        self, table: Table, index: int, old: int, level: int, ipa: int, allocate: Allocate | None
    ) -> Table | int:
        """Put a table where none is; a block there is left to be mapped again lazily.

        Mirrors: stage2_map_walk_leaf()
        """
        if allocate is None:
            return -errno.ENOMEM
        below = allocate()
        if not self._try_break(table, index, old, level, ipa):
            self.memory.put_table(below)
            return -errno.EAGAIN
        self._make(table, index, self.granule.to_pte(below.pa) | _IS_TABLE)
        return below

    def _map_try_leaf(self, table: Table, index: int, level: int, ipa: int, new: int) -> int:
        """Mirrors: stage2_map_walker_try_leaf(), stage2_map_walk_table_pre()"""
        old = table.entries[index]
        if old & VALID and not (old ^ new) & ~PERMS:
            return -errno.EAGAIN
        if not self._try_break(table, index, old, level, ipa):
            return -errno.EAGAIN
        self._make(table, index, new)
        if self.is_table(old, level):
            self.free_unlinked(self.child(old), level + 1)
        return 0

    def free_unlinked(self, table: Table, level: int) -> None:
        """Take down a table that no entry leads to. Mirrors: kvm_pgtable_stage2_free_unlinked()"""
        for index, pte in enumerate(table.entries):
            if pte:
                table.entries[index] = 0
                table.refs -= 1
                if self.is_table(pte, level):
                    self.free_unlinked(self.child(pte), level + 1)
        self.memory.put_table(table)

    # Ranges.

    def _walk(self, ipa: int, size: int, leaf: Visit, post: Visit | None = None) -> int:
        """Visit what is not 0, tables after what they hold. Mirrors: kvm_pgtable_walk()"""
        end = ipa + size
        if end > 1 << self.ia_bits:
            return -errno.ERANGE
        while ipa < end:
            next_ = min(end, (ipa >> self._pgd_shift) + 1 << self._pgd_shift)
            self._walk_table(self.pgd[ipa >> self._pgd_shift], self.start_level, ipa, next_, leaf, post)
            ipa = next_
        return 0

    def _walk_table(
        self, table: Table, level: int, ipa: int, end: int, leaf: Visit, post: Visit | None
    ) -> None:
        shift, mask, entries = self._shifts[level], self.granule.mask, table.entries
        for number in range(ipa >> shift, (end - 1 >> shift) + 1):
            pte = entries[number & mask]
            if not pte:
                continue
            start = max(ipa, number << shift)
            if self.is_table(pte, level):
                next_ = min(end, number + 1 << shift)
                self._walk_table(self.child(pte), level + 1, start, next_, leaf, post)
                if post:
                    post(table, number & mask, level, start)
            else:
                leaf(table, number & mask, level, start)

    def unmap(self, ipa: int, size: int) -> int:
        """Mirrors: kvm_pgtable_stage2_unmap()"""
        ret = self._walk(ipa, size, self._unmap_leaf, self._unmap_table)
        self.tlb.flush_range(ipa, size)
        return ret

    def _unmap_leaf(self, table: Table, index: int, level: int, ipa: int) -> None:
        """Mirrors: stage2_unmap_walker(), for a leaf; a block goes as a whole"""
        table.entries[index] = 0
        table.refs -= 1
        # The flush of the range does not reach the rest of a block.
        if level < LAST_LEVEL:
            size = self.granule.size(level)
            self.tlb.flush_range(ipa & -size, size)

    def _unmap_table(self, table: Table, index: int, level: int, ipa: int) -> None:
        """Mirrors: stage2_unmap_walker(), for a table"""
        below = self.child(table.entries[index])
        if below.refs == 1:
            table.entries[index] = 0
            table.refs -= 1
            self.memory.put_table(below)

    def wrprotect(self, ipa: int, size: int) -> int:
        """Mirrors: kvm_pgtable_stage2_wrprotect(); the caller invalidates the TLB"""
        return self._walk(ipa, size, self._wrprotect_leaf)

    def _wrprotect_leaf(self, table: Table, index: int, level: int, ipa: int) -> None:
        if table.entries[index] & VALID:
            self._set(table, index, table.entries[index] & ~S2AP_W)

    def test_clear_young(self, ipa: int, size: int, *, mkold: bool) -> bool:
        """Whether something was young; the caller invalidates the TLB.

        Mirrors: kvm_pgtable_stage2_test_clear_young()
        """
        young = False

        def age(table: Table, index: int, level: int, at: int) -> None:
            nonlocal young
            pte = table.entries[index]
            if pte & VALID and pte & AF:
                young = True
                if mkold:
                    self._set(table, index, pte & ~AF)

        self._walk(ipa, size, age)
        return young

    # One leaf.

    def _update_leaf(self, ipa: int, set_: int, clear: int) -> int:
        """Mirrors: stage2_update_leaf_attrs() for one page"""
        table, index, _ = self.find(ipa)
        old = table.entries[index]
        if not old & VALID:
            return -errno.EAGAIN
        step("pte.update")
        if table.entries[index] != old:
            return -errno.EAGAIN
        self._set(table, index, old & ~clear | set_)
        return 0

    def mkyoung(self, ipa: int) -> None:
        """Mirrors: kvm_pgtable_stage2_mkyoung()"""
        self._update_leaf(ipa, AF, 0)

    def relax_perms(self, ipa: int, prot: int) -> int:
        """Mirrors: kvm_pgtable_stage2_relax_perms()"""
        set_ = (S2AP_R if prot & Prot.R else 0) | (S2AP_W if prot & Prot.W else 0)
        clear = 0
        if prot & Prot.X:
            set_ |= descriptors.xn(prot)
            clear = XN & ~descriptors.xn(prot)
        ret = self._update_leaf(ipa, set_, clear)
        size = self.granule.size(self.get_leaf(ipa)[1])
        self.tlb.flush_range(ipa & -size, size)
        return ret

    def split(self, ipa: int, size: int, allocate: Allocate) -> int:
        """Replace blocks by tables of pages. Mirrors: kvm_pgtable_stage2_split()"""
        blocks: list[tuple[Table, int, int, int]] = []
        ret = self._walk(ipa, size, lambda *where: blocks.append(where))
        for table, index, level, at in blocks:
            pte = table.entries[index]
            if level == LAST_LEVEL or not pte & VALID:
                continue
            below = self._create_unlinked(pte, level, allocate)
            if not self._try_break(table, index, pte, level, at):
                self.free_unlinked(below, level + 1)
                return -errno.EAGAIN
            self._make(table, index, self.granule.to_pte(below.pa) | _IS_TABLE)
        return ret

    def _create_unlinked(self, pte: int, level: int, allocate: Allocate) -> Table:
        """Mirrors: kvm_pgtable_stage2_create_unlinked()"""
        table = allocate()
        phys, size = self.granule.to_phys(pte), self.granule.size(level + 1)
        prot = (pte & descriptors.SW) | descriptors.executable(pte)
        prot |= (Prot.R if pte & S2AP_R else 0) | (Prot.W if pte & S2AP_W else 0)
        attr = self.attributes(prot)
        for index in range(self.granule.mask + 1):
            leaf = self.granule.leaf(phys + index * size, attr, level + 1)
            if level + 1 < LAST_LEVEL:
                below = self._create_unlinked(leaf, level + 1, allocate)
                leaf = self.granule.to_pte(below.pa) | _IS_TABLE
            table.entries[index] = leaf
            table.refs += 1
        return table

    # The end, and invariants.

    def destroy(self) -> None:
        """Mirrors: kvm_pgtable_stage2_destroy_range(), kvm_pgtable_stage2_destroy_pgd()"""
        for table in self.pgd:
            self.free_unlinked(table, self.start_level)
        self.pgd = []

    def check(self) -> set[int]:
        """Reference counts are right and no entry is left broken; addresses of all tables.

        :raises Violation: they are not
        """
        seen: set[int] = set()
        for table in self.pgd:
            self._check_table(table, self.start_level, seen)
        return seen

    def _check_table(self, table: Table, level: int, seen: set[int]) -> None:
        if table.pa in seen:
            raise Violation(f"two entries lead to the table at {table.pa:#x}")
        seen.add(table.pa)
        used = sum(1 for pte in table.entries if pte)
        if table.refs != used + 1:
            raise Violation(f"table at {table.pa:#x} has {used} entries, but {table.refs} references")
        for pte in table.entries:
            if pte and not pte & VALID:
                raise Violation(f"{pte:#x} was broken and never made in the table at {table.pa:#x}")
            if self.is_table(pte, level):
                self._check_table(self.child(pte), level + 1, seen)
