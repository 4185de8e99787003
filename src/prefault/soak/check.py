# SPDX-License-Identifier: Apache-2.0
"""What must hold when everybody rests: of every byte, and of every leaf.

Source: Documentation/admin-guide/mm/pagemap.rst
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass

from prefault.guest import port
from prefault.guest.program import Argument, Marker, Program, Report, Walk
from prefault.kvm.vcpu import Vcpu
from prefault.machine import Backing, Leaf
from prefault.soak.ground import CODE, CODE_SIZE, Ground, Patch

_AREA = 0x8_0000
_MASK = (1 << 64) - 1
_END = 2

_PRESENT, _FILE, _EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56
_PFN = (1 << 55) - 1
_KPF_HUGE, _KPF_KSM, _KPF_THP, _KPF_ZERO = 1 << 17, 1 << 21, 1 << 22, 1 << 24


def contents(ground: Ground) -> Iterator[str]:
    """Compare every byte of guest memory with what may be there; a line for each page that is wrong."""
    for patch in ground.patches:
        fresh = ground.fresh(patch)
        for gpa, data in ground.contents(patch):
            word, tail = int.from_bytes(data[:8], "little"), data[8:]
            own = {gpa} if patch.writable else set()
            if gpa in ground.written:
                words, tails = {gpa}, {ground.tail(gpa)}
            else:
                words, tails = {ground.word(gpa)} | own, {ground.tail(gpa)}
            kept = word in words and tail in tails
            lost = patch.loses and tail == fresh[8:] and word in {int.from_bytes(fresh[:8], "little")} | own
            if not kept and not lost:
                yield f"{_where(patch, gpa)}: the host finds {word:#x}, {_tail(ground, gpa, tail)}"


def _where(patch: Patch, gpa: int) -> str:
    return f"slot {patch.region.slot} ({patch.region.backing.value}), gpa {gpa:#x}"


def _tail(ground: Ground, gpa: int, tail: bytes) -> str:
    if tail == ground.tail(gpa):
        return "and the rest as it was"
    return "and the rest " + ("all zero" if not any(tail) else f"of {tail[:8].hex()}…")


class Reader:
    """A guest that tells the sum of all first words, so that host and guest can be compared."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        walk = Walk(Argument(0), Argument(1), ground.page)
        write = Walk(Argument(0), Argument(1), ground.page, 1000)
        base = CODE + CODE_SIZE - 2 * _AREA
        self._read = Program((walk, Report(), Marker(_END)), base)
        self._write = Program((write, Report(), Marker(_END)), base + _AREA)
        ground.vm.install(self._read)
        ground.vm.install(self._write)

    def reads(self, vcpu: Vcpu) -> Iterator[str]:
        """Every page, as the tables are now; a line for each that is not the host's."""
        for patch in self._ground.patches:
            words = {gpa: int.from_bytes(data[:8], "little") for gpa, data in self._ground.contents(patch)}
            size = patch.region.size
            if self._sum(vcpu, self._read, patch.region.gpa, size) == sum(words.values()) & _MASK:
                continue
            for gpa, word in words.items():
                seen = self._sum(vcpu, self._read, gpa, self._ground.page)
                if seen != word:
                    yield f"{_where(patch, gpa)}: the guest reads {seen:#x}, the host {word:#x}"

    def writes(self, vcpu: Vcpu) -> Iterator[str]:
        """Let the guest write every page, and look whether the host has it."""
        for patch in self._ground.patches:
            if not patch.writable:
                continue
            self._sum(vcpu, self._write, patch.region.gpa, patch.region.size)
            for gpa, data in self._ground.contents(patch):
                word = int.from_bytes(data[:8], "little")
                if word != gpa:
                    yield f"{_where(patch, gpa)}: the guest wrote its address, the host finds {word:#x}"
            self._ground.written.update(self._ground.pages(patch))

    def _sum(self, vcpu: Vcpu, program: Program, gpa: int, size: int) -> int:
        vcpu.load(program, (gpa, size))
        event = port.proceed(vcpu)
        if not isinstance(event, port.Reported):
            return -1
        port.proceed(vcpu)
        return event.value


