# SPDX-License-Identifier: Apache-2.0
"""How fast the specification is: one table.

    python benchmarks/spec.py

CPU time of one core is what counts, wall time is beside it: a machine that does other things as well
gives nearly the same figures, which is also why short runs are done a few times and the best counts.
What limits each is in docs/spec.md.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from prefault.guest.program import Program, Walk
from prefault.machine import Backing, MemoryRegion, Resident
from prefault.scenarios import SCENARIOS, perform
from prefault.spec import Faults, open_spec
from prefault.spec.explore import Explorer
from prefault.spec.races import RACES, world

CODE, DATA, PAGE = 0x4000_0000, 0x1_0000_0000, 0x1000
RACE = "prefault-write-madvise"
EXPLORED = 20_000
TIMES = 5


@dataclass(frozen=True)
class Figure:
    """What was measured, how often per second or how long, and what it should be at least or at most."""

    what: str
    goal: str
    cpu: str
    wall: str


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def best(work: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """The least CPU time, and the least wall time, of a few runs."""
    runs = [work() for _ in range(TIMES)]
    return min(cpu for cpu, _ in runs), min(wall for _, wall in runs)


def prefault_1_gib() -> Figure:
    """KVM_PRE_FAULT_MEMORY of 1 GiB of resident private 4 KiB pages."""
    with open_spec() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(1, DATA, 1 << 30, Backing.PRIVATE, Resident.WRITE))
        vcpu = vm.create_vcpu()
        cpu, wall = measure(lambda: vcpu.pre_fault_memory(DATA, 1 << 30))
    return Figure("pre-fault 1 GiB, resident 4 KiB pages", "1 s or less", f"{cpu:.2f} s", f"{wall:.2f} s")


def demand_faults() -> Figure:
    """A guest that walks resident pages, each for the first time, half of them with writes."""
    count = 16384
    program = Program((Walk(DATA, count * PAGE, PAGE, 500),))

    def walk() -> tuple[float, float]:
        with open_spec() as kvm, kvm.create_vm() as vm:
            vm.set_user_memory_region(MemoryRegion(0, CODE, 1 << 20, resident=Resident.WRITE))
            vm.set_user_memory_region(MemoryRegion(1, DATA, count * PAGE, resident=Resident.WRITE))
            vcpu = vm.create_vcpu()
            vm.install(program)
            vcpu.load(program)
            return measure(vcpu.run)

    cpu, wall = best(walk)
    return Figure("demand faults", "50,000 a second", f"{count / cpu:,.0f}", f"{count / wall:,.0f}")


def scenario() -> Figure:
    """Each listed scenario once, with a host of its own."""
    cpus, walls = [], []
    for name in SCENARIOS:
        with open_spec() as kvm:
            cpu, wall = measure(lambda kvm=kvm, name=name: perform(kvm, SCENARIOS[name]))
            cpus.append(cpu)
            walls.append(wall)
    median = [f"{1000 * statistics.median(some):.1f} ms" for some in (cpus, walls)]
    return Figure(f"a listed scenario, median of {len(cpus)}", "20 ms or less", *median)


def explorer() -> Figure:
    """Steps of the explorer, in one of the large races."""
    cpu, wall = best(lambda: measure(Explorer(world(RACE, Faults()), EXPLORED).explore))
    return Figure(f"steps of {RACE}", "20,000 a second", f"{EXPLORED / cpu:,.0f}", f"{EXPLORED / wall:,.0f}")


def all_races() -> Figure:
    """What `prefault explore` does."""
    cpu, wall = measure(lambda: [Explorer(world(name, Faults())).explore() for name in RACES])
    return Figure(f"all orders of {len(RACES)} races", "60 s or so", f"{cpu:.0f} s", f"{wall:.0f} s")


def figures() -> Iterator[Figure]:
    """All of them."""
    for one in (prefault_1_gib, demand_faults, scenario, explorer, all_races):
        yield one()


def main() -> None:
    """Print the table."""
    table = Table("the specification on one core", "goal", "CPU time", "wall time")
    for one in figures():
        table.add_row(one.what, one.goal, one.cpu, one.wall)
    Console().print(table)


if __name__ == "__main__":
    main()
