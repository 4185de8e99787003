# SPDX-License-Identifier: Apache-2.0
"""Programs of a VMM as data: what is done to a VM, action by action, and what each action shows.

A listed scenario is written by hand and checks a law. A program checks nothing by itself: it shows the
same on every machine that is right. Programs are made at random, shrunk, kept in files, and sent into the
lab; ``scenario`` makes of one what ``perform`` plays.

All addresses are those of a host with pages of 4 KiB. On another host ``scaled`` moves them: whole
blocks of 2 MiB become whole blocks of that host, and what is left over so many of its pages.

Standard library only: this also runs inside the lab.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from prefault.errors import CapabilityMissing, KvmError, PrefaultError, UsageError
from prefault.guest import port
from prefault.guest import program as guest
from prefault.guest.program import RET, EnterL2, Execute, L2Mapping
from prefault.machine import (
    Access,
    Advice,
    Backing,
    Child,
    Exit,
    Failed,
    FaultCounts,
    Leaf,
    MemoryFault,
    MemoryRegion,
    MmioExit,
    Vcpu,
    VcpuConfig,
    VmConfig,
)
from prefault.scenarios.scenario import DATA, Scenario, Stage

VERSION = 1
PAGE, BLOCK = 0x1000, 2 << 20
COULD_NOT = "could not"
"""Begins the result of an action that one machine may decline and another do."""
MAX_EVENTS = 60
"""How many events a guest has at most until the VMM turns to something else."""
HOST_DATA = b"prefault" * 3
ANSWER = 0xF1E2_D3C4_B5A6_8081
"""What the first read of a device gives; each one after that gives one more."""


@dataclass(frozen=True)
class Action:
    """One thing that a VMM does."""


@dataclass(frozen=True)
class SetRegion(Action):
    """KVM_SET_USER_MEMORY_REGION: make, move, change or (size 0) delete a slot."""

    region: MemoryRegion


@dataclass(frozen=True)
class DirtyLog(Action):
    """KVM_GET_DIRTY_LOG."""

    slot: int


@dataclass(frozen=True)
class HostWrite(Action):
    """The VMM writes HOST_DATA to guest memory, unless it took the right to do so from itself."""

    gpa: int


@dataclass(frozen=True)
class HostRead(Action):
    """The VMM reads guest memory, as many bytes as HOST_DATA has."""

    gpa: int


@dataclass(frozen=True)
class Advise(Action):
    """madvise(2)."""

    gpa: int
    size: int
    advice: Advice


@dataclass(frozen=True)
class Protect(Action):
    """mprotect(2)."""

    gpa: int
    size: int
    access: Access


@dataclass(frozen=True)
class Unmap(Action):
    """munmap(2)."""

    gpa: int
    size: int


@dataclass(frozen=True)
class Fork(Action):
    """fork(2): from now on a child has the VMM's private memory, too. There is one at a time."""


@dataclass(frozen=True)
class ChildRead(Action):
    """The child reads guest memory as it has it, as many bytes as HOST_DATA has."""

    gpa: int


@dataclass(frozen=True)
class ChildExit(Action):
    """The child ends."""


@dataclass(frozen=True)
class Merge(Action):
    """The VMM fills some pages with the same, and KSM makes one page of them."""

    gpa: int
    size: int


@dataclass(frozen=True)
class Age(Action):
    """The host takes note that nobody has used some pages lately."""

    gpa: int
    size: int


@dataclass(frozen=True)
class PreFault(Action):
    """KVM_PRE_FAULT_MEMORY, once."""

    gpa: int
    size: int
    flags: int = 0
    vcpu: int = 0


@dataclass(frozen=True)
class Guest(Action):
    """Point a vCPU at a guest program of these steps, and run it.

    ``Execute`` needs a function to call: the VMM writes one first.

    :ivar events: after so many events the vCPU is left standing in its exit; 0 runs it to the end
    :ivar early: give a device read its value when it exits, not when the vCPU is run on
    """

    steps: tuple[guest.Step, ...]
    vcpu: int = 0
    events: int = 0
    early: bool = False


@dataclass(frozen=True)
class Resume(Action):
    """Run a vCPU on that was left standing in an exit."""

    vcpu: int = 0
    events: int = 0
    early: bool = False


