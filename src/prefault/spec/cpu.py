# SPDX-License-Identifier: Apache-2.0
"""A processor: executes the A64 instructions that guest programs are compiled to.

Guest memory is reached only through the stage-2 MMU in use, as the hardware would, instruction
fetches included: what a guest faults on follows from its code. Stage 1 is off.

Source: Arm ARM (DDI 0487), C6.2, "Alphabetical list of A64 base instructions"
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from prefault.guest.a64 import SYSTEM_REGISTERS
from prefault.spec import descriptors
from prefault.spec.descriptors import AF, S2AP_R, S2AP_W, VALID, Prot
from prefault.spec.memory import PhysicalMemory
from prefault.spec.nested import FSC_ACCESS, FSC_FAULT, FSC_PERM
from prefault.spec.state import S2Mmu
from prefault.spec.steps import step
from prefault.spec.tlb import Tlb

MASK = (1 << 64) - 1
EC_SHIFT = 26
EC_UNKNOWN, EC_HVC, EC_IABT, EC_DABT = 0x00, 0x16, 0x20, 0x24
IL = 1 << 25
ISV = 1 << 24
SSE, SF, WNR = 1 << 21, 1 << 15, 1 << 6

Operation = Callable[["Cpu", int], int]
"""Executes one instruction at a PC; returns the next PC."""


class Trap(Exception):
    """The processor stops at ``cpu.pc`` and KVM has to see to it."""


class Abort(Trap):
    """A stage-2 fault. ``esr`` is ESR_EL2."""

    __slots__ = ("esr", "ipa")

    def __init__(self, ipa: int, esr: int) -> None:
        self.ipa = ipa
        self.esr = esr


class Eret(Trap):
    """ERET at virtual EL2."""


class Hvc(Trap):
    """HVC from an L2, to its L1."""


class Tlbi(Trap):
    """A TLB invalidation for an L2, at virtual EL2.

    :ivar operation: VMALLS12E1, IPAS2E1 or RIPAS2E1
    :ivar value: of the register that it names
    """

    __slots__ = ("operation", "value")

    def __init__(self, operation: str, value: int) -> None:
        self.operation = operation
        self.value = value


class Undefined(Trap):
    """An instruction that is not known here."""


_UNKNOWN = 0x1DE7_EC7E_DBAD_C0DE
"""What a register holds whose reset value is unknown. Mirrors: reset_unknown()"""


@dataclass
class Cpu:
    """Registers and what is needed to execute.

    :ivar x: general registers; x[31] is the zero register
    :ivar less: carry clear after CMP, that is unsigned lower
    :ivar el: 1 or 2, as the guest sees it
    :ivar system: system registers by name
    :ivar generation: of the TLB when the page of instructions was fetched
    :ivar hafdbs: the processor sets access flags by itself
    """

    memory: PhysicalMemory
    mmu: S2Mmu
    hafdbs: bool
    x: list[int] = field(default_factory=lambda: [0] * 32)
    pc: int = 0
    el: int = 1
    equal: bool = False
    less: bool = False
    generation: int = 0
    system: dict[str, int] = field(default_factory=lambda: {"far_el1": _UNKNOWN})

    def __post_init__(self) -> None:
        self._shift = self.memory.page_shift
        self._mask = self.memory.page_size - 1
        self._frame = bytearray()
        self._words = memoryview(b"")

    def execute(self) -> None:
        """Execute until a Trap is raised; ``pc`` is then that of the instruction that did not complete."""
        mask, decoded = self._mask, _decoded.get
        while True:
            tlb, pc = self.mmu.pgt.tlb, self.pc
            words = self._fetch(pc)
            self.generation, first = tlb.generation, pc & ~mask
            last = first + mask
            while first <= pc <= last and tlb.generation == self.generation:
                word = words[(pc & mask) >> 2]
                operation = decoded(word)
                if operation is None:
                    operation = _decoded[word] = decode(word)
                pc = self.pc = operation(self, pc)

    def _fetch(self, pc: int) -> memoryview:
        """The instructions of the page that ``pc`` is in."""
        pfn = self.translate(pc, Tlb.EXECUTE, EC_IABT << EC_SHIFT | IL) >> self._shift
        frame = self.memory.frame(pfn)
        if frame is not self._frame:
            self._frame, self._words = frame, memoryview(frame).cast("I")
        return self._words

    def translate(self, ipa: int, need: int, esr: int) -> int:
        """Physical address behind an IPA.

        :raises Abort: with ``esr`` and the status code
        """
        step("guest.access")
        found = self.mmu.pgt.tlb.pages.get(ipa >> self._shift)
        if found is not None and found & need:
            return found & ~self._mask | ipa & self._mask
        return self._walk(ipa, need, esr)

    def _walk(self, ipa: int, need: int, esr: int) -> int:
        pgt = self.mmu.pgt
        if ipa >> pgt.ia_bits:
            raise Abort(ipa, esr | FSC_FAULT)
        table, index, level = pgt.find(ipa)
        pte = table.entries[index]
        if not pte & VALID:
            raise Abort(ipa, esr | FSC_FAULT | level & 3)
        if not pte & AF:
            if not self.hafdbs:
                raise Abort(ipa, esr | FSC_ACCESS | level & 3)
            pgt.mkyoung(ipa)
        allowed = (Tlb.READ if pte & S2AP_R else 0) | (Tlb.WRITE if pte & S2AP_W else 0)
        if descriptors.executable(pte) & (Prot.UX if self.el == 0 else Prot.PX):
            allowed |= Tlb.EXECUTE
        if not allowed & need:
            raise Abort(ipa, esr | FSC_PERM | level & 3)
        offset = ipa & pgt.granule.size(level) - 1
        pa = pgt.granule.to_phys(pte) + offset
        pgt.tlb.pages[ipa >> self._shift] = pa & ~self._mask | allowed
        return pa

    def take_exception(self, el: int, esr: int, far: int | None, elr: int) -> None:
        """Enter the vector for a synchronous exception at ``el``; only aborts set FAR.

        Mirrors: enter_exception64()
        """
        name = f"el{el}"
        self.system |= {f"esr_{name}": esr, f"elr_{name}": elr}
        if far is not None:
            self.system[f"far_{name}"] = far
        self.system[f"spsr_{name}"] = self.pstate
        self.pc = self.system.get(f"vbar_{name}", 0) + (0x200 if el == self.el else 0x400)
        self.el = el

    @property
    def pstate(self) -> int:
        """DAIF masked, the EL with its own stack pointer, and the flags."""
        flags = self.equal << 30 | (not self.less) << 29
        return flags | 0x3C0 | self.el << 2 | 1

    @pstate.setter
    def pstate(self, value: int) -> None:
        self.el = value >> 2 & 3
        self.equal, self.less = bool(value >> 30 & 1), not value >> 29 & 1


_decoded: dict[int, Operation] = {}
_NAMES = {code: name for name, code in SYSTEM_REGISTERS.items()}


def decode(word: int) -> Operation:
    """The meaning of an instruction."""
    for mask, value, make in _PATTERNS:
        if word & mask == value:
            return make(word)
    return _undefined


def _undefined(cpu: Cpu, pc: int) -> int:
    raise Undefined


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 & 1 else value


def _move(word: int) -> Operation:
    """MOVZ, MOVK."""
    rd, value, shift, keep = word & 31, word >> 5 & 0xFFFF, (word >> 21 & 3) * 16, word >> 29 & 1
    rest = ~(0xFFFF << shift) & MASK if keep else 0

    def operation(cpu: Cpu, pc: int) -> int:
        cpu.x[rd] = cpu.x[rd] & rest | value << shift
        return pc + 4

    return operation


def _register_operation(compute: Callable[[int, int], int]) -> Callable[[int], Operation]:
    def make(word: int) -> Operation:
        rd, rn, rm = word & 31, word >> 5 & 31, word >> 16 & 31

        def operation(cpu: Cpu, pc: int) -> int:
            x = cpu.x
            x[rd] = compute(x[rn], x[rm]) & MASK
            return pc + 4

        return operation

    return make


def _compare(word: int) -> Operation:
    rn, rm = word >> 5 & 31, word >> 16 & 31

    def operation(cpu: Cpu, pc: int) -> int:
        left, right = cpu.x[rn], cpu.x[rm]
        cpu.equal, cpu.less = left == right, left < right
        return pc + 4

    return operation


def _shift_right(word: int) -> Operation:
    rd, rn, shift = word & 31, word >> 5 & 31, word >> 16 & 63

    def operation(cpu: Cpu, pc: int) -> int:
        cpu.x[rd] = cpu.x[rn] >> shift
        return pc + 4

    return operation


def _transfer(word: int) -> Operation:
    """LDR and STR of all widths, with an unsigned offset."""
    rt, rn, opc, size = word & 31, word >> 5 & 31, word >> 22 & 3, word >> 30
    width, offset = 1 << size, (word >> 10 & 0xFFF) << size
    is_64 = size == 3 or opc == 2
    esr = EC_DABT << EC_SHIFT | IL | ISV | size << 22 | rt << 16 | (SF if is_64 else 0)

    def store(cpu: Cpu, pc: int) -> int:
        pa = cpu.translate(cpu.x[rn] + offset & MASK, Tlb.WRITE, esr | WNR)
        cpu.memory.write(pa, (cpu.x[rt] & (1 << 8 * width) - 1).to_bytes(width, "little"))
        return pc + 4

    def load(cpu: Cpu, pc: int) -> int:
        pa = cpu.translate(cpu.x[rn] + offset & MASK, Tlb.READ, esr if opc == 1 else esr | SSE)
        memory = cpu.memory
        frame = memory.frames.get(pa >> memory.page_shift)
        start = pa & memory.page_size - 1
        value = int.from_bytes(frame[start : start + width], "little") if frame else 0
        if opc != 1:
            value = _signed(value, 8 * width) & (MASK if opc == 2 else 0xFFFF_FFFF)
        if rt != 31:
            cpu.x[rt] = value
        return pc + 4

    return load if opc else store


def _branch(word: int) -> Operation:
    offset = _signed(word & 0x3FF_FFFF, 26) * 4
    return lambda cpu, pc: pc + offset


def _branch_if(word: int) -> Operation:
    offset = _signed(word >> 5 & 0x7_FFFF, 19) * 4
    conditions: dict[int, Operation] = {
        0: lambda cpu, pc: pc + offset if cpu.equal else pc + 4,
        1: lambda cpu, pc: pc + 4 if cpu.equal else pc + offset,
        2: lambda cpu, pc: pc + 4 if cpu.less else pc + offset,
        3: lambda cpu, pc: pc + offset if cpu.less else pc + 4,
    }
    return conditions.get(word & 15, _undefined)


def _adr(word: int) -> Operation:
    rd, offset = word & 31, _signed((word >> 5 & 0x7_FFFF) << 2 | word >> 29 & 3, 21)

    def operation(cpu: Cpu, pc: int) -> int:
        cpu.x[rd] = pc + offset & MASK
        return pc + 4

    return operation


def _branch_register(word: int) -> Operation:
    """BR, BLR, RET."""
    rn, link = word >> 5 & 31, word >> 21 & 3 == 1

    def operation(cpu: Cpu, pc: int) -> int:
        target = cpu.x[rn]
        if link:
            cpu.x[30] = pc + 4
        return target

    return operation


def _mrs(word: int) -> Operation:
    rt, name = word & 31, _NAMES.get(_system_code(word))
    if name is None:
        return _undefined

    def operation(cpu: Cpu, pc: int) -> int:
        value = cpu.el << 2 if name == "currentel" else cpu.system.get(name, 0)
        if rt != 31:
            cpu.x[rt] = value
        return pc + 4

    return operation


def _msr(word: int) -> Operation:
    rt, name = word & 31, _NAMES.get(_system_code(word))
    if name is None:
        return _undefined

    def operation(cpu: Cpu, pc: int) -> int:
        cpu.system[name] = cpu.x[rt]
        return pc + 4

    return operation


def _system_code(word: int) -> tuple[int, int, int, int, int]:
    return 2 + (word >> 19 & 1), word >> 16 & 7, word >> 12 & 15, word >> 8 & 15, word >> 5 & 7


def _trap(kind: type[Trap]) -> Callable[[int], Operation]:
    def operation(cpu: Cpu, pc: int) -> int:
        raise kind

    return lambda word: operation


def _tlbi(operation: str) -> Callable[[int], Operation]:
    def make(word: int) -> Operation:
        rt = word & 31

        def execute(cpu: Cpu, pc: int) -> int:
            raise Tlbi(operation, cpu.x[rt])

        return execute

    return make


_PATTERNS: tuple[tuple[int, int, Callable[[int], Operation]], ...] = (
    (0x3B00_0000, 0x3900_0000, _transfer),
    (0xFFE0_FC00, 0x8B00_0000, _register_operation(lambda left, right: left + right)),
    (0xFFE0_FC00, 0xCB00_0000, _register_operation(lambda left, right: left - right)),
    (0xFFE0_FC00, 0xAA00_0000, _register_operation(lambda left, right: left | right)),
    (0xFFE0_FC00, 0x8A00_0000, _register_operation(lambda left, right: left & right)),
    (0xFFE0_FC1F, 0xEB00_001F, _compare),
    (0xDF80_0000, 0xD280_0000, _move),
    (0xFFC0_FC00, 0xD340_FC00, _shift_right),
    (0xFC00_0000, 0x1400_0000, _branch),
    (0xFF00_0010, 0x5400_0000, _branch_if),
    (0x9F00_0000, 0x1000_0000, _adr),
    (0xFF9F_FC1F, 0xD61F_0000, _branch_register),
    (0xFFFF_FFFF, 0xD69F_03E0, _trap(Eret)),
    (0xFFE0_001F, 0xD400_0002, _trap(Hvc)),
    (0xFFFF_FFFF, 0xD50C_87DF, _tlbi("VMALLS12E1")),
    (0xFFFF_FFE0, 0xD50C_8420, _tlbi("IPAS2E1")),
    (0xFFFF_FFE0, 0xD50C_8440, _tlbi("RIPAS2E1")),
    (0xFFFF_F01F, 0xD503_301F, lambda word: lambda cpu, pc: pc + 4),  # ISB, DSB
    (0xFFF0_0000, 0xD530_0000, _mrs),
    (0xFFF0_0000, 0xD510_0000, _msr),
)
