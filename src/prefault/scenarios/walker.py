# SPDX-License-Identifier: Apache-2.0
"""One walk: a VM, its vCPUs, what each of them walks, and what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from prefault.closing import Closing
from prefault.errors import Mismatch
from prefault.guest import port
from prefault.guest.compile import compile_program
from prefault.guest.program import EnterL2, L2Mapping, Marker, Program, Report, Step, Walk
from prefault.guest.tables import leaf_size
from prefault.machine import (
    FILE_CONTENTS,
    Backing,
    FaultCounts,
    Interrupted,
    Kvm,
    Leaf,
    MemoryRegion,
    Resident,
    Vcpu,
    VcpuConfig,
    Vm,
    VmConfig,
)
from prefault.scenarios import pattern
from prefault.scenarios.walk_result import Phase, WalkConfig, WalkRun, When

CODE = 0x4000_0000
"""gpa of the first vCPU's program."""
DATA = 0x1_0000_0000
"""gpa of the memory that is walked."""

CLOCK_STARTS = "the clock starts"
CLOCK_STOPS = "the clock stops"

Note = Callable[[str], None]
"""Told CLOCK_STARTS and CLOCK_STOPS as they come."""

_CODE_SLOT, _DATA_SLOT = 0, 1
_CODE_ALIGNMENT = 2 << 20


def silence(text: str) -> None:
    """A Note for nobody."""


class _Part:
    """What one vCPU walks."""

    def __init__(self, config: WalkConfig, index: int, page_size: int, base: int) -> None:
        self.size = config.size // config.vcpus
        self.start = DATA + index * self.size
        half = self.size // 2
        halves = (self._walk(config, self.start, half), self._walk(config, self.start + half, half))
        self.walks = halves
        # The guest stands at a marker before each phase and after the last.
        steps: tuple[Step, ...] = (
            *(Marker(0), halves[0], Report()),
            *(Marker(1), halves[1], Report()),
            Marker(2),
        )
        if config.nested:
            again = dataclasses.replace(self._walk(config, self.start, self.size), write_permille=0)
            mapping = L2Mapping(self.start, self.start, self.size, self._level(page_size))
            # An empty L2 first: L1's handler of its exits is then mapped, and no fault of the walk's.
            steps = (EnterL2(()), EnterL2(steps, (mapping,)), again, Report(), Marker(3))
        self.program = Program(steps, base)

    def _walk(self, config: WalkConfig, start: int, size: int) -> Walk:
        return Walk(start, size, config.stride, config.write_permille)

    def _level(self, page_size: int) -> int:
        """Level of L1's leaves: blocks if they fit."""
        block = leaf_size(page_size, 2)
        return 3 if self.start % block or self.size % block else 2


