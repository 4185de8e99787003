# SPDX-License-Identifier: Apache-2.0
"""What a scenario is: a law with a name, and a short program that shows whether it holds.

A scenario builds VMs on its ``Stage``, runs guest programs and pre-faults. It says what it sees
with ``Stage.see``: values that any correct implementation must give, without host addresses. What
must hold by itself it checks with ``Stage.holds``.

Standard library only: scenarios also run inside the lab's root file system.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

from prefault.abi.constants import KVM_CAP_PRE_FAULT_MEMORY
from prefault.closing import Closing
from prefault.errors import CapabilityMissing, Mismatch, Missing
from prefault.guest import port
from prefault.guest.program import PORT_SIZE, Program, Step
from prefault.guest.tables import leaf_size
from prefault.machine import (
    Backing,
    Exit,
    FaultCounts,
    Kvm,
    Leaf,
    MemoryRegion,
    PreFaultProgress,
    Resident,
    Vcpu,
    VcpuConfig,
    Vm,
    VmConfig,
)

CODE = 0x4000_0000
"""gpa of slot 0, which holds the programs."""
CODE_SIZE = 8 << 20
DATA = 0x1_0000_0000
"""gpa of the memory that scenarios are about: aligned to a block of any granule's level 2."""
RING = 4096
"""Entries of a dirty ring that takes a page of any size at least."""
DEVICE = 0x0A00_0000
"""gpa of a device: no slot is ever there."""

Observation = tuple[str, object]

LEAVES = "leaves"
"""The name of what is seen of a table."""


class Stage(Closing):
    """Where a scenario plays: one back end, the VMs made on it, and what was seen."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self.page = kvm.page_size
        self.block = leaf_size(kvm.page_size, 2)
        self.observations: list[Observation] = []
        self._open = ExitStack()
        self._free = CODE

    def close(self) -> None:
        """Close the VMs, and whatever else is open."""
        self._open.close()

    def see(self, what: str, value: object) -> None:
        """Record an observation; ``value`` is of JSON types or a dataclass of such."""
        self.observations.append((what, _plain(value)))

    def holds(self, condition: bool, otherwise: str) -> None:
        """Check a part of the law.

        :raises Mismatch: it does not hold
        """
        if not condition:
            raise Mismatch(otherwise)

    def unchanged(self, before: dict[str, bytes], after: dict[str, bytes]) -> None:
        """Check that all registers are what they were."""
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        self.holds(not changed, f"pre-faulting changed {', '.join(changed)}")

    def vm(self, *regions: MemoryRegion, config: VmConfig = VmConfig()) -> Vm:  # noqa: B008 - frozen
        """A VM with a slot for programs and the given ones. It is closed after the scenario."""
        vm = self.kvm.create_vm(config)
        self._open.callback(vm.close)
        vm.set_user_memory_region(MemoryRegion(0, CODE, CODE_SIZE, resident=Resident.WRITE))
        for region in regions:
            vm.set_user_memory_region(region)
        return vm

    def not_under_pkvm(self, why: str) -> None:
        """Leave a scenario whose law does not hold on hosts that can make protected VMs.

        :raises CapabilityMissing: this is one
        """
        try:
            self.kvm.create_vm(VmConfig(protected=True)).close()
        except CapabilityMissing:
            return
        raise CapabilityMissing(f"{why} on a host with kvm-arm.mode=protected")

    def data(self, pages: int, backing: Backing = Backing.PRIVATE, **more: object) -> MemoryRegion:
        """Slot 1: so many pages from DATA, populated for writing unless said otherwise."""
        fields = {"resident": Resident.WRITE, **more}
        return MemoryRegion(1, DATA, pages * self.page, backing, **fields)  # type: ignore[arg-type]  # by name

    def vcpu(self, vm: Vm, *steps: Step, config: VcpuConfig = VcpuConfig()) -> Vcpu:  # noqa: B008
        """A new vCPU at the start of a program of these steps."""
        vcpu = vm.create_vcpu(config)
        self.load(vm, vcpu, *steps)
        return vcpu

    def load(self, vm: Vm, vcpu: Vcpu, *steps: Step) -> None:
        """Point a vCPU at another program, which gets a place of its own."""
        program = Program(steps, self._free)
        self._free += -(-vm.program_size(program) // PORT_SIZE) * PORT_SIZE
        vm.install(program)
        vcpu.load(program)

    def proceed(self, vcpu: Vcpu) -> Exit:
        """Run a vCPU to its next event or exit, and record that."""
        event = port.proceed(vcpu)
        self.see("exit", event)
        return event

    def finish(self, vcpu: Vcpu) -> list[int]:
        """Run a vCPU to the end of its program; the values that it reported."""
        found = list(port.events(vcpu))
        self.see("to the end", found)
        self.holds(found[-1] == port.Done(), f"the guest should come to its end, not to {found[-1]}")
        return [event.value for event in found if isinstance(event, port.Reported)]

    def faults(self, vm: Vm, vcpu: Vcpu) -> FaultCounts:
        """Run a vCPU to the end of its program; the stage-2 faults on the way."""
        with vm.count_faults() as counts:
            self.finish(vcpu)
        self.see("faults", dataclasses.replace(counts, ipas=[]))
        return counts

    def pre_fault_once(self, vcpu: Vcpu, gpa: int, size: int, flags: int = 0) -> PreFaultProgress:
        """One KVM_PRE_FAULT_MEMORY, recorded."""
        progress = vcpu.pre_fault_memory_once(gpa, size, flags)
        self.see(f"pre-fault {gpa:#x} {size:#x}", progress)
        return progress

    def pre_fault(self, vcpu: Vcpu, gpa: int, size: int) -> None:
        """Pre-fault all of a range."""
        vcpu.pre_fault_memory(gpa, size)

    def leaves(self, vm: Vm, gpa: int = DATA, size: int = 1 << 32) -> list[Leaf]:
        """Leaves of the canonical table that overlap ``[gpa, gpa+size)``, recorded."""
        found = [leaf for leaf in vm.stage2() if leaf.ipa < gpa + size and leaf.ipa + leaf.size > gpa]
        self.see(LEAVES, found)
        return found

    @property
    def sees_leaves(self) -> bool:
        """Whether this back end shows its tables; where it does not, a law is what guests and calls see."""
        return self.kvm.shows_stage2

    def shown_leaves(self, vm: Vm, gpa: int = DATA, size: int = 1 << 32) -> list[Leaf]:
        """As ``leaves``, for what must be true of every leaf there is; none where they are not shown."""
        return self.leaves(vm, gpa, size) if self.sees_leaves else []


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__, **dataclasses.asdict(value)}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


@dataclass(frozen=True)
class Scenario:
    """A law.

    :ivar name: the law as an identifier, with its case in brackets if it has several
    :ivar requirements: rows of DESIGN.md's table that it belongs to
    """

    name: str
    requirements: tuple[str, ...]
    play: Callable[[Stage], None]


@dataclass(frozen=True)
class Outcome:
    """How a scenario ended: ``passed``, ``failed``, or ``skipped`` with the reason in ``text``."""

    name: str
    outcome: str
    text: str
    seconds: float
    observations: list[Observation] = field(default_factory=list)


SCENARIOS: dict[str, Scenario] = {}

Play = Callable[[Stage], None]


def scenario(*requirements: str) -> Callable[[Play], Play]:
    """Decorator: list a scenario under its function's name."""

    def add(play: Play) -> Play:
        _list(Scenario(play.__name__, requirements, play))
        return play

    return add


