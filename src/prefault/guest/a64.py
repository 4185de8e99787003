# SPDX-License-Identifier: Apache-2.0
"""An assembler for the few A64 instructions that guest programs need.

``Assembler`` collects instructions, resolves labels and returns machine code. Registers are
numbers: 31 is the zero register, except as the base of a load or store, where no caller uses it.
An operand that an instruction cannot encode raises ValueError.

Source: Arm ARM (DDI 0487), C6.2, "Alphabetical list of A64 base instructions"
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable

from prefault.guest.labels import Labels

XZR = 31
LR = 30

SYSTEM_REGISTERS = {
    "vbar_el1": (3, 0, 12, 0, 0),
    "esr_el1": (3, 0, 5, 2, 0),
    "elr_el1": (3, 0, 4, 0, 1),
    "far_el1": (3, 0, 6, 0, 0),
    "currentel": (3, 0, 4, 2, 2),
    "sctlr_el1": (3, 0, 1, 0, 0),
    "cntvct_el0": (3, 3, 14, 0, 2),
    "vbar_el2": (3, 4, 12, 0, 0),
    "esr_el2": (3, 4, 5, 2, 0),
    "elr_el2": (3, 4, 4, 0, 1),
    "far_el2": (3, 4, 6, 0, 0),
    "hpfar_el2": (3, 4, 6, 0, 4),
    "spsr_el2": (3, 4, 4, 0, 0),
    "hcr_el2": (3, 4, 1, 1, 0),
    "vttbr_el2": (3, 4, 2, 1, 0),
    "vtcr_el2": (3, 4, 2, 1, 2),
}
"""Encodings (op0, op1, CRn, CRm, op2)."""


class Condition(enum.IntEnum):
    """Condition codes of B.cond."""

    EQ = 0
    NE = 1
    HS = 2
    LO = 3


def _field(value: int, bits: int, what: str) -> int:
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{what} {value:#x} does not fit into {bits} bits")
    return value


def _signed_field(value: int, bits: int, what: str) -> int:
    if not -(1 << (bits - 1)) <= value < 1 << (bits - 1):
        raise ValueError(f"{what} {value:#x} does not fit into {bits} signed bits")
    return value & ((1 << bits) - 1)


def _register(number: int) -> int:
    return _field(number, 5, "register")


def _branch_offset(offset: int, bits: int) -> int:
    if offset % 4:
        raise ValueError(f"branch offset {offset:#x} is not a multiple of 4")
    return _signed_field(offset // 4, bits, "branch offset")


def movz(rd: int, value: int, shift: int = 0) -> int:
    """MOVZ Xd, #value, LSL #shift."""
    return 0xD2800000 | _half(shift) << 21 | _field(value, 16, "immediate") << 5 | _register(rd)


def movk(rd: int, value: int, shift: int = 0) -> int:
    """MOVK Xd, #value, LSL #shift."""
    return 0xF2800000 | _half(shift) << 21 | _field(value, 16, "immediate") << 5 | _register(rd)


def _half(shift: int) -> int:
    if shift not in (0, 16, 32, 48):
        raise ValueError(f"shift {shift} is none of 0, 16, 32, 48")
    return shift // 16


def mov(rd: int, rm: int) -> int:
    """MOV Xd, Xm (an alias of ORR)."""
    return orr(rd, XZR, rm)


def orr(rd: int, rn: int, rm: int) -> int:
    """ORR Xd, Xn, Xm."""
    return 0xAA000000 | _register(rm) << 16 | _register(rn) << 5 | _register(rd)


def and_(rd: int, rn: int, rm: int) -> int:
    """AND Xd, Xn, Xm."""
    return 0x8A000000 | _register(rm) << 16 | _register(rn) << 5 | _register(rd)


def add(rd: int, rn: int, rm: int) -> int:
    """ADD Xd, Xn, Xm."""
    return 0x8B000000 | _register(rm) << 16 | _register(rn) << 5 | _register(rd)


def sub(rd: int, rn: int, rm: int) -> int:
    """SUB Xd, Xn, Xm."""
    return 0xCB000000 | _register(rm) << 16 | _register(rn) << 5 | _register(rd)


def cmp(rn: int, rm: int) -> int:
    """CMP Xn, Xm (an alias of SUBS)."""
    return 0xEB000000 | _register(rm) << 16 | _register(rn) << 5 | XZR


def lsr(rd: int, rn: int, shift: int) -> int:
    """LSR Xd, Xn, #shift (an alias of UBFM)."""
    return 0xD340FC00 | _field(shift, 6, "shift") << 16 | _register(rn) << 5 | _register(rd)


_SIZE = {1: 0, 2: 1, 4: 2, 8: 3}