class Walker(Closing):
    """One VM, its vCPUs and their walk."""

    def __init__(self, kvm: Kvm, config: WalkConfig, permille: int) -> None:
        self._config = config
        self._page_size = kvm.page_size
        self._permille = permille
        self._vm = kvm.create_vm(VmConfig())
        try:
            self._set_up()
        except BaseException:
            self._vm.close()
            raise

    def close(self) -> None:
        """Close the VM."""
        self._vm.close()

    def _set_up(self) -> None:
        self._parts: list[_Part] = []
        base = CODE
        for index in range(self._config.vcpus):
            part = _Part(self._config, index, self._page_size, base)
            self._parts.append(part)
            base += _round_up(len(compile_program(part.program, self._page_size).data), _CODE_ALIGNMENT)
        code = MemoryRegion(_CODE_SLOT, CODE, base - CODE, resident=Resident.WRITE)
        self._code = (code.gpa, code.size)
        data = MemoryRegion(
            _DATA_SLOT,
            DATA,
            self._config.size,
            self._config.backing,
            self._config.resident,
            page_size=self._config.page_size,
        )
        self._vm.set_user_memory_region(code)
        self._vm.set_user_memory_region(data)
        if self._initial is None:
            pattern.fill(self._vm, DATA, self._config.size, self._config.stride)
        self._vcpus: list[Vcpu] = []
        self._exits = [0] * self._config.vcpus
        self._reports: list[list[int]] = [[] for _ in self._parts]
        for part in self._parts:
            self._vm.install(part.program)
            vcpu = self._vm.create_vcpu(VcpuConfig(el2=self._config.nested))
            vcpu.load(part.program)
            self._vcpus.append(vcpu)

    @property
    def _initial(self) -> int | None:
        """What every word holds before the walk; None if the host has written the pattern.

        To write it where nothing is resident would make it so.
        """
        if self._config.resident is Resident.WRITE:
            return None
        if self._config.backing is Backing.FILE_PRIVATE:
            return int.from_bytes(FILE_CONTENTS[:8], "little")
        return 0

    def run(self, *, count: bool, note: Note = silence) -> WalkRun:
        """Do the walk, with or without counting faults."""
        note(CLOCK_STARTS)
        prefault_ns = self._pre_fault() if self._config.when is When.BEFORE else 0
        self._to_marker(0)
        phases = [self._phase("first half", 1, count)]
        if self._config.when is When.WHILE_RUNNING:
            prefault_ns = self._pre_fault()
        phases.append(self._phase("second half", 2, count))
        if self._config.nested:
            phases.append(self._phase("L1 after L2", 3, count))
        note(CLOCK_STOPS)
        return WalkRun(
            phases=tuple(phases),
            prefault_ns=prefault_ns,
            prefaulted_bytes=sum(self._share(part) for part in self._parts),
            leaves=self._count_leaves(self._vm.stage2()),
            shadow_leaves=self._count_leaves([one for table in self._vm.nested_stage2() for one in table]),
            bytes_checked=8 * self._check(),
        )

    def stages(self) -> Iterator[str]:
        """Do the walk, and stand still where the tables are worth a look; what has just happened."""
        yield "before"
        if self._config.when is When.BEFORE and self._pre_fault_share():
            yield "pre-faulted"
        self._to_marker(0)
        self._to_marker(1)
        if self._config.when is When.WHILE_RUNNING:
            yield "half walked"
            if self._pre_fault_share():
                yield "pre-faulted"
        self._to_marker(2)
        if self._config.nested:
            yield "walked by L2"
            self._to_marker(3)
        yield "walked"

    def _pre_fault_share(self) -> bool:
        """Pre-fault, and say whether that was anything."""
        self._pre_fault()
        return any(self._share(part) for part in self._parts)

    @property
    def vm(self) -> Vm:
        """The VM that walks."""
        return self._vm

    @property
    def slots(self) -> dict[str, tuple[int, int]]:
        """gpa and size of its memslots."""
        return {"code": self._code, "data": (DATA, self._config.size)}

    def _share(self, part: _Part) -> int:
        """Bytes of a part that are pre-faulted, from its start."""
        return part.size * self._permille // 1000 // self._page_size * self._page_size

    def _pre_fault(self) -> int:
        """Every vCPU pre-faults its share; the time that takes."""
        tasks = [
            partial(vcpu.pre_fault_memory, part.start, self._share(part))
            for vcpu, part in zip(self._vcpus, self._parts, strict=True)
            if self._share(part)
        ]
        return _timed(tasks) if tasks else 0

    def _phase(self, name: str, marker: int, count: bool) -> Phase:
        self._exits = [0] * self._config.vcpus
        with self._vm.count_faults() if count else contextlib.nullcontext(FaultCounts()) as faults:
            ns = self._to_marker(marker)
        return Phase(name, ns, sum(self._exits), dataclasses.replace(faults, ipas=[]))

    def _to_marker(self, marker: int) -> int:
        """Run all vCPUs up to a marker; the time that takes."""
        return _timed([partial(self._run_vcpu, index, marker) for index in range(len(self._vcpus))])

    def _run_vcpu(self, index: int, marker: int) -> None:
        while True:
            event = port.proceed(self._vcpus[index])
            self._exits[index] += 1
            if event == port.AtMarker(marker):
                return
            if isinstance(event, Interrupted):
                continue  # A signal that was not meant for the guest; Python has handled it by now.
            if not isinstance(event, port.Reported):
                raise Mismatch(
                    f"vCPU {index} should be on its way to marker {marker}, but ended with {event}"
                )
            self._reports[index].append(event.value)

    def _check(self) -> int:
        """Compare what the guests read and what they left with what they must; words compared.

        :raises Mismatch: something differs
        """
        words = 0
        for index, (part, found) in enumerate(zip(self._parts, self._reports, strict=True)):
            expected = [pattern.expected_sum(one, self._initial) for one in part.walks]
            written = [pattern.check_writes(self._vm, one) for one in part.walks]
            if self._config.nested:
                expected.append((sum(expected) + sum(written)) & (1 << 64) - 1)
            if found != expected:
                raise Mismatch(
                    f"vCPU {index} read words that sum up to {found}, not {expected}: "
                    "some page that it saw was not the host's"
                )
            words += len(expected) * part.size // 2 // self._config.stride
        return words

    def _count_leaves(self, leaves: Sequence[Leaf]) -> dict[str, int]:
        return leaves_by_level(leaves, DATA, self._config.size, self._page_size)


def leaves_by_level(leaves: Sequence[Leaf], start: int, size: int, page_size: int) -> dict[str, int]:
    """How many leaves reach into a range, by level."""
    counts: dict[str, int] = {}
    for leaf in leaves:
        overlap = min(leaf.ipa + leaf.size, start + size) - max(leaf.ipa, start)
        if overlap > 0:
            number = -(-overlap // leaf_size(page_size, leaf.level))
            counts[str(leaf.level)] = counts.get(str(leaf.level), 0) + number
    return counts


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to


def _timed(tasks: Sequence[Callable[[], None]]) -> int:
    """Do all tasks, several in a thread each; nanoseconds until the last is done."""
    if len(tasks) == 1:
        start = time.monotonic_ns()
        tasks[0]()
        return time.monotonic_ns() - start
    errors: list[BaseException] = []
    gate = threading.Barrier(len(tasks) + 1)
    threads = [threading.Thread(target=_task, args=(task, gate, errors)) for task in tasks]
    for thread in threads:
        thread.start()
    gate.wait()
    start = time.monotonic_ns()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.monotonic_ns() - start


def _task(task: Callable[[], None], gate: threading.Barrier, errors: list[BaseException]) -> None:
    gate.wait()
    try:
        task()
    except BaseException as error:
        errors.append(error)
