# SPDX-License-Identifier: Apache-2.0
"""``python3 -m prefault.bench.measure FILE COUNT``: measure cases on this host's KVM.

The file has a line of JSON for each case, and so has what is printed.

All costs are differences of the monotonic clock: under icount, instructions of the whole machine. What
measuring itself takes is measured by the same means and taken off:

- of an ioctl or madvise, that of an ioctl that fails at once;
- of a guest's walk, that of a KVM_RUN from one exit to the next with nothing in between.

Every figure comes from a new VM over new memory. A timer's interrupt now and then falls into one of
them, so each is taken several times; whoever reads them takes the median.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from prefault.abi import ioctls, structures
from prefault.bench.cases import Case, Context
from prefault.errors import CapabilityMissing, KvmError, Mismatch, PrefaultError
from prefault.guest import port
from prefault.guest.program import EnterL2, L2Mapping, Marker, Program, Walk
from prefault.guest.tables import leaf_size
from prefault.kvm import Kvm, X86Kvm, host, hugepages, mapping, open_host
from prefault.kvm.vcpu import Vcpu
from prefault.kvm.vm import Vm
from prefault.kvm.x86 import X86Vcpu, X86Vm
from prefault.machine import Advice, Backing, MemoryRegion, Resident, VcpuConfig
from prefault.scenarios.walker import leaves_by_level

CODE = 0x4000_0000
DATA = 0x1_0000_0000
_CODE_ALIGNMENT = 2 << 20
_AGAIN = 5
"""Calls that find everything mapped are short: one interrupt would be most of what is measured."""
_LOOKED_AT = 64 << 20
"""How much memory is asked for its frames."""
_REPEATED_UP_TO = 16 << 10
"""Walks of more leaves are measured once: an interrupt is nothing there."""
_NOWHERE = -1
_SETTLE_SECONDS = 0.05
"""For what the kernel has put off: the VM before this one is still being taken apart."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_now = time.monotonic_ns


@dataclass
class Measured:
    """What came of a case.

    :ivar case: its name
    :ivar unit: bytes of a leaf, as they are expected
    :ivar page_size: the host's
    :ivar samples: by what was measured, the instructions of each time, for the whole size
    :ivar leaves: of the canonical table after pre-faulting, by level
    :ivar adjacent: share of neighbouring pages whose frames are neighbours; None if nothing is resident
    :ivar skipped: why there are no samples
    """

    case: str
    size: int
    unit: int
    page_size: int
    samples: dict[str, list[int]] = field(default_factory=dict)
    leaves: dict[str, int] = field(default_factory=dict)
    adjacent: float | None = None
    skipped: str = ""

    def add(self, name: str, value: int) -> None:
        """One sample more."""
        self.samples.setdefault(name, []).append(value)


def unit_of(case: Case, page_size: int) -> int:
    """Bytes of the leaves that a case must have."""
    if not case.blocks:
        return page_size
    largest = case.page_size or hugepages.pmd_size()
    return max(size for size in (leaf_size(page_size, level) for level in (1, 2, 3)) if size <= largest)


def _timed(call: Callable[..., int], *arguments: object) -> int:
    """Instructions of a call that must not fail, without those of making it."""
    start = _now()
    result = call(*arguments)
    spent = _now() - start
    if result < 0:
        number = ctypes.get_errno()
        raise PrefaultError(f"a measured call failed: {errno.errorcode.get(number, number)}")
    return max(0, spent - _overhead())


_measured_overhead: list[int] = []


def _overhead() -> int:
    """Instructions of a call that does nothing, by the way in which calls are measured here."""
    if not _measured_overhead:
        _measured_overhead.append(min(_failing() for _ in range(9)))
    return _measured_overhead[0]


def _failing() -> int:
    start = _now()
    _libc.ioctl(_NOWHERE, 0, 0)
    return _now() - start


