# SPDX-License-Identifier: Apache-2.0
"""Physical memory of the host: page frames with bytes in them, and stage-2 tables.

A frame has as many bytes as were written so far; what follows is zero. Frame numbers are never given
out twice, so that a descriptor which points to a freed frame can be told from a good one.
"""

from __future__ import annotations

from array import array

from prefault.spec.steps import Violation, actor

RAM_BASE = 0x4000_0000
"""Physical address of the first frame."""
_ARENA_ORDER = 20


class Table:
    """A page that holds descriptors.

    :ivar entries: the descriptors
    :ivar refs: as page_count(): one for whoever allocated it, and one for each entry that is not 0
    """

    __slots__ = ("entries", "pa", "refs")

    def __init__(self, pa: int, size: int) -> None:
        self.pa = pa
        self.entries = array("Q", bytes(size))
        self.refs = 1


class PhysicalMemory:
    """Frames and tables of one host.

    :ivar zero_pfn: the zero page
    """

    def __init__(self, page_shift: int) -> None:
        self.page_shift = page_shift
        self.page_size = 1 << page_shift
        self.frames: dict[int, bytearray] = {}
        self.tables: dict[int, Table] = {}
        self.freed: set[int] = set()
        self.poisoned: set[int] = set()
        self._next = {0: RAM_BASE >> page_shift}
        self.zero_pfn = self.allocate()

    def allocate(self, order: int = 0) -> int:
        """The first of 2**order frames, aligned to their number.

        Each actor has a part of the memory for itself: who came first does not show in the numbers.
        """
        count, who = 1 << order, actor()
        first = self._next.get(who) or self._next[0] + (who << _ARENA_ORDER)
        pfn = -(-first // count) * count
        self._next[who] = pfn + count
        return pfn

    def free(self, pfn: int, count: int = 1) -> None:
        """Take frames back."""
        frames, freed = self.frames, self.freed
        for one in range(pfn, pfn + count):
            frames.pop(one, None)
            freed.add(one)

    def allocate_table(self) -> Table:
        """A zeroed table. Mirrors: kvm_mmu_memory_cache_alloc()"""
        return self.allocate_tables(1)[0]

    def allocate_tables(self, count: int) -> list[Table]:
        """Adjacent tables. Mirrors: kvm_s2_zalloc_pages_exact()"""
        first = self.allocate((count - 1).bit_length()) << self.page_shift
        made = [Table(first + index * self.page_size, self.page_size) for index in range(count)]
        for table in made:
            self.tables[table.pa] = table
        return made

    def put_table(self, table: Table) -> None:
        """Drop a reference, and the table with the last one. Mirrors: kvm_s2_put_page()"""
        table.refs -= 1
        if table.refs < 0 or table.pa not in self.tables:
            raise Violation(f"table at {table.pa:#x} was put once too often")
        if not table.refs:
            if any(table.entries):
                raise Violation(f"table at {table.pa:#x} was freed with entries in it")
            del self.tables[table.pa]

    def frame(self, pfn: int) -> bytearray:
        """All bytes of a frame, to be written."""
        return self._up_to(pfn, self.page_size)

    def _up_to(self, pfn: int, size: int) -> bytearray:
        """The bytes of a frame, at least so many."""
        frame = self.frames.get(pfn)
        if frame is None:
            frame = self.frames[pfn] = bytearray(size)
        elif len(frame) < size:
            frame.extend(bytes(size - len(frame)))
        return frame

    def read(self, pa: int, size: int) -> bytes:
        """Bytes that do not cross the end of a frame."""
        frame = self.frames.get(pa >> self.page_shift)
        if frame is None:
            return bytes(size)
        offset = pa & (self.page_size - 1)
        return bytes(frame[offset : offset + size].ljust(size, b"\0"))

    def write(self, pa: int, data: bytes) -> None:
        """Write bytes that do not cross the end of a frame."""
        offset = pa & (self.page_size - 1)
        end = offset + len(data)
        self._up_to(pa >> self.page_shift, end)[offset:end] = data

    def copy(self, source: int, target: int, count: int = 1) -> None:
        """Copy frames."""
        for offset in range(count):
            frame = self.frames.get(source + offset)
            if frame is not None:
                self.frames[target + offset] = bytearray(frame)

    def identical(self, one: int, other: int) -> bool:
        """Whether two frames have the same bytes."""
        left, right = (self.frames.get(pfn, b"").ljust(self.page_size, b"\0") for pfn in (one, other))
        return left == right