@dataclass(frozen=True)
class _HostPage:
    """What the host says of one page of its memory."""

    entry: int
    flags: int

    @property
    def shared(self) -> bool:
        """Whether others have it too, so that a write must break copy-on-write first."""
        return bool(self.flags & (_KPF_KSM | _KPF_ZERO)) or not self.entry & _EXCLUSIVE


class _Pagemap:
    """/proc/self/pagemap and /proc/kpageflags."""

    def __init__(self, host_page: int) -> None:
        self._map = os.open("/proc/self/pagemap", os.O_RDONLY)
        self._flags = os.open("/proc/kpageflags", os.O_RDONLY)
        self._page = host_page
        self._told = _MASK
        # Linux 6.12 says of all anonymous pages that they are KSM's, also of one that nobody lets KSM have.
        own = ctypes.create_string_buffer(b"x" * self._page)
        page = self.of(ctypes.addressof(own))
        if page and page.flags & _KPF_KSM:
            self._told &= ~_KPF_KSM

    def close(self) -> None:
        """Close both."""
        os.close(self._map)
        os.close(self._flags)

    def of(self, hva: int) -> _HostPage | None:
        """The page behind an address; None if there is none."""
        entry = int.from_bytes(os.pread(self._map, 8, hva // self._page * 8), "little")
        if not entry & _PRESENT:
            return None
        flags = int.from_bytes(os.pread(self._flags, 8, (entry & _PFN) * 8), "little")
        return _HostPage(entry, flags & self._told)


def leaves(ground: Ground, table: list[Leaf], logged: dict[int, set[int]]) -> Iterator[str]:
    """Compare every leaf of the canonical table with the host's memory; a line for each that is wrong.

    :param table: read before ``logged``
    :param logged: pages that the log of each logged slot has
    """
    pagemap = _Pagemap(ground.page)
    try:
        for leaf in table:
            for ipa in range(leaf.ipa, leaf.ipa + leaf.size, ground.page):
                wrong = _leaf(ground, pagemap, leaf, ipa, logged)
                if wrong:
                    kind = f"level {leaf.level}, {'writable' if leaf.writable else 'read-only'}"
                    yield f"leaf at ipa {ipa:#x} ({kind}): {wrong}"
    finally:
        pagemap.close()


def _leaf(ground: Ground, pagemap: _Pagemap, leaf: Leaf, ipa: int, logged: dict[int, set[int]]) -> str:
    if CODE <= ipa < CODE + CODE_SIZE:
        return ""
    patch = next((one for one in ground.patches if ipa in ground.pages(one)), None)
    if patch is None:
        return "no memslot is there"
    region = patch.region
    if leaf.writable and not patch.writable:
        return "writable in a read-only slot"
    if region.slot in logged:
        # A block from before is only split when it is written to.
        if leaf.block and leaf.writable:
            return "a writable block in a logged slot"
        if leaf.writable and (ipa - region.gpa) // ground.page not in logged[region.slot]:
            return "writable in a logged slot, and the log does not know"
    if region.backing is Backing.GUEST_MEMFD:
        return ""
    page = pagemap.of(ground.vm.hva_of(ipa))
    if page is None:
        return "the host has no page there"
    private = region.backing in (Backing.PRIVATE, Backing.THP, Backing.FILE_PRIVATE)
    if leaf.writable and private and page.shared:
        return "writable, but the host shares that page"
    if leaf.writable and region.backing is Backing.FILE_PRIVATE and page.entry & _FILE:
        return "writable, but the host has the file's page there"
    if leaf.block and not page.flags & (_KPF_THP | _KPF_HUGE):
        return "a block over a small page"
    return ""
