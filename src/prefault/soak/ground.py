# SPDX-License-Identifier: Apache-2.0
"""Guest memory that is fought over, and what may be in it.

The first word of each page is the guest's to write, and it writes the page's own address. What the
host wrote before is a *stamp* there, and a pattern made from the address in the rest of the page. So
each page says where it belongs: one that is mapped at the wrong place, or that was given back to the
host and is still mapped, is seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from prefault.kvm import hugepages
from prefault.kvm.vm import Vm
from prefault.machine import FILE_CONTENTS, Backing, MemoryRegion, Resident, SlotFlags

CODE, DATA = 0x4000_0000, 0x1_0000_0000
CODE_SIZE = 4 << 20
BLOCK = 2 << 20
HOLE = 2 * BLOCK
"""Between two memslots. A slot that moves goes there."""


@dataclass(frozen=True)
class Patch:
    """One memslot and its part in the fight.

    :ivar volatile: the host may throw its pages away
    :ivar moving: the slot may be moved, deleted and made again
    :ivar logging: dirty logging may be switched
    """

    region: MemoryRegion
    volatile: bool = False
    moving: bool = False
    logging: bool = False

    @property
    def writable(self) -> bool:
        """Whether the guest may write."""
        return not self.region.flags & SlotFlags.READONLY

    @property
    def loses(self) -> bool:
        """Whether what was written can be lost: MADV_DONTNEED leaves shared memory as it is."""
        kept = self.region.backing in (Backing.SHARED, Backing.HUGETLB, Backing.GUEST_MEMFD)
        return self.moving or (self.volatile and not kept)


@dataclass
class Ground:
    """All of it, and what must be there.

    :ivar focus: the patches that are fought over just now, so that those who fight meet
    :ivar stamped: number of the last stamp
    :ivar written: gpa of pages whose word the guest has replaced for certain since then
    """

    vm: Vm
    page: int
    patches: list[Patch]
    focus: list[Patch] = field(default_factory=list)
    stamped: int = 0
    written: set[int] = field(default_factory=set)

    def set_up(self) -> None:
        """Make the memslots."""
        self.vm.set_user_memory_region(MemoryRegion(0, CODE, CODE_SIZE, resident=Resident.WRITE))
        for patch in self.patches:
            self.vm.set_user_memory_region(patch.region)

    def look_at(self, chance: random.Random) -> None:
        """Choose other patches to fight over, one at least that can be thrown away."""
        losing = [one for one in self.patches if one.loses and not one.moving]
        self.focus = [chance.choice(losing), *chance.sample(self.patches, 2)]

    def pages(self, patch: Patch) -> range:
        """gpa of each page of a patch."""
        return range(patch.region.gpa, patch.region.gpa + patch.region.size, self.page)

    def word(self, gpa: int) -> int:
        """What the host's last stamp put at the start of a page."""
        return self.stamped << 40 | gpa // self.page

    def tail(self, gpa: int) -> bytes:
        """What the host put behind that."""
        return (~gpa & (1 << 64) - 1).to_bytes(8, "little") * (self.page // 8 - 1)

    def fresh(self, patch: Patch) -> bytes:
        """A page that was thrown away, as it comes back."""
        if patch.region.backing is Backing.FILE_PRIVATE:
            return FILE_CONTENTS * (self.page // len(FILE_CONTENTS))
        return bytes(self.page)

    def stamp(self) -> None:
        """Have the host write every byte."""
        self.stamped += 1
        self.written.clear()
        for patch in self.patches:
            for gpa in self.pages(patch):
                self.vm.write_memory(gpa, self.word(gpa).to_bytes(8, "little") + self.tail(gpa))

    def contents(self, patch: Patch) -> Iterator[tuple[int, bytes]]:
        """(gpa, bytes) of each page as the host sees it."""
        data = self.vm.read_memory(patch.region.gpa, patch.region.size)
        for gpa in self.pages(patch):
            offset = gpa - patch.region.gpa
            yield gpa, data[offset : offset + self.page]


def lay_out(page: int, *, guest_memfd: bool) -> list[Patch]:
    """Memslots on every backing, with holes between them; hugetlb where its pages are small enough.

    :param guest_memfd: whether this kernel has it
    """
    unit = max(BLOCK, 64 * page)
    patches: list[Patch] = []
    gpa = DATA

    def add(backing: Backing, size: int, flags: SlotFlags = SlotFlags.NONE, **part: bool) -> None:
        nonlocal gpa
        region = MemoryRegion(len(patches) + 1, gpa, size, backing, flags=flags)
        patches.append(Patch(region, **part))
        gpa += size + HOLE

    add(Backing.PRIVATE, unit, volatile=True)
    add(Backing.PRIVATE, unit, logging=True)
    add(Backing.SHARED, unit, volatile=True, logging=True)
    add(Backing.SHARED, unit, SlotFlags.READONLY, volatile=True)
    add(Backing.THP, 2 * unit, volatile=True)
    add(Backing.THP, 2 * unit, logging=True)
    add(Backing.FILE_PRIVATE, unit, volatile=True)
    add(Backing.PRIVATE, unit // 8, volatile=True, moving=True)
    if guest_memfd:
        add(Backing.GUEST_MEMFD, unit)
    if hugepages.default_size() == BLOCK:
        add(Backing.HUGETLB, 2 * BLOCK, logging=True)
    return patches