@dataclass(frozen=True)
class VmmProgram:
    """What is done to one VM.

    :ivar el2: the vCPUs have EL2, so that their programs can enter an L2
    :ivar e2h0: with el2, HCR_EL2.E2H is 0 and cannot be set
    """

    actions: tuple[Action, ...]
    vcpus: int = 1
    el2: bool = False
    e2h0: bool = False
    ipa_bits: int = 0

    @property
    def length(self) -> int:
        """How many things it does, steps of its guests included."""
        return sum(1 + _steps(action) for action in self.actions)

    def text(self) -> list[str]:
        """The program for people, one line for each action."""
        kind = f"{self.vcpus} vCPU{'s' if self.vcpus > 1 else ''}"
        kind += f" with EL2, E2H {'0' if self.e2h0 else '1'}" if self.el2 else ""
        kind += f", IPA space of {self.ipa_bits} bits" if self.ipa_bits else ""
        return [f"a VM: {kind}", *(describe(action) for action in self.actions)]


def _steps(action: Action) -> int:
    if not isinstance(action, Guest):
        return 0
    return sum(1 + len(step.steps) if isinstance(step, EnterL2) else 1 for step in action.steps)


# Programs as JSON.

_Decoder = Callable[[object], object]
_KINDS: dict[str, type] = {
    name: kind
    for module in (sys.modules[__name__], guest)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, Action | guest.Step | L2Mapping | MemoryRegion)
}


def to_json(program: VmmProgram) -> dict[str, object]:
    """A program as JSON; fields that have their default are left out."""
    return {"version": VERSION, **typing.cast(dict[str, object], _encode(program))}


def _encode(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [one for one in dataclasses.fields(value) if getattr(value, one.name) != one.default]
        named = {one.name: _encode(getattr(value, one.name)) for one in fields}
        return named if isinstance(value, VmmProgram) else {"do": type(value).__name__, **named}
    if isinstance(value, enum.IntFlag):
        return int(value)
    if isinstance(value, enum.Enum):
        return value.value
    return [_encode(one) for one in value] if isinstance(value, tuple) else value


def from_json(raw: object) -> VmmProgram:
    """Read what ``to_json`` wrote.

    :raises UsageError: it is something else
    """
    if not isinstance(raw, dict) or raw.get("version") != VERSION:
        raise UsageError(f"this is no program of version {VERSION}; `prefault conform --random` makes some")
    try:
        return _build(VmmProgram, {name: value for name, value in raw.items() if name != "version"})
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"this program cannot be read: {type(error).__name__}: {error}") from error


_Made = typing.TypeVar("_Made")


def _build(kind: type[_Made], raw: dict[str, object]) -> _Made:
    hints = typing.get_type_hints(kind)
    return kind(**{name: _decode(hints[name], value) for name, value in raw.items()})


def _decode(hint: object, value: object) -> typing.Any:
    if isinstance(value, list):
        inner = typing.get_args(hint)[0]
        return tuple(_decode(inner, one) for one in value)
    if isinstance(value, dict):
        fields = dict(value)
        return _build(_KINDS[fields.pop("do")], fields)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(value) not in kinds:
        raise TypeError(f"{value!r} where {hint} belongs")
    return value


# Programs for people.


def describe(action: Action) -> str:
    """An action as a line."""
    match action:
        case SetRegion(region) if not region.size:
            return f"slot {region.slot}: delete it"
        case SetRegion(region):
            words = [f"slot {region.slot}: {_range(region.gpa, region.size)}, {region.backing.value}"]
            words += [f"pages of {region.page_size:#x}"] if region.page_size else []
            words += [f"resident: {region.resident.value}", *_flags(region)]
            words += [f"hva shifted by {region.hva_offset:#x}"] if region.hva_offset else []
            return ", ".join(words)
        case DirtyLog(slot):
            return f"slot {slot}: get the dirty log"
        case HostWrite(gpa):
            return f"the host writes at {_at(gpa)}"
        case HostRead(gpa):
            return f"the host reads at {_at(gpa)}"
        case Advise(gpa, size, advice):
            return f"the host advises {_range(gpa, size)}: {advice.value}"
        case Protect(gpa, size, access):
            return f"the host protects {_range(gpa, size)}: {access.value}"
        case Unmap(gpa, size):
            return f"the host unmaps {_range(gpa, size)}"
        case Fork():
            return "the VMM forks"
        case ChildRead(gpa):
            return f"the child reads {_at(gpa)}"
        case ChildExit():
            return "the child ends"
        case Merge(gpa, size):
            return f"the host merges {_range(gpa, size)}"
        case Age(gpa, size):
            return f"the host ages {_range(gpa, size)}"
        case PreFault(gpa, size, flags, vcpu):
            return f"vCPU {vcpu}: pre-fault {_range(gpa, size)}" + (f", flags {flags:#x}" if flags else "")
        case Guest(steps, vcpu):
            return f"vCPU {vcpu}: run {_guest_steps(steps)}{_until(action)}"
        case Resume(vcpu):
            return f"vCPU {vcpu}: run on{_until(action)}"
    raise TypeError(f"no words for {type(action).__name__}")


