# SPDX-License-Identifier: Apache-2.0
"""Random programs of a VMM, as Hypothesis strategies.

A program is drawn action by action, with the slots in mind that there should be by then: most of what it does
then reaches memory, and what does not is tried as well. Three slots of up to two blocks lie within four
blocks from DATA, and addresses are drawn at their edges more often than elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from prefault.guest.program import (
    DeviceRead,
    DeviceWrite,
    EnterL2,
    Execute,
    L2Mapping,
    Marker,
    Read,
    Report,
    Step,
    Walk,
    Write,
)
from prefault.machine import GUEST_MEMORY, Access, Advice, Backing, MemoryRegion, Resident, SlotFlags
from prefault.scenarios.program import (
    BLOCK,
    PAGE,
    PAGE_CACHE,
    Action,
    Advise,
    Age,
    ChildExit,
    ChildRead,
    DirtyLog,
    Fork,
    Guest,
    HostRead,
    HostWrite,
    Merge,
    PreFault,
    Protect,
    Resume,
    SetRegion,
    Unmap,
    VmmProgram,
)
from prefault.scenarios.scenario import DATA, DEVICE

SPAN = 4 * BLOCK
FUNCTION = 0x800
"""Where in a page functions lie: what is written as data comes before, so that nobody runs data."""
_IPA = 2 * DATA
"""L2 IPA of memory that L1 moves."""
_PER_SEED = 1_000_000
"""Programs that a seed has before those of the next one begin."""

_Drawn = TypeVar("_Drawn")
Draw = Callable[[st.SearchStrategy[_Drawn]], _Drawn]

_PAGES = st.sampled_from([0, 1, 2, 511, 512, 513, 1023, 1024, 1535, 2047]) | st.integers(0, 2047)
_FIRST = st.integers(0, 1 << 32)
"""The first value of an example that is drawn after the simplest one is never the simplest."""
_SELDOM = st.sampled_from([False] * 4 + [True])
_GPA = _PAGES.map(lambda page: DATA + page * PAGE)
_FEW = st.sampled_from([1, 1, 2, 512]).map(lambda pages: pages * PAGE)
_FEW_PAGES = st.sampled_from([PAGE, 2 * PAGE])
_WIDTH = st.sampled_from([1, 2, 4, 8])
_OFFSET = st.sampled_from([0, 0, 8, 0x7F8])
_DEVICE = st.integers(0, 600).map(lambda word: DEVICE + 8 * word)
"""Beyond a page too, where an L2 has nothing."""


# Guests.


@functools.cache
def _steps(low: int, span: int) -> st.SearchStrategy[tuple[Step, ...]]:
    """What a guest does with ``[low, low+span)``, and with the device."""
    pages = span // PAGE
    gpa = (_PAGES | st.integers(0, pages - 1)).map(lambda page: low + page % pages * PAGE)
    one: st.SearchStrategy[tuple[Step, ...]] = st.one_of(
        st.builds(lambda at, offset: (Read(at + offset), Report()), gpa, _OFFSET),
        st.builds(lambda at, width: (Read(at, width), Report()), gpa, _WIDTH),
        st.builds(lambda at, offset: (Write(at + offset, at),), gpa, _OFFSET),
        st.builds(lambda at, width: (Write(at, 0x1122_3344_5566_7788, width),), gpa, _WIDTH),
        st.builds(lambda at: (Execute(at + FUNCTION),), gpa),
        st.builds(
            _walk, gpa, st.integers(1, 40), st.sampled_from([1, 2, 64]), st.sampled_from([0, 300, 1000])
        ),
        st.builds(_device_read, _DEVICE, _WIDTH, st.booleans(), st.sampled_from([32, 64])),
        st.builds(lambda at, width: (DeviceWrite(at, 0x5AA5, width),), _DEVICE, _WIDTH),
        st.builds(lambda number: (Marker(number),), st.integers(1, 9)),
    )
    return st.lists(one, min_size=1, max_size=3).map(
        lambda parts: tuple(step for part in parts for step in part)
    )


def _walk(start: int, count: int, stride: int, permille: int) -> tuple[Step, ...]:
    return Walk(start, count * stride * PAGE, stride * PAGE, permille), Report()


def _device_read(gpa: int, width: int, signed: bool, bits: int) -> tuple[Step, ...]:
    """Of the kinds that there are, the nearest one."""
    bits = 64 if width == 8 else bits
    return DeviceRead(gpa, width, signed and width * 8 < bits, bits), Report()


_STARTS = [0, BLOCK, 2 * BLOCK, 3 * PAGE, BLOCK - 2 * PAGE]
_SIZES = [BLOCK, 2 * BLOCK, 9 * PAGE, BLOCK + 5 * PAGE]
_L2_DEVICE = L2Mapping(DEVICE, DEVICE, PAGE)
_L2_MAPPINGS: list[L2Mapping] = [
    L2Mapping(DATA, DATA, SPAN, 2),
    L2Mapping(DATA, DATA, SPAN, 2),
    L2Mapping(DATA, DATA + BLOCK, BLOCK // 4, 3),
    L2Mapping(_IPA, DATA, SPAN, 2),
    L2Mapping(_IPA, DATA + BLOCK - 16 * PAGE, 80 * PAGE, 3),
    L2Mapping(DATA, DATA, SPAN, 2, writable=False),
    L2Mapping(DATA, DATA, SPAN, 2, readable=False),
    L2Mapping(DATA, DATA, SPAN, 2, executable=False),
    L2Mapping(DATA, DATA, 1 << 30, 1),
]


def _enter_l2(mapping: L2Mapping) -> st.SearchStrategy[Step]:
    span = min(mapping.size, SPAN)
    return _steps(mapping.ipa, span).map(lambda steps: EnterL2(steps, (mapping, _L2_DEVICE)))


_L2 = st.sampled_from(_L2_MAPPINGS).flatmap(_enter_l2)
_PLAIN = _steps(DATA, SPAN)


# Slots.

_REGION = st.builds(
    MemoryRegion,
    slot=st.integers(1, 3),
    gpa=st.sampled_from([0, *_STARTS]).map(lambda at: DATA + at),
    size=st.sampled_from(_SIZES),
    backing=st.sampled_from([*GUEST_MEMORY, Backing.THP, Backing.HUGETLB, Backing.PRIVATE]),
    resident=st.sampled_from(list(Resident)),
    flags=st.sampled_from([0, 0, 0, 1, 1, 2, 3]).map(SlotFlags),
    hva_offset=st.sampled_from([0, 0, 0, PAGE]),
)
_ADVICE = st.sampled_from(
    [
        *[Advice.DONTNEED] * 3,
        Advice.REMOVE,
        *(Advice.POPULATE_READ, Advice.POPULATE_WRITE, Advice.COLLAPSE, Advice.HUGEPAGE, Advice.NOHUGEPAGE),
    ]
)
_ACCESS = st.sampled_from([Access.READ, Access.WRITE, Access.WRITE, Access.NONE])
_STOP = st.sampled_from([0, 1, 1, 1, 2, 3])
_SHIFT = st.sampled_from([0] * 12 + [PAGE, PAGE, PAGE // 16])
_MANY = st.sampled_from([1, 2, 3, 17, 512, 600, 2048] * 3 + [0]).map(lambda pages: pages * PAGE)
_FLAGS = st.sampled_from([0] * 20 + [1])
_YES = st.booleans()
_BEFORE = st.just(()) | _PLAIN
_L2S = st.lists(_L2, min_size=1, max_size=2)
_MOVED = st.sampled_from([0, BLOCK, 2 * BLOCK, PAGE, 3 * PAGE]).map(lambda at: DATA + at)


def _nested(draw: Draw[object]) -> tuple[Step, ...]:
    """An L2, perhaps a second one, perhaps L1 before and after."""
    before = draw(_BEFORE)
    inside = draw(_L2S)
    after = draw(_BEFORE)
    return (*before, *inside, *after)  # type: ignore[misc]  # all are steps


class _Author:
    """Draws the actions of one program."""

    def __init__(self, draw: Draw[object], *, vcpus: int, el2: bool) -> None:
        self._draw = draw
        self._vcpu = st.integers(0, vcpus - 1)
        self._el2 = el2
        self._regions: dict[int, MemoryRegion] = {}
        self._merged = False
        often = [(self._guest, 20), (self._pre_fault, 16), (self._resume, 8), (self._advise, 10)]
        seldom = [(self._add, 6), (self._log, 6), (self._toggle_log, 4), (self._host, 4), (self._delete, 2)]
        rarely = [(self._protect, 2), (self._move, 2), (self._unmap, 1), (self._age, 2), (self._migrate, 1)]
        # Whether a page that was shared is copied or used again when it is written is for nobody to know;
        # with an L2 it can be seen, as copying empties the shadow MMUs.
        host = [] if el2 else [(self._fork, 2), (self._child_reads, 1), (self._merge, 4)]
        kinds = [kind for kind, weight in (*often, *seldom, *rarely, *host) for _ in range(weight)]
        self._kind = st.sampled_from(kinds)

    def actions(self, count: int) -> tuple[Action, ...]:
        """A first slot, and so many actions."""
        first = self._add()
        return (first, *(self._pick(self._kind)() for _ in range(count)))

    def _pick(self, strategy: st.SearchStrategy[_Drawn]) -> _Drawn:
        return self._draw(strategy)  # type: ignore[return-value]  # one draw for all types

    def _set(self, region: MemoryRegion) -> Action:
        """What KVM refuses is tried as well, and changes nothing."""
        others = [one for one in self._regions.values() if one.slot != region.slot]
        old = self._regions.get(region.slot, region)
        same = (old.size, old.backing) == (region.size, region.backing)
        if same and not any(_overlap(one, region) for one in others):
            self._regions[region.slot] = region
        return SetRegion(region)

    def _add(self) -> Action:
        region = self._pick(_REGION)
        if region.slot in self._regions and not self._pick(_SELDOM):
            return self._delete()
        if region.backing is Backing.HUGETLB and self._pick(_YES):
            region = dataclasses.replace(region, page_size=64 << 10)
        return self._set(region)

    def _gpa(self) -> int:
        return self._range()[0]

    def _range(self) -> tuple[int, int]:
        """Mostly within a slot, and at its edges more often than elsewhere."""
        size = self._pick(_FEW)
        if self._pick(_SELDOM):
            return self._pick(_GPA), size
        region = self._known()
        pages = region.size // PAGE
        at = self._pick(_PAGES) % pages * PAGE
        return region.gpa + at, min(size, region.size - at)

    def _known(self) -> MemoryRegion:
        return self._regions[self._pick(st.sampled_from(sorted(self._regions)))]

    def _delete(self) -> Action:
        gone = self._known()
        if len(self._regions) > 1:  # the last one is still aimed at
            del self._regions[gone.slot]
        return SetRegion(dataclasses.replace(gone, size=0))

    def _toggle_log(self) -> Action:
        old = self._known()
        flags = SlotFlags(old.flags ^ SlotFlags.LOG_DIRTY_PAGES)
        return self._set(dataclasses.replace(old, flags=flags))

    def _move(self) -> Action:
        return self._set(dataclasses.replace(self._known(), gpa=self._pick(_MOVED)))

    def _log(self) -> Action:
        logged = [one.slot for one in self._regions.values() if one.flags & SlotFlags.LOG_DIRTY_PAGES]
        return DirtyLog(self._pick(st.sampled_from(logged or sorted(self._regions))))

    def _advise(self) -> Action:
        (gpa, size), advice = self._range(), self._pick(_ADVICE)
        if advice is Advice.POPULATE_WRITE and self._el2:
            # Copy-on-write tells KVM of each page, which takes all shadow MMUs: half a second.
            size = min(size, 8 * PAGE)
        if (
            advice is Advice.POPULATE_READ
            and gpa // PAGE % 2
            and self._backings(gpa) == [Backing.GUEST_MEMFD]
        ):
            return Advise(gpa, size, Advice.ALLOCATE)  # which nothing else can be asked for
        if advice is Advice.COLLAPSE and self._collapsible(gpa & -BLOCK):
            return Advise(gpa & -BLOCK, BLOCK, advice)
        return Advise(gpa, size, Advice.DONTNEED if advice is Advice.COLLAPSE else advice)

    def _collapsible(self, gpa: int) -> bool:
        """Of a file, collapsing is unmapped page by page, each of which takes all shadow MMUs: minutes."""
        return all(backing not in PAGE_CACHE for backing in self._backings(gpa))

    def _backings(self, gpa: int) -> list[Backing]:
        """What is behind an address."""
        here = [one for one in self._regions.values() if one.gpa <= gpa < one.gpa + one.size]
        return [one.backing for one in here]

    def _protect(self) -> Action:
        return Protect(*self._range(), self._pick(_ACCESS))

    def _unmap(self) -> Action:
        return Unmap(*self._range())

    def _fork(self) -> Action:
        return self._pick(st.sampled_from([Fork(), Fork(), ChildExit()]))

    def _child_reads(self) -> Action:
        return ChildRead(self._gpa())

    def _merge(self) -> Action:
        """Once: KSM comes by what was merged before, too, and may find it equal to something else by then."""
        region = self._known()
        if self._merged or region.backing is not Backing.PRIVATE:
            return self._age()
        self._merged = True
        pages = self._pick(st.integers(2, 4))
        at = self._pick(_PAGES) % (region.size // PAGE - pages + 1) * PAGE
        return Merge(region.gpa + at, pages * PAGE)

    def _age(self) -> Action:
        return Age(*self._range())

    def _migrate(self) -> Action:
        """A page or two. What guest_memfd has stays where it is."""
        region = self._known()
        if region.backing is Backing.GUEST_MEMFD:
            return self._age()
        at = self._pick(_PAGES) % (region.size // PAGE - 1) * PAGE
        return Advise(region.gpa + at, self._pick(_FEW_PAGES), Advice.SOFT_OFFLINE)

    def _host(self) -> Action:
        gpa = self._gpa()
        return HostWrite(gpa) if self._pick(_YES) else HostRead(gpa)

    def _pre_fault(self) -> Action:
        gpa = self._gpa() - self._pick(_SHIFT)
        return PreFault(gpa, self._pick(_MANY), self._pick(_FLAGS), self._pick(self._vcpu))

    def _stop(self) -> int:
        """Run to the end, or leave the guest standing after so many events."""
        return self._pick(_STOP)

    def _guest(self) -> Action:
        nested = self._el2 and self._pick(_YES)
        steps = _nested(self._draw) if nested else self._pick(self._plain())
        return Guest(steps, self._pick(self._vcpu), self._stop(), self._pick(_YES))

    def _plain(self) -> st.SearchStrategy[tuple[Step, ...]]:
        """Mostly about one slot."""
        if self._pick(_SELDOM):
            return _PLAIN
        region = self._known()
        return _steps(region.gpa, region.size)

    def _resume(self) -> Action:
        return Resume(self._pick(self._vcpu), self._stop(), self._pick(_YES))


def _overlap(one: MemoryRegion, other: MemoryRegion) -> bool:
    return one.gpa < other.gpa + other.size and other.gpa < one.gpa + one.size


@st.composite
def programs(draw: Draw[object], actions: int = 25, nested: bool = True) -> VmmProgram:
    """Programs of a slot and so many actions.

    :param nested: whether vCPUs may have EL2
    """
    draw(_FIRST)
    el2 = nested and bool(draw(st.booleans()))
    e2h0 = el2 and bool(draw(st.booleans()))
    vcpus = 2 if draw(st.booleans()) else 1
    author = _Author(draw, vcpus=vcpus, el2=el2)
    return VmmProgram(author.actions(actions), vcpus, el2, e2h0)


def generate(count: int, number: int, actions: int = 25, *, nested: bool = True) -> list[VmmProgram]:
    """So many programs, the same for the same seed and the same version of Hypothesis.

    Each is drawn with a seed of its own, not as a variation of those before: no two are alike.
    """
    strategy = programs(actions, nested)
    return [_one(strategy, number * _PER_SEED + index) for index in range(count)]


def _one(strategy: st.SearchStrategy[VmmProgram], number: int) -> VmmProgram:
    found: list[VmmProgram] = []

    @seed(number)
    @settings(
        max_examples=2,  # the first is the simplest one that there is
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(program: VmmProgram) -> None:
        found.append(program)

    collect()
    return found[-1]
