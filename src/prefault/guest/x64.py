# SPDX-License-Identifier: Apache-2.0
"""An assembler for the few x86-64 instructions that guest programs need.

As ``a64``, for the other architecture. Registers are numbers, 0 (rax) to 15 (r15). Memory operands are a
register and an offset; registers whose encoding means something else there (rsp, r12) raise ValueError.

Source: AMD64 Architecture Programmer's Manual, volume 3 (24594)
"""

from __future__ import annotations

import enum
import struct

from prefault.guest.labels import Labels

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
R8, R12 = 8, 12

_LOADS = {1: (b"\x0f\xb6", False), 2: (b"\x0f\xb7", False), 4: (b"\x8b", False), 8: (b"\x8b", True)}
_SIGNED_LOADS = {1: b"\x0f\xbe", 2: b"\x0f\xbf", 4: b"\x63"}
_STORES = {1: (b"\x88", False), 2: (b"\x89", False), 4: (b"\x89", False), 8: (b"\x89", True)}


class Condition(enum.IntEnum):
    """Condition codes of Jcc."""

    BELOW = 2
    EQUAL = 4


def _register(number: int) -> int:
    if not 0 <= number < 16:
        raise ValueError(f"register {number} is none of 0 to 15")
    return number


def _rex(reg: int, rm: int, *, wide: bool) -> bytes:
    """The prefix that widens an instruction and gives registers their fourth bit."""
    return bytes([0x40 | wide << 3 | _register(reg) >> 3 << 2 | _register(rm) >> 3])


def _registers(opcode: int, rm: int, reg: int) -> bytes:
    return _rex(reg, rm, wide=True) + bytes([opcode, 0xC0 | (reg & 7) << 3 | rm & 7])


def _memory(opcode: bytes, reg: int, base: int, offset: int, *, wide: bool) -> bytes:
    if base & 7 == RSP:
        raise ValueError(f"register {base} cannot be the base of an access here")
    displacement = struct.pack("<i", offset)
    return _rex(reg, base, wide=wide) + opcode + bytes([0x80 | (reg & 7) << 3 | base & 7]) + displacement


def load_constant(rd: int, value: int) -> bytes:
    """MOV r64, imm64, or MOV r32, imm32 where the upper half is 0."""
    value &= (1 << 64) - 1
    wide = value >> 32 != 0
    number = struct.pack("<Q" if wide else "<I", value)
    return _rex(0, rd, wide=wide) + bytes([0xB8 | rd & 7]) + number


def mov(rd: int, rs: int) -> bytes:
    """MOV r64, r64."""
    return _registers(0x89, rd, rs)


def add(rd: int, rs: int) -> bytes:
    """ADD r64, r64."""
    return _registers(0x01, rd, rs)


def sub(rd: int, rs: int) -> bytes:
    """SUB r64, r64."""
    return _registers(0x29, rd, rs)


def cmp(rn: int, rm: int) -> bytes:
    """CMP r64, r64."""
    return _registers(0x39, rn, rm)


def load(rd: int, base: int, offset: int = 0, width: int = 8) -> bytes:
    """MOVZX or MOV, from [base + offset]: zero-extended to 64 bits."""
    if width not in _LOADS:
        raise ValueError(f"width {width} is none of 1, 2, 4, 8")
    opcode, wide = _LOADS[width]
    return _memory(opcode, rd, base, offset, wide=wide)


def load_signed(rd: int, base: int, offset: int = 0, width: int = 4, register_bits: int = 64) -> bytes:
    """MOVSX or MOVSXD, from [base + offset]: sign-extended to 32 or 64 bits."""
    if width * 8 >= register_bits or register_bits not in (32, 64):
        raise ValueError(f"{width} bytes cannot be sign-extended to {register_bits} bits")
    return _memory(_SIGNED_LOADS[width], rd, base, offset, wide=register_bits == 64)


def store(rs: int, base: int, offset: int = 0, width: int = 8) -> bytes:
    """MOV, to [base + offset]."""
    if width not in _STORES:
        raise ValueError(f"width {width} is none of 1, 2, 4, 8")
    opcode, wide = _STORES[width]
    return (b"\x66" if width == 2 else b"") + _memory(opcode, rs, base, offset, wide=wide)


class Assembler(Labels):
    """Collects instructions at increasing offsets and resolves labels."""

    def __init__(self) -> None:
        super().__init__()
        self._code = bytearray()
        self._fixups: list[tuple[int, str]] = []

    @property
    def offset(self) -> int:
        """Offset in bytes of the next instruction."""
        return len(self._code)

    def emit(self, *instructions: bytes) -> None:
        """Append instructions."""
        for one in instructions:
            self._code += one

    def jump(self, name: str) -> None:
        """JMP to a label."""
        self._branch(b"\xe9", name)

    def jump_if(self, condition: Condition, name: str) -> None:
        """Jcc to a label."""
        self._branch(bytes([0x0F, 0x80 | condition]), name)

    def _branch(self, opcode: bytes, name: str) -> None:
        self._code += opcode
        self._fixups.append((len(self._code), name))
        self._code += bytes(4)

    def finish(self) -> bytes:
        """The machine code, all labels resolved."""
        code = bytearray(self._code)
        for at, name in self._fixups:
            struct.pack_into("<i", code, at, self.place(name) - at - 4)
        return bytes(code)
