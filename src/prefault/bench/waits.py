# SPDX-License-Identifier: Apache-2.0
"""``python3 -m prefault.bench.waits JSON``: how long others wait while memory is pre-faulted.

One vCPU pre-faults a large range, with one call in a thread of its own. Meanwhile this thread does one of two
things again and again, in another part of the same memslot, and takes the time of each:

- ``fault``: another vCPU touches a page that is not mapped, which is a KVM_RUN with one demand fault;
- ``invalidation``: madvise(MADV_DONTNEED) of a page that is mapped, for which KVM's notifier unmaps it.

The same is done with nobody pre-faulting. What it gives is time, for two things at once take two CPUs, and
the instruction counter allows for one. On an emulated machine a CPU that the host does not run for a while
looks like a wait, so the longest of each are the host's, with and without pre-faulting.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass

from prefault.abi import ioctls
from prefault.bench.prefaulter import PreFaulter
from prefault.errors import Mismatch, PrefaultError
from prefault.guest import port
from prefault.guest.program import Marker, Program, Read
from prefault.kvm import mapping, open_kvm
from prefault.kvm.system import Kvm
from prefault.kvm.vm import Vm
from prefault.machine import Backing, MemoryRegion, Resident

KINDS = ("fault", "invalidation")
CODE = 0x4000_0000
_PLACES = (0x1_0000_0000, 0x3_0000_0000)
"""Where the memslot is, in turn: what moves is unmapped."""
_CODE_SIZE = 2 << 20
_OURS = 64 << 20
"""The end of the memslot, where the others are."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_now = time.monotonic_ns


@dataclass(frozen=True)
class Ask:
    """What to do.

    :ivar size: bytes that are pre-faulted
    :ivar rounds: how often, at most
    :ivar samples: at most so many in a round
    :ivar enough: no more rounds once there are so many
    """

    size: int = 512 << 20
    rounds: int = 20
    samples: int = 2000
    enough: int = 4000


@dataclass(frozen=True)
class Waits:
    """What came of it.

    :ivar kind: one of KINDS
    :ivar busy: whether memory was pre-faulted meanwhile
    :ivar ns: how long each time took
    """

    kind: str
    busy: bool
    ns: list[int]


class _Ground:
    """A VM with two vCPUs and one large memslot."""

    def __init__(self, kvm: Kvm, ask: Ask) -> None:
        self._ask = ask
        self._page = kvm.page_size
        self._place = 0
        self.vm: Vm = kvm.create_vm()
        self.vm.set_user_memory_region(MemoryRegion(0, CODE, _CODE_SIZE, resident=Resident.WRITE))
        self._slot = MemoryRegion(1, _PLACES[0], ask.size + _OURS, Backing.PRIVATE, Resident.WRITE)
        self.vm.set_user_memory_region(self._slot)
        self._programs = [self._program(index) for index in range(len(_PLACES))]
        for program in self._programs:
            self.vm.install(program)
        self._pre_faulter = self.vm.create_vcpu()
        self._runner = self.vm.create_vcpu()

    def _program(self, place: int) -> Program:
        """Touches one page after the other, and stands still after each."""
        ours = _PLACES[place] + self._ask.size
        touches = [(Read(ours + index * self._page), Marker(index)) for index in range(self._ask.samples + 1)]
        return Program(tuple(itertools.chain(*touches)), CODE + place * _CODE_SIZE // 2)

    def measure(self, kind: str, busy: bool) -> list[int]:
        """Nanoseconds of each time, over one round."""
        self._place = 1 - self._place
        gpa = _PLACES[self._place]
        self.vm.set_user_memory_region(dataclasses.replace(self._slot, gpa=gpa))
        ours = gpa + self._ask.size
        mapping.advise(self.vm.hva_of(ours), _OURS, mapping.MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE")
        if kind == "invalidation":
            self._pre_faulter.pre_fault_memory(ours, _OURS)
        else:
            # The first fault makes the tables above, too, and is no sample.
            self._runner.load(self._programs[self._place])
            self._expect(port.proceed(self._runner), 0)
        once = {"fault": self._touch, "invalidation": self._forget}[kind]
        hva = self.vm.hva_of(ours)
        other = PreFaulter(self._pre_faulter, gpa, self._ask.size, cpu=0) if busy else None
        if other:
            other.start()
            other.ready.wait()
        found = []
        for index in range(1, self._ask.samples + 1):
            spent = once(index, hva)
            if other and not other.is_alive():
                break
            found.append(spent)
        if other:
            other.finish()
        return found

    def _touch(self, index: int, _: int) -> int:
        """Let the other vCPU read the next page."""
        fd = self._runner.fd
        start = _now()
        _libc.ioctl(fd, ioctls.KVM_RUN, 0)
        spent = _now() - start
        self._expect(port.event_of(self._runner.last_exit()), index)
        return spent

    @staticmethod
    def _expect(event: object, number: int) -> None:
        if event != port.AtMarker(number):
            raise Mismatch(f"the guest should be at marker {number}, but came to {event}")

    def _forget(self, index: int, hva: int) -> int:
        start = _now()
        result = _libc.madvise(hva + index * self._page, self._page, mapping.MADV_DONTNEED)
        spent = _now() - start
        if result:
            raise PrefaultError(f"madvise(MADV_DONTNEED) failed: {os.strerror(ctypes.get_errno())}")
        return spent


def main() -> int:
    """Measure; a line of JSON for each kind, with and without."""
    ask = Ask(**json.loads(sys.argv[1]))
    os.sched_setaffinity(0, {1})
    gc.disable()
    with open_kvm() as kvm:
        ground = _Ground(kvm, ask)
        for kind in KINDS:
            for busy in (False, True):
                found: list[int] = []
                for _ in range(ask.rounds):
                    found += ground.measure(kind, busy)
                    if len(found) >= ask.enough:
                        break
                print(json.dumps(dataclasses.asdict(Waits(kind, busy, found))), flush=True)
        ground.vm.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