class Machine:
    """A VM with the memory of a case, and a vCPU that stands where it is pre-faulted: at marker 0."""

    def __init__(self, kvm: Kvm | X86Kvm, case: Case) -> None:
        self.page_size = kvm.page_size
        self._case = case
        self.unit = unit_of(case, kvm.page_size)
        self.vm: Vm | X86Vm = kvm.create_vm()
        try:
            self._set_up()
        except BaseException:
            self.vm.close()
            raise

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.vm.close()

    def _set_up(self) -> None:
        case = self._case
        program = Program(self._steps(), CODE)
        size = -(-self.vm.program_size(program) // _CODE_ALIGNMENT) * _CODE_ALIGNMENT
        self.vm.set_user_memory_region(MemoryRegion(0, CODE, size, resident=Resident.WRITE))
        self.vm.set_user_memory_region(
            MemoryRegion(
                1,
                DATA,
                case.size,
                case.backing,
                case.resident,
                case.flags,
                page_size=case.page_size,
                frames=case.frames,
            )
        )
        if case.dropped:
            self.vm.advise(DATA, case.size, Advice.DONTNEED)
        self.vm.install(program)
        self.vcpu: Vcpu | X86Vcpu = self.vm.create_vcpu(VcpuConfig(el2=case.context is not Context.ORDINARY))
        self.vcpu.load(program)
        self._expect(port.proceed(self.vcpu), 0)
        time.sleep(_SETTLE_SECONDS)

    def _steps(self) -> tuple[Marker | Walk | EnterL2, ...]:
        """Marker 0 is where memory is pre-faulted; from 1 to 2 is nothing, from 2 to 3 the walk."""
        walk = Walk(DATA, self._case.size, self.unit, 1000 if self._case.writes else 0)
        rest = (Marker(1), Marker(2), walk, Marker(3))
        # L1's handler of an L2's exits is mapped by the first, empty one.
        match self._case.context:
            case Context.ORDINARY:
                return (Marker(0), *rest)
            case Context.NESTED:
                return (EnterL2(()), EnterL2((Marker(0),)), *rest)
            case Context.L2:
                level = 3 if self._case.size % leaf_size(self.page_size, 2) else 2
                whole = L2Mapping(DATA, DATA, self._case.size, level)
                return (EnterL2(()), EnterL2((Marker(0), *rest), (whole,)))

    def pre_fault(self) -> int:
        """Instructions of pre-faulting everything.

        :raises KvmError: it failed
        """
        request = structures.kvm_pre_fault_memory(DATA, self._case.size, 0)
        address, fd, number = ctypes.addressof(request), self.vcpu.fd, ioctls.KVM_PRE_FAULT_MEMORY
        result = 0
        start = _now()
        while request.size and not result:
            result = _libc.ioctl(fd, number, address)
        spent = _now() - start
        if result:
            raise KvmError("KVM_PRE_FAULT_MEMORY", ctypes.get_errno(), gpa=request.gpa, size=request.size)
        return max(0, spent - _overhead())

    def to_walk(self) -> int:
        """Bring the guest to where its walk begins; instructions of what a walk of nothing takes."""
        self._expect(port.proceed(self.vcpu), 1)
        return self._to_marker(2)

    def walk(self) -> int:
        """Instructions of the guest's walk; ``to_walk`` must have come before."""
        return self._to_marker(3)

    def walked(self) -> int:
        """Instructions of the guest's walk alone."""
        nothing = self.to_walk()
        return self.walk() - nothing

    def _to_marker(self, number: int) -> int:
        spent = _timed(_libc.ioctl, self.vcpu.fd, ioctls.KVM_RUN, 0)
        self._expect(port.event_of(self.vcpu.last_exit()), number)
        return spent

    @staticmethod
    def _expect(event: object, number: int) -> None:
        if event != port.AtMarker(number):
            raise Mismatch(f"the guest should be at marker {number}, but came to {event}")

    def leaves(self) -> dict[str, int]:
        """Leaves of the walked range, by level; none if this kernel does not show them."""
        try:
            found = self.vm.stage2()
        except (OSError, CapabilityMissing):
            return {}
        return leaves_by_level(found, DATA, self._case.size, self.page_size)

    def adjacent(self) -> float | None:
        """Share of neighbouring pages with neighbouring frames."""
        size = min(self._case.size, _LOOKED_AT)
        frames = host.frames(self.vm.hva_of(DATA), size, self.page_size)
        pairs = [(one, other) for one, other in itertools.pairwise(frames) if one and other]
        return sum(other == one + 1 for one, other in pairs) / len(pairs) if pairs else None

    def populate(self, advice: int) -> int:
        """Instructions of populating the host's memory by madvise(2)."""
        return _timed(_libc.madvise, self.vm.hva_of(DATA), self._case.size, advice)

    def map_populate(self) -> int:
        """Instructions of mapping the memory anew with MAP_POPULATE."""
        case, hva, fd = self._case, self.vm.hva_of(DATA), self.vm.file_of(DATA)
        shared = case.backing not in (Backing.PRIVATE, Backing.FILE_PRIVATE)
        start = _now()
        mapping.map_at(hva, case.size, shared=shared, fd=fd, populate=True)
        return max(0, _now() - start - _overhead())


def _populates(case: Case) -> dict[str, Callable[[Machine], int]]:
    """The ways to have the host's memory populated that are to be measured beside."""
    if case.context is not Context.ORDINARY:
        return {}
    ways: dict[str, Callable[[Machine], int]] = {
        "populate_read": lambda machine: machine.populate(mapping.MADV_POPULATE_READ),
        "populate_write": lambda machine: machine.populate(mapping.MADV_POPULATE_WRITE),
    }
    # Memory that is resident has been mapped already, and a new mapping has no THPs before it is advised.
    if case.resident is Resident.NOTHING and case.backing is not Backing.THP:
        ways["map_populate"] = lambda machine: machine.map_populate()
    return ways


def measure(kvm: Kvm | X86Kvm, case: Case, repeat: int, *, ioctl_only: bool = False) -> Measured:
    """Measure one case.

    :param repeat: how often; many leaves are measured once, and only what the guest and the ioctl do
    :param ioctl_only: only what tells two versions of the ioctl apart
    """
    found = Measured(case.name, case.size, unit_of(case, kvm.page_size), kvm.page_size)
    large = found.size // found.unit > _REPEATED_UP_TO
    ways = {} if ioctl_only or large else _populates(case)
    for _ in range(1 if large else repeat):
        with Machine(kvm, case) as machine:
            found.add("demand", machine.walked())
        with Machine(kvm, case) as machine:
            found.adjacent = machine.adjacent()
            found.add("prefault", machine.pre_fault())
            found.leaves = machine.leaves()
            for _ in range(_AGAIN):
                found.add("again", machine.pre_fault())
            if not ioctl_only:
                found.add("touch", machine.walked())
        for name, way in ways.items():
            with Machine(kvm, case) as machine:
                found.add(name, way(machine))
    return found


def _answer(line: str) -> str:
    """Measure what one line asks for; the line that tells of it."""
    asked = json.loads(line)
    case = Case.from_json(asked["case"])
    gc.disable()
    try:
        with open_host() as kvm:
            found = measure(kvm, case, asked["repeat"], ioctl_only=asked["ioctl_only"])
    except PrefaultError as error:
        found = Measured(case.name, case.size, 0, 0, skipped=str(error))
    return json.dumps(vars(found))


def _in_child(file: Path, index: int) -> None:
    """Measure what one line asks for in a process of its own.

    What a fault costs depends on the mappings that the process has: looking one up takes its steps. So
    each case finds them as every other does, whatever was measured before it.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if status:
            raise PrefaultError(f"measuring line {index + 1} of {file} ended with wait status {status:#x}")
        return
    status = 1
    try:
        with file.open() as lines:
            line = next(itertools.islice(lines, index, None))
        print(_answer(line), flush=True)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> int:
    """Measure what each line of a file asks for: {"case", "repeat", "ioctl_only"}."""
    file, count = Path(sys.argv[1]), int(sys.argv[2])
    for index in range(count):
        _in_child(file, index)
    return 0


if __name__ == "__main__":
    sys.exit(main())