def _at(gpa: int) -> str:
    return f"DATA{gpa - DATA:+#x}" if abs(gpa - DATA) < 1 << 30 else f"{gpa:#x}"


def _range(gpa: int, size: int) -> str:
    return f"{_at(gpa)} size {size:#x}"


def _flags(region: MemoryRegion) -> list[str]:
    return [str(flag.name).lower().replace("_", " ") for flag in region.flags]


def _until(action: Guest | Resume) -> str:
    stop = f"; stop after {action.events} event{'s' if action.events > 1 else ''}" if action.events else ""
    return stop + ("; answer device reads at once" if action.early else "")


def _guest_steps(steps: tuple[guest.Step, ...]) -> str:
    return " ".join(_guest_step(step) for step in steps)


def _guest_step(step: guest.Step) -> str:
    if isinstance(step, EnterL2):
        maps = ", ".join(_mapping(one) for one in step.mappings)
        return f"L2[{_guest_steps(step.steps)}; L1 maps {maps or 'nothing'}]"
    shown = []
    for one in dataclasses.fields(step):
        value = getattr(step, one.name)
        if value != one.default:
            place = one.name in ("gpa", "start")
            shown.append(
                _at(value) if place else f"{one.name}={value:#x}" if value > 9 else f"{one.name}={value}"
            )
    return f"{type(step).__name__}({', '.join(shown)})"


def _mapping(one: L2Mapping) -> str:
    denied = [name for name in ("readable", "writable", "executable") if not getattr(one, name)]
    kind = "".join(f", not {name}" for name in denied)
    return f"{_at(one.ipa)} to {_at(one.gpa)} size {one.size:#x} at level {one.level}{kind}"


# The same program on hosts with other pages.

_SIZES = ("size", "stride", "hva_offset")
_PLACES = ("gpa", "ipa", "start")
"""Those of memory; devices stay where they are."""