def scenarios(*requirements: str, cases: Iterable[tuple[object, ...]]) -> Callable[..., Callable[..., None]]:
    """Decorator: list a scenario once for each case, whose values are its further arguments."""

    def add(play: Callable[..., None]) -> Callable[..., None]:
        for case in cases:
            label = "-".join(str(getattr(value, "value", value)) for value in case)
            _list(Scenario(f"{play.__name__}[{label}]", requirements, _bind(play, case)))
        return play

    return add


def _bind(play: Callable[..., None], case: tuple[object, ...]) -> Play:
    return lambda stage: play(stage, *case)


def _list(one: Scenario) -> None:
    if one.name in SCENARIOS:
        raise ValueError(f"two scenarios are called {one.name}")
    SCENARIOS[one.name] = one


def _need_capability(kvm: Kvm) -> None:
    """Only M11 has something to say about a KVM that does not claim to pre-fault."""
    if not kvm.check_extension(KVM_CAP_PRE_FAULT_MEMORY):
        raise CapabilityMissing(
            "this KVM does not report KVM_CAP_PRE_FAULT_MEMORY (236); boot a kernel with the series"
        )


def perform(kvm: Kvm, one: Scenario) -> Outcome:
    """Play a scenario; what a back end lacks makes it skipped, anything else that is wrong failed."""
    start = time.monotonic()
    outcome, text = "passed", ""
    with Stage(kvm) as stage:
        try:
            if "M11" not in one.requirements:
                _need_capability(kvm)
            one.play(stage)
        except Missing as error:
            outcome, text = "skipped", str(error)
        except Mismatch as error:
            outcome, text = "failed", str(error)
        except Exception:
            outcome, text = "failed", traceback.format_exc()
    return Outcome(one.name, outcome, text, time.monotonic() - start, stage.observations)
