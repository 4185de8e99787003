# SPDX-License-Identifier: Apache-2.0
"""Pre-faulting in a storm of madvise(), then all memory compared as guest and host see it.

A page that the host has taken back while a pre-fault was about to map it, and that stays mapped all
the same, shows in the comparison: the guest still reads what the page held before.

``python3 storm.py ROUNDS SECONDS`` prints what came of it as one JSON object.
"""

from __future__ import annotations

import errno
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from prefault.errors import CapabilityMissing
from prefault.guest import port
from prefault.guest.program import Marker, Program, Report, Walk
from prefault.kvm import open_kvm
from prefault.kvm.vcpu import Vcpu
from prefault.kvm.vm import Vm
from prefault.machine import Advice, Backing, MemoryRegion, Resident

CODE, DATA = 0x4000_0000, 0x1_0000_0000
SLOT = 2 << 20
BACKINGS = (Backing.PRIVATE, Backing.SHARED, Backing.THP)
SIZE = SLOT * len(BACKINGS)
ADVICE = (*[Advice.DONTNEED] * 5, Advice.HUGEPAGE, Advice.NOHUGEPAGE, Advice.COLLAPSE, Advice.POPULATE_WRITE)

counts: Counter[str] = Counter()


def pre_fault(vcpu: Vcpu, page: int, chance: random.Random, until: float) -> None:
    while time.monotonic() < until:
        gpa = DATA + chance.randrange(SIZE // page) * page
        size = min(chance.randrange(1, 700) * page, DATA + SIZE - gpa)
        progress = vcpu.pre_fault_memory_once(gpa, size)
        assert progress.errno in (0, errno.EINTR), progress
        assert progress.errno or (gpa < progress.gpa and progress.gpa + progress.size == gpa + size), progress
        counts["pre-faults"] += 1


def advise(vm: Vm, page: int, chance: random.Random, until: float) -> None:
    while time.monotonic() < until:
        slot, first = chance.randrange(len(BACKINGS)), chance.randrange(SLOT // page)
        size = chance.randrange(1, min(200, SLOT // page - first) + 1) * page
        try:
            vm.advise(DATA + slot * SLOT + first * page, size, chance.choice(ADVICE))
            counts["advice"] += 1
        except CapabilityMissing:
            counts["advice not taken"] += 1  # COLLAPSE, of what is no THP's worth


def walk(vcpu: Vcpu, program: Program, until: float) -> None:
    while time.monotonic() < until:
        vcpu.load(program)
        while port.proceed(vcpu) != port.AtMarker(1):
            pass
        counts["walks"] += 1


def together(tasks: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(tasks)) as pool:
        for running in [pool.submit(task) for task in tasks]:
            running.result()


def stamp(vm: Vm, number: int, page: int) -> int:
    """Have the host write every page; the sum of what it wrote."""
    values = [number << 32 | index + 1 for index in range(SIZE // page)]
    for index, value in enumerate(values):
        vm.write_memory(DATA + index * page, value.to_bytes(8, "little"))
    return sum(values)


def main() -> None:
    rounds, seconds = int(sys.argv[1]), float(sys.argv[2])
    sys.setswitchinterval(0.0005)
    differing = []
    with open_kvm() as kvm, kvm.create_vm() as vm:
        page = kvm.page_size
        vm.set_user_memory_region(MemoryRegion(0, CODE, SLOT, resident=Resident.WRITE))
        for index, backing in enumerate(BACKINGS):
            region = MemoryRegion(1 + index, DATA + index * SLOT, SLOT, backing, Resident.WRITE)
            vm.set_user_memory_region(region)
        reads = Program((Walk(DATA, SIZE, page), Report(), Marker(1)), CODE)
        mixed = Program((Walk(DATA, SIZE, page, 300), Report(), Marker(1)), CODE + (SLOT >> 1))
        vm.install(reads)
        vm.install(mixed)
        vcpus = [vm.create_vcpu() for _ in range(3)]
        for number in range(rounds):
            chance, until = random.Random(number), time.monotonic() + seconds
            tasks: list[Callable[[], None]] = [
                *(
                    partial(pre_fault, vcpu, page, random.Random(chance.random()), until)
                    for vcpu in vcpus[:2]
                ),
                *(partial(advise, vm, page, random.Random(chance.random()), until) for _ in range(2)),
            ]
            # A running guest repairs as it goes, so only every other round has one.
            together(tasks + [partial(walk, vcpus[2], mixed, until)] * (number % 2))
            expected = stamp(vm, number, page)
            vcpus[0].load(reads)
            if port.proceed(vcpus[0]) != port.Reported(expected & (1 << 64) - 1):
                differing.append(number)
    print(json.dumps({"rounds": rounds, "differing": differing, **counts}))


if __name__ == "__main__":
    main()
