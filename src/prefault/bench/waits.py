# SPDX-License-Identifier: Apache-2.0
"""``python3 -m prefault.bench.waits JSON``: how long others wait while memory is pre-faulted.

One vCPU pre-faults a large range, with one call in a thread of its own. Meanwhile this thread does one of two
things again and again, in another part of the same memslot, and takes the time of each:

- ``fault``: another vCPU touches a page that is not mapped, which is a KVM_RUN with one demand fault;
- ``invalidation``: madvise(MADV_DONTNEED) of a page that is mapped, for which KVM's notifier unmaps it.

The same is done with other work in place of the pre-fault: a program that computes, so that the other CPU
does not sleep. An emulator takes long to wake a CPU for what all have to do, such as TLB maintenance; and for
code that it has not seen, so the guest's is always the same. What it gives is time, for two things at once
take two CPUs, and the instruction counter allows for one. On an emulated machine a CPU that the host does not
run for a while looks like a wait, so the longest of each are the host's, with and without pre-faulting.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prefault.abi import ioctls
from prefault.bench.prefaulter import PreFaulter
from prefault.errors import Mismatch, PrefaultError
from prefault.guest import port
from prefault.guest.program import Argument, Marker, Program, Read
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
_OTHER_CPU = 0

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
    rounds: int = 40
    samples: int = 2000
    enough: int = 4000


@dataclass(frozen=True)
class Waits:
    """What came of it.

    :ivar kind: one of KINDS
    :ivar busy: whether memory was pre-faulted meanwhile, and not other work done
    :ivar ns: how long each time took
    """

    kind: str
    busy: bool
    ns: list[int]


@contextlib.contextmanager
def _other_work() -> Iterator[Callable[[], bool]]:
    """A block in which the other CPU computes; it is given what says whether that goes on."""
    with subprocess.Popen((sys.executable, "-S", "-c", "while True: pass")) as other:
        os.sched_setaffinity(other.pid, {_OTHER_CPU})
        try:
            yield lambda: other.poll() is None
        finally:
            other.kill()


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
        self._touch_one = Program((Read(Argument(0)), Marker(0)), CODE)
        self.vm.install(self._touch_one)
        self._pre_faulter = self.vm.create_vcpu()
        self._runner = self.vm.create_vcpu()

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
            self._runner.load(self._touch_one, (ours,))
            self._expect_marker(port.proceed(self._runner))
        once = {"fault": self._touch, "invalidation": self._forget}[kind]
        found = []
        with self._pre_faulting(gpa) if busy else _other_work() as goes_on:
            for index in range(1, self._ask.samples + 1):
                spent = once(ours + index * self._page)
                if not goes_on():
                    break
                found.append(spent)
        return found

    @contextlib.contextmanager
    def _pre_faulting(self, gpa: int) -> Iterator[Callable[[], bool]]:
        """A block in which memory is pre-faulted; it is given what says whether that goes on."""
        other = PreFaulter(self._pre_faulter, gpa, self._ask.size, _OTHER_CPU)
        other.start()
        other.ready.wait()
        yield other.is_alive
        other.finish()

    def _touch(self, gpa: int) -> int:
        """Let the other vCPU read a page."""
        self._runner.load(self._touch_one, (gpa,))
        fd = self._runner.fd
        start = _now()
        _libc.ioctl(fd, ioctls.KVM_RUN, 0)
        spent = _now() - start
        self._expect_marker(port.event_of(self._runner.last_exit()))
        return spent

    @staticmethod
    def _expect_marker(event: object) -> None:
        if event != port.AtMarker(0):
            raise Mismatch(f"the guest should be at its marker, but came to {event}")

    def _forget(self, gpa: int) -> int:
        hva = self.vm.hva_of(gpa)
        start = _now()
        result = _libc.madvise(hva, self._page, mapping.MADV_DONTNEED)
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
