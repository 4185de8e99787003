# SPDX-License-Identifier: Apache-2.0
"""``python3 -m prefault.bench.pairs JSON``: what a second vCPU brings when memory is pre-faulted.

The same resident memory is pre-faulted by one vCPU, by two with a half each, and by two that both do all of
it, each in a thread on a CPU of its own. What it gives is time, of which only ratios in the same run mean
something; or, where the clock counts instructions, what all did together on the one CPU that there is then.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import threading
from dataclasses import dataclass

from prefault.bench.prefaulter import PreFaulter
from prefault.kvm import open_kvm
from prefault.kvm.system import Kvm
from prefault.machine import Backing, MemoryRegion, Resident

WAYS = ("one", "halves", "both all")
_PLACES = (0x1_0000_0000, 0x3_0000_0000)
"""Where the memslot is, in turn: what moves is unmapped."""


@dataclass(frozen=True)
class PairAsk:
    """What to do.

    :ivar size: bytes that are pre-faulted; for time, so many that the start of a thread does not matter
    :ivar rounds: how often each way
    """

    size: int = 2 << 30
    rounds: int = 9


@dataclass(frozen=True)
class Pair:
    """What it took, once.

    :ivar way: one of WAYS
    :ivar ns: from the first call of any to the last return
    :ivar cpu_ns: CPU time of all vCPUs' threads
    """

    way: str
    ns: int
    cpu_ns: int


class _Ground:
    """A VM with two vCPUs and one memslot."""

    def __init__(self, kvm: Kvm, ask: PairAsk) -> None:
        self.vm = kvm.create_vm()
        self._slot = MemoryRegion(0, _PLACES[0], ask.size, Backing.PRIVATE, Resident.WRITE)
        self.vm.set_user_memory_region(self._slot)
        self._vcpus = [self.vm.create_vcpu(), self.vm.create_vcpu()]
        self._place = 0

    def measure(self, way: str) -> Pair:
        """Pre-fault memory that is not mapped."""
        self._place = 1 - self._place
        gpa, size = _PLACES[self._place], self._slot.size
        self.vm.set_user_memory_region(dataclasses.replace(self._slot, gpa=gpa))
        parts = {
            "one": [(gpa, size)],
            "halves": [(gpa, size // 2), (gpa + size // 2, size // 2)],
            "both all": [(gpa, size), (gpa, size)],
        }[way]
        threads = [
            PreFaulter(vcpu, *part, cpu)
            for cpu, (vcpu, part) in enumerate(zip(self._vcpus, parts, strict=False))
        ]
        gate = threading.Barrier(len(threads))
        for thread in threads:
            thread.gate = gate
            thread.start()
        for thread in threads:
            thread.finish()
        begin, end = min(thread.ns[0] for thread in threads), max(thread.ns[1] for thread in threads)
        return Pair(way, end - begin, sum(thread.cpu_ns for thread in threads))


def main() -> int:
    """Measure; a line of JSON for each time."""
    ask = PairAsk(**json.loads(sys.argv[1]))
    gc.disable()
    with open_kvm() as kvm:
        ground = _Ground(kvm, ask)
        ground.measure("one")  # the first time is slower
        for _ in range(ask.rounds):
            for way in WAYS:
                print(json.dumps(dataclasses.asdict(ground.measure(way))), flush=True)
        ground.vm.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