def _transfer(opc: int, rt: int, rn: int, offset: int, width: int) -> int:
    if width not in _SIZE:
        raise ValueError(f"width {width} is none of 1, 2, 4, 8")
    if offset % width:
        raise ValueError(f"offset {offset:#x} is not a multiple of the width {width}")
    scaled = _field(offset // width, 12, "scaled offset")
    return 0x39000000 | _SIZE[width] << 30 | opc << 22 | scaled << 10 | _register(rn) << 5 | _register(rt)


def store(rt: int, rn: int, offset: int = 0, width: int = 8) -> int:
    """STRB, STRH, STR Wt or STR Xt, [Xn, #offset]."""
    return _transfer(0, rt, rn, offset, width)


def load(rt: int, rn: int, offset: int = 0, width: int = 8) -> int:
    """LDRB, LDRH, LDR Wt or LDR Xt, [Xn, #offset]: zero-extended."""
    return _transfer(1, rt, rn, offset, width)


def load_signed(rt: int, rn: int, offset: int = 0, width: int = 4, register_bits: int = 64) -> int:
    """LDRSB, LDRSH or LDRSW Xt (or Wt), [Xn, #offset]."""
    if width * 8 >= register_bits or register_bits not in (32, 64):
        raise ValueError(f"{width} bytes cannot be sign-extended to {register_bits} bits")
    return _transfer(2 if register_bits == 64 else 3, rt, rn, offset, width)


def branch(offset: int) -> int:
    """B, to ``offset`` bytes from this instruction."""
    return 0x14000000 | _branch_offset(offset, 26)


def branch_if(condition: Condition, offset: int) -> int:
    """B.cond, to ``offset`` bytes from this instruction."""
    return 0x54000000 | _branch_offset(offset, 19) << 5 | condition


def adr(rd: int, offset: int) -> int:
    """ADR Xd, to ``offset`` bytes from this instruction."""
    immediate = _signed_field(offset, 21, "offset")
    return 0x10000000 | (immediate & 3) << 29 | (immediate >> 2) << 5 | _register(rd)


def br(rn: int) -> int:
    """BR Xn."""
    return 0xD61F0000 | _register(rn) << 5


def blr(rn: int) -> int:
    """BLR Xn."""
    return 0xD63F0000 | _register(rn) << 5


def ret(rn: int = LR) -> int:
    """RET Xn."""
    return 0xD65F0000 | _register(rn) << 5


def eret() -> int:
    """ERET."""
    return 0xD69F03E0


def hvc(immediate: int) -> int:
    """HVC #immediate."""
    return 0xD4000002 | _field(immediate, 16, "immediate") << 5


def ldg(rt: int, rn: int) -> int:
    """LDG Xt, [Xn]: the tag of the granule at Xn goes into bits 59 to 56 of Xt."""
    return 0xD9600000 | _register(rn) << 5 | _register(rt)


def stg(rt: int, rn: int) -> int:
    """STG Xt, [Xn]: the granule at Xn gets the tag in bits 59 to 56 of Xt."""
    return 0xD9200800 | _register(rn) << 5 | _register(rt)


def isb() -> int:
    """ISB."""
    return 0xD5033FDF


def dsb() -> int:
    """DSB SY."""
    return 0xD5033F9F


def tlbi_vmalls12e1() -> int:
    """TLBI VMALLS12E1."""
    return 0xD50C87DF


def tlbi_ipas2e1(rt: int) -> int:
    """TLBI IPAS2E1, Xt."""
    return 0xD50C8420 | _register(rt)


def tlbi_ripas2e1(rt: int) -> int:
    """TLBI RIPAS2E1, Xt."""
    return 0xD50C8440 | _register(rt)


def _system(name: str) -> int:
    op0, op1, crn, crm, op2 = SYSTEM_REGISTERS[name]
    return (op0 - 2) << 19 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5


def mrs(rt: int, name: str) -> int:
    """MRS Xt, name."""
    return 0xD5300000 | _system(name) | _register(rt)


def msr(name: str, rt: int) -> int:
    """MSR name, Xt."""
    return 0xD5100000 | _system(name) | _register(rt)


class Assembler(Labels):
    """Collects instructions at increasing offsets and resolves labels."""

    def __init__(self) -> None:
        super().__init__()
        self._words: list[int] = []
        self._fixups: list[tuple[int, str, Callable[[int], int]]] = []

    @property
    def offset(self) -> int:
        """Offset in bytes of the next instruction."""
        return 4 * len(self._words)

    def emit(self, *words: int) -> None:
        """Append instructions."""
        self._words.extend(words)

    def align(self, boundary: int) -> None:
        """Fill with zero words (UDF) up to a multiple of ``boundary`` bytes."""
        self._words.extend([0] * (-self.offset % boundary // 4))

    def emit_to(self, name: str, encode: Callable[[int], int]) -> None:
        """Append ``encode(offset)``, with the offset of label ``name`` from this instruction."""
        self._fixups.append((len(self._words), name, encode))
        self._words.append(0)

    def load_constant(self, rd: int, value: int) -> None:
        """Load a 64-bit number with as few MOVZ and MOVK as it takes."""
        value &= (1 << 64) - 1
        halves = [(value >> shift & 0xFFFF, shift) for shift in (0, 16, 32, 48)]
        needed = [(half, shift) for half, shift in halves if half] or [(0, 0)]
        self.emit(movz(rd, *needed[0]), *(movk(rd, half, shift) for half, shift in needed[1:]))

    def finish(self) -> bytes:
        """The machine code, little-endian, all labels resolved."""
        words = list(self._words)
        for index, name, encode in self._fixups:
            words[index] = encode(self.place(name) - 4 * index)
        return struct.pack(f"<{len(words)}I", *words)