def scaled(value: typing.Any, page: int, block: int) -> typing.Any:
    """A program, or a part of one, for a host with pages and level-2 blocks of these sizes."""
    if (page, block) == (PAGE, BLOCK):
        return value
    if isinstance(value, tuple):
        return tuple(scaled(one, page, block) for one in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changed = {}
    for one in dataclasses.fields(value):
        old = getattr(value, one.name)
        moved = isinstance(old, int) and (one.name in _SIZES or (one.name in _PLACES and old >= DATA // 2))
        changed[one.name] = scale(old, page, block) if moved else scaled(old, page, block)
    return dataclasses.replace(value, **changed)


def scale(number: int, page: int, block: int) -> int:
    """An address near DATA, or a size: blocks as blocks, the rest as pages and bytes."""
    base = DATA * ((number + DATA // 2) // DATA)
    blocks = (number - base + BLOCK // 2) // BLOCK
    rest = number - base - blocks * BLOCK
    pages = rest // PAGE
    return base + blocks * block + pages * page + rest % PAGE


# Playing a program.


def leaf_line(leaf: Leaf) -> str:
    """A run of leaves as a line: where, how big, which level, what may be done."""
    rights = "".join(
        sign if allowed else "-"
        for sign, allowed in (
            ("r", leaf.readable),
            ("w", leaf.writable),
            ("x", leaf.px),
            ("u", leaf.ux),
            ("A", leaf.accessed),
        )
    )
    kind = "block" if leaf.block else "page"
    return f"{leaf.ipa:#x} size {leaf.size:#x} level {leaf.level} {kind} {rights}"


def lines(leaves: list[Leaf]) -> list[str]:
    """A table as lines."""
    return [leaf_line(leaf) for leaf in leaves]


def _counted(counts: FaultCounts) -> dict[str, object]:
    """What was counted, zeroes left out."""
    return {name: value for name, value in dataclasses.asdict(counts).items() if value}


PAGE_CACHE = (Backing.SHARED, Backing.FILE_PRIVATE, Backing.FILE_SHARED)
"""Backings that programs do not collapse: the spec does not know how, and with an L2 it takes minutes."""


@dataclass
class _Memory:
    """What the VMM did to its own rights in a slot's memory.

    :ivar closed: pages, from the slot's start, that it had better not touch itself
    """

    region: MemoryRegion
    closed: set[int] = dataclasses.field(default_factory=set)


class _Player:
    """One VM that a program is done to."""

    def __init__(self, stage: Stage, program: VmmProgram) -> None:
        self._stage = stage
        self._vm = stage.vm(config=VmConfig(ipa_bits=program.ipa_bits))
        self._nested = program.el2
        config = VcpuConfig(el2=program.el2, e2h0=program.e2h0)
        self._vcpus = [self._vm.create_vcpu(config) for _ in range(program.vcpus)]
        self._standing: dict[int, Exit | None] = {}
        """What vCPUs stand in: None for an event of the port. A vCPU at its end is not there."""
        self._slots: dict[int, _Memory] = {}
        self._child: Child | None = None
        self._inherited: list[_Memory] = []
        """What the child has."""
        self._answers = 0

    def close(self) -> None:
        """Let nobody wait for what the program has left behind."""
        self._end_child()

    def show(self, action: Action) -> dict[str, object]:
        """Do an action; what it shows."""
        counts = FaultCounts()
        if isinstance(action, Guest | Resume):
            with self._vm.count_faults() as counts:
                result = self._result(action)
        else:
            result = self._result(action)
        seen: dict[str, object] = {
            "result": result,
            "faults": _counted(counts),
            "leaves": lines(self._vm.stage2()),
        }
        if self._nested:
            seen["shadows"] = [lines(table) for table in self._vm.nested_stage2()]
        return seen

    def _result(self, action: Action) -> object:
        try:
            return self._do(action)
        except KvmError as error:
            return f"{type(error).__name__} {error.errno}"
        except CapabilityMissing as error:
            reason = str(error).partition(";")[0]
            return f"{COULD_NOT}: {reason}" if _may_decline(action) else reason
        except PrefaultError as error:
            return type(error).__name__

    def _do(self, action: Action) -> object:
        match action:
            case SetRegion(region):
                self._set(region)
            case DirtyLog(slot):
                return self._vm.get_dirty_log(slot)
            case HostWrite(gpa):
                return self._host(gpa, partial(self._vm.write_memory, gpa, HOST_DATA))
            case HostRead(gpa):
                return self._host(gpa, lambda: self._vm.read_memory(gpa, len(HOST_DATA)).hex())
            case Advise(gpa, size, Advice.COLLAPSE) if self._has_file(gpa, size):
                return "left out"
            case Advise(gpa, size, advice):
                self._vm.advise(gpa, size, advice)
            case Protect(gpa, size, access):
                if access is not Access.WRITE:
                    self._close(gpa, size)
                self._vm.protect(gpa, size, access)
            case Unmap(gpa, size):
                self._close(gpa, size)
                self._vm.unmap(gpa, size)
            case Fork():
                self._end_child()
                self._child = self._vm.fork()
                self._inherited = list(self._slots.values())
            case ChildRead(gpa):
                return self._child_reads(gpa)
            case ChildExit():
                self._end_child()
            case Merge(gpa, size):
                return self._merge(gpa, size)
            case Age(gpa, size):
                self._vm.age(gpa, size)
            case PreFault(gpa, size, flags, vcpu):
                progress = self._vcpu(vcpu).pre_fault_memory_once(gpa, size, flags)
                return [progress.errno, progress.gpa, progress.size]
            case Guest():
                return self._guest(action)
            case Resume(vcpu):
                return self._run(action) if vcpu in self._standing else "stands nowhere"
            case _:
                raise TypeError(f"cannot do {type(action).__name__}")
        return "done"

    def _vcpu(self, number: int) -> Vcpu:
        if number >= len(self._vcpus):
            raise UsageError(f"the program has no vCPU {number}")
        return self._vcpus[number]

    # Slots, and the VMM's own hands on them.

    def _set(self, region: MemoryRegion) -> None:
        old = self._slots.get(region.slot)
        self._vm.set_user_memory_region(region)
        if not region.size:
            self._slots.pop(region.slot, None)
        elif old and (old.region.size, old.region.backing) == (region.size, region.backing):
            old.region = region
        else:
            self._slots[region.slot] = _Memory(region)

    def _pages(self, gpa: int, size: int) -> Iterator[tuple[_Memory, int]]:
        """The pages of a range that are in slots."""
        page = self._stage.page
        for address in range(gpa // page * page, gpa + size, page):
            for memory in self._slots.values():
                if memory.region.gpa <= address < memory.region.gpa + memory.region.size:
                    yield memory, (address - memory.region.gpa) // page

    def _has_file(self, gpa: int, size: int) -> bool:
        return any(memory.region.backing in PAGE_CACHE for memory, _ in self._pages(gpa, size))

    def _close(self, gpa: int, size: int) -> None:
        for memory, page in self._pages(gpa, size):
            memory.closed.add(page)

    def _open(self, gpa: int, size: int) -> bool:
        """Whether the VMM can touch a range without being killed for it."""
        return not any(page in memory.closed for memory, page in self._pages(gpa, size))

    def _host(self, gpa: int, do: Callable[[], object]) -> object:
        return do() or "done" if self._open(gpa, len(HOST_DATA)) else "not for the VMM"

    # What the host does with it.

    def _end_child(self) -> None:
        if self._child:
            self._child.close()
        self._child = None

    def _child_reads(self, gpa: int) -> object:
        size = len(HOST_DATA)
        if not self._child:
            return "there is no child"
        inherited = all(any(memory is one for one in self._inherited) for memory, _ in self._pages(gpa, size))
        # What is closed to the VMM may be closed to the child.
        if not inherited or not self._open(gpa, size):
            return "not for the child"
        return self._child.read_memory(gpa, size).hex()

    def _merge(self, gpa: int, size: int) -> object:
        if not self._open(gpa, size):
            return "not for the VMM"
        self._vm.write_memory(gpa, HOST_DATA[:8] * (size // 8))
        self._vm.merge(gpa, size)
        return "done"

    # Guests.

    def _guest(self, action: Guest) -> object:
        vcpu = self._vcpu(action.vcpu)
        for gpa in _functions(action.steps):
            if not self._open(gpa, len(RET)):
                return "nothing to execute"
            if any(self._pages(gpa, len(RET))):
                self._vm.write_memory(gpa, RET)
        self._standing.pop(action.vcpu, None)
        self._stage.load(self._vm, vcpu, *action.steps)
        return self._run(action)

    def _run(self, action: Guest | Resume) -> list[object]:
        """Events of a vCPU, until it is at its end or has had enough of them."""
        vcpu = self._vcpu(action.vcpu)
        seen: list[object] = []
        while len(seen) < (action.events or MAX_EVENTS):
            self._answer(vcpu, self._standing.pop(action.vcpu, None))
            try:
                event = port.proceed(vcpu)
            except PrefaultError as error:
                return [*seen, _without_space(str(error))]
            seen.append(repr(event))
            if isinstance(event, MmioExit | MemoryFault | Failed):
                self._standing[action.vcpu] = event
            elif isinstance(event, port.AtMarker | port.Reported):
                self._standing[action.vcpu] = None
            else:
                break
            if isinstance(event, MemoryFault | Failed):
                break  # again and again, unless something changes
            if action.early:
                self._answer(vcpu, self._standing[action.vcpu])
                self._standing[action.vcpu] = None
        return seen

    def _answer(self, vcpu: Vcpu, standing: Exit | None) -> None:
        if isinstance(standing, MmioExit) and not standing.is_write:
            vcpu.complete_mmio(ANSWER + self._answers)
            self._answers += 1


def _may_decline(action: Action) -> bool:
    """Whether a kernel may be unable to do it, for want of huge pages for instance, without being wrong."""
    if isinstance(action, Advise):
        return action.advice in (
            Advice.COLLAPSE,
            Advice.POPULATE_READ,
            Advice.POPULATE_WRITE,
            Advice.SOFT_OFFLINE,
        )
    return isinstance(action, SetRegion | Merge | Age)


def _functions(steps: tuple[guest.Step, ...], mappings: tuple[L2Mapping, ...] = ()) -> Iterator[int]:
    """L1 IPAs that a guest jumps to, as far as they are known before."""
    for step in steps:
        if isinstance(step, EnterL2):
            yield from _functions(step.steps, step.mappings)
        elif isinstance(step, Execute) and isinstance(step.gpa, int):
            through = [one for one in mappings if one.ipa <= step.gpa < one.ipa + one.size]
            yield step.gpa - through[0].ipa + through[0].gpa if through else step.gpa


def _without_space(message: str) -> str:
    """QEMU reports the IPA space in HPFAR_EL2.NS, which is RES0 in a guest without Secure state."""
    return re.sub(r"HPFAR_EL2 0x80+(?=[1-9a-f])", "HPFAR_EL2 0x", message)


def play(program: VmmProgram, stage: Stage) -> None:
    """Do a program, and record what each action shows."""
    fitting: VmmProgram = scaled(program, stage.page, stage.block)
    with closing(_Player(stage, fitting)) as player:
        for number, (action, written) in enumerate(zip(fitting.actions, program.actions, strict=True), 1):
            stage.see(f"{number}. {describe(written)}", player.show(action))


def scenario(name: str, program: VmmProgram, *requirements: str) -> Scenario:
    """A program as something to perform."""
    return Scenario(name, requirements, partial(play, program))


def read_programs(text: str) -> dict[str, VmmProgram]:
    """Programs by name, from JSON."""
    return {str(name): from_json(raw) for name, raw in json.loads(text).items()}
