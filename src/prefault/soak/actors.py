# SPDX-License-Identifier: Apache-2.0
"""Those who fight: each does one thing, again and again, until its time is up.

An actor is a function that does its thing once and returns what to count it as. It raises ``Mismatch``
where the kernel answered what it must not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from prefault.errors import CapabilityMissing, Mismatch
from prefault.guest import port
from prefault.guest.program import Argument, EnterL2, L2Mapping, Marker, Program, Walk
from prefault.kvm.vcpu import Vcpu
from prefault.machine import Access, Advice, Backing, Failed, Interrupted, MemoryFault, MmioExit, SlotFlags
from prefault.soak.ground import CODE, HOLE, Ground, Patch

Act = Callable[[], str]

WRITES = (0, 300, 1000)
"""Writes per thousand, of the programs that vCPUs run."""

_END = 1
_AREA = 0x1_0000
_COMPACT = Path("/proc/sys/vm/compact_memory")
_FAIL_NTH = Path("/proc/thread-self/fail-nth")


def repeat(act: Act, until: float, counts: Counter[str]) -> None:
    """Act until the time has come."""
    while time.monotonic() < until:
        counts[act()] += 1


def _few(chance: random.Random, most: int) -> int:
    """A number of pages: mostly few, so that many things happen, and sometimes many, so that they meet."""
    return chance.randrange(1, chance.choice([8, 8, 40, most]))


@contextlib.contextmanager
def allocation_failing(number: int) -> Iterator[bool]:
    """Let the n-th allocation that this thread makes in a block of code fail, 0 for none.

    Yields whether one may: the kernel must be able to do that.
    """
    fd = -1
    if number:
        with contextlib.suppress(OSError):
            fd = os.open(_FAIL_NTH, os.O_RDWR)
    if fd < 0:
        yield False
        return
    try:
        os.pwrite(fd, str(number).encode(), 0)
        yield True
    finally:
        os.pwrite(fd, b"0", 0)
        os.close(fd)


class PreFaulter:
    """Pre-faults anywhere: in slots, across their ends, in holes."""

    def __init__(self, ground: Ground, vcpu: Vcpu, chance: random.Random) -> None:
        self._ground, self._vcpu, self._chance = ground, vcpu, chance

    def __call__(self) -> str:
        """Once."""
        ground, chance = self._ground, self._chance
        region = chance.choice(ground.focus).region
        gpa = region.gpa + chance.randrange(-8, region.size // ground.page) * ground.page
        size = _few(chance, 700) * ground.page
        nth = chance.choice([0, 0, 0, chance.randrange(1, 30)])
        with allocation_failing(nth) as injected:
            progress = self._vcpu.pre_fault_memory_once(gpa, size)
        allowed = {0, errno.EINTR, errno.EAGAIN, errno.ENOENT, errno.EFAULT}
        if progress.errno not in allowed | ({errno.ENOMEM} if injected else set()):
            raise Mismatch(f"pre-faulting {gpa:#x} {size:#x} gave {progress}")
        done = progress.gpa - gpa
        if (
            done % ground.page
            or not 0 <= done <= size
            or progress.size != size - done
            or bool(done) == bool(progress.errno)
        ):
            raise Mismatch(f"pre-faulting {gpa:#x} {size:#x} left {progress}, which cannot be")
        return f"pre-fault: {errno.errorcode.get(progress.errno, 'done')}"


class Runner:
    """Lets a guest walk parts of the memory, as L2 where vCPUs have EL2."""

    def __init__(self, ground: Ground, vcpu: Vcpu, chance: random.Random, programs: list[Program]) -> None:
        self._ground, self._vcpu, self._chance = ground, vcpu, chance
        self._programs = programs
        self._between = PreFaulter(ground, vcpu, chance)

    def __call__(self) -> str:
        """One walk."""
        ground, chance = self._ground, self._chance
        patch = chance.choice(ground.focus)
        pages = ground.pages(patch)
        first = chance.randrange(len(pages))
        count = min(_few(chance, 200), len(pages) - first)
        which = chance.randrange(len(self._programs))
        self._vcpu.load(self._programs[which], (pages[first], count * ground.page))
        if not self._finish():
            return "walk: disturbed"
        if WRITES[which % len(WRITES)] == 1000 and patch.writable and not patch.loses:
            ground.written.update(pages[first : first + count])
        return "walk"

    def _finish(self) -> bool:
        """Run to the end; False if some access met no memory."""
        whole = True
        while (event := port.proceed(self._vcpu)) != port.AtMarker(_END):
            if isinstance(event, MmioExit):
                # A slot that is gone just now, or one that is read-only.
                whole = False
                if not event.is_write:
                    self._vcpu.complete_mmio(0)
                if self._chance.random() < 0.05:
                    self._between()
            elif isinstance(event, Failed | MemoryFault) and event.errno == errno.EFAULT:
                time.sleep(0.001)  # The host may not access its memory just now.
            elif not isinstance(event, Interrupted):
                raise Mismatch(f"a walk came to {event}")
        return whole


def programs(ground: Ground, nested: bool) -> list[Program]:
    """A walk for each share of writes; for nested guests also as L2, by pages and by blocks."""
    walks = [Walk(Argument(0), Argument(1), ground.page, permille) for permille in WRITES]
    bodies = [(walk, Marker(_END)) for walk in walks]
    if nested:
        mappings = tuple(_mapped(patch) for patch in ground.patches)
        bodies += [(EnterL2((walk,), mappings), Marker(_END)) for walk in walks]  # type: ignore[misc]
    return [Program(body, CODE + number * 8 * _AREA) for number, body in enumerate(bodies)]


def _mapped(patch: Patch) -> L2Mapping:
    region = patch.region
    level = 2 if not region.size % (2 << 20) and not region.gpa % (2 << 20) else 3
    return L2Mapping(region.gpa, region.gpa, region.size, level)


_ADVICE = (
    *(Advice.HUGEPAGE, Advice.NOHUGEPAGE, Advice.COLLAPSE),
    *(Advice.POPULATE_READ, Advice.POPULATE_WRITE),
)


class Host:
    """Does to its memory what a host does. What must stay, stays."""

    def __init__(self, ground: Ground, chance: random.Random, pause: float) -> None:
        self._ground, self._chance, self._pause = ground, chance, pause

    def __call__(self) -> str:
        """One thing."""
        time.sleep(self._pause)
        what = self._chance.choices(
            [self._throw_away, self._advise, self._protect, self._fork, self._compact, self._merge],
            [60, 25, 10, 3, 1, 2],
        )[0]
        return what()

    def _part(self, patch: Patch) -> tuple[int, int]:
        pages = self._ground.pages(patch)
        first = self._chance.randrange(len(pages))
        count = min(_few(self._chance, 600), len(pages) - first)
        return pages[first], count * self._ground.page

    def _choose(self, *, volatile: bool = False) -> Patch:
        able = [
            one
            for one in self._ground.focus
            if not one.moving
            and one.region.backing not in (Backing.GUEST_MEMFD, Backing.HUGETLB)
            and (one.volatile or not volatile)
        ]
        return self._chance.choice(able)

    def _throw_away(self) -> str:
        gpa, size = self._part(self._choose(volatile=True))
        self._ground.vm.advise(gpa, size, Advice.DONTNEED)
        return "MADV_DONTNEED"

    def _advise(self) -> str:
        gpa, size = self._part(self._choose())
        advice = self._chance.choice(_ADVICE)
        try:
            self._ground.vm.advise(gpa, size, advice)
        except CapabilityMissing:
            return f"MADV_{advice.name}: declined"
        return f"MADV_{advice.name}"

    def _protect(self) -> str:
        gpa, size = self._part(self._choose())
        self._ground.vm.protect(gpa, size, self._chance.choice([Access.NONE, Access.READ]))
        time.sleep(0.002)
        self._ground.vm.protect(gpa, size, Access.WRITE)
        return "mprotect"

    def _fork(self) -> str:
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        return "fork"

    def _compact(self) -> str:
        _COMPACT.write_text("1")
        return "compaction"

    def _merge(self) -> str:
        gpa, size = self._part(self._choose())
        self._ground.vm.advise(gpa, size, Advice.MERGEABLE)
        return "MADV_MERGEABLE"


class Slots:
    """Switches dirty logging, moves slots, deletes them and makes them again."""

    def __init__(self, ground: Ground, chance: random.Random, pause: float) -> None:
        self._ground, self._chance, self._pause = ground, chance, pause
        self._logged: set[int] = set()

    def __call__(self) -> str:
        """One thing."""
        time.sleep(self._pause)
        able = [one for one in self._ground.patches if one.moving or one.logging]
        patch = self._chance.choice(able)
        return self._move(patch) if patch.moving else self._log(patch)

    def _log(self, patch: Patch) -> str:
        vm, slot = self._ground.vm, patch.region.slot
        if slot not in self._logged:
            vm.set_user_memory_region(dataclasses.replace(patch.region, flags=SlotFlags.LOG_DIRTY_PAGES))
            self._logged.add(slot)
            return "dirty logging on"
        if self._chance.random() < 0.6:
            vm.get_dirty_log(slot)
            return "dirty log read"
        vm.set_user_memory_region(patch.region)
        self._logged.discard(slot)
        return "dirty logging off"

    def _move(self, patch: Patch) -> str:
        vm, region = self._ground.vm, patch.region
        away = dataclasses.replace(region, gpa=region.gpa + HOLE // 2)
        if self._chance.random() < 0.5:
            vm.set_user_memory_region(away)
            time.sleep(0.001)
            vm.set_user_memory_region(region)
            return "slot moved"
        vm.set_user_memory_region(dataclasses.replace(region, size=0))
        time.sleep(0.001)
        vm.set_user_memory_region(region)
        return "slot deleted"

    def rest(self) -> dict[int, set[int]]:
        """The pages of each logged slot that the log has now; logging stays on."""
        vm = self._ground.vm
        return {slot: set(vm.get_dirty_log(slot)) for slot in self._logged}


class Interrupter:
    """Sends signals to threads that are in the kernel."""

    def __init__(self, threads: list[int], chance: random.Random) -> None:
        self._threads, self._chance = threads, chance

    def __call__(self) -> str:
        """One signal."""
        time.sleep(self._chance.random() * 0.01)
        there = list(self._threads)  # They come and go, those who have ended among them.
        if there:
            with contextlib.suppress(ProcessLookupError):
                signal.pthread_kill(self._chance.choice(there), signal.SIGUSR1)
        return "signal"


def here() -> int:
    """The calling thread, for ``Interrupter``."""
    return threading.get_ident()
