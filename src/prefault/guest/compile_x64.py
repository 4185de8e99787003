# SPDX-License-Identifier: Apache-2.0
"""From a ``Program`` to x86-64 machine code and page tables, as one image for guest memory.

The guest runs in long mode, which has no way to do without page tables: they map the first 512 GiB one to
one, by pages of 1 GiB, with the flags of what was used and written set already. The code keeps to these
registers: rbx is the value, r8 to r15 are the arguments, the others are scratch.

An exception shuts the vCPU down. What programs of arm64 alone have, an L2 and functions in machine code,
is missing here.

Image layout, from ``Program.base``: code (entry first), then the page tables.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

from prefault.errors import CapabilityMissing
from prefault.guest import port, x64
from prefault.guest.program import (
    PORT,
    DeviceRead,
    DeviceWrite,
    Expect,
    Marker,
    Operand,
    Program,
    Read,
    Report,
    Step,
    Walk,
    Write,
)
from prefault.guest.x64 import RAX, RBP, RBX, RCX, RDI, RDX, RSI, Condition

VALUE = RBX
FIRST_ARGUMENT = x64.R8
_PORT_BASE = RBP

PAGE = 0x1000
_GIB = 1 << 30
_ENTRIES = 512
MAPPED = _ENTRIES * _GIB
"""How much of its physical memory a guest can reach."""

_PRESENT, _WRITABLE, _ACCESSED, _DIRTY, _LARGE = 1 << 0, 1 << 1, 1 << 5, 1 << 6, 1 << 7


@dataclass(frozen=True)
class Image:
    """What goes into guest memory at ``base``; execution begins at its first byte.

    :ivar tables: gpa of the page tables, for CR3
    """

    base: int
    data: bytes
    tables: int


@functools.lru_cache(64)
def compile_program(program: Program) -> Image:
    """Compile a program.

    :raises CapabilityMissing: it does what only arm64 guests can do
    """
    code = _Compiler(program).code()
    code = code.ljust(-(-len(code) // PAGE) * PAGE, b"\0")
    tables = program.base + len(code)
    return Image(program.base, code + _tables(tables), tables)


def _tables(at: int) -> bytes:
    """A PML4 with one entry, and the PDPT that this points to."""
    used = _PRESENT | _WRITABLE | _ACCESSED
    top = struct.pack("<Q", at + PAGE | used).ljust(PAGE, b"\0")
    pages = (number * _GIB | used | _DIRTY | _LARGE for number in range(_ENTRIES))
    return top + struct.pack(f"<{_ENTRIES}Q", *pages)


class _Compiler:
    """One pass over a program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._asm = x64.Assembler()

    def code(self) -> bytes:
        """Emit everything."""
        self._asm.emit(x64.load_constant(VALUE, 0))
        for step in self._program.steps:
            self._step(step)
        self._asm.label("done")
        self._asm.emit(x64.load_constant(RAX, 0))
        self._tell(port.DONE, RAX)
        self._asm.jump("done")
        return self._asm.finish()

    def _step(self, step: Step) -> None:
        match step:
            case Read(gpa, width):
                self._operand(RAX, gpa)
                self._asm.emit(x64.load(VALUE, RAX, 0, width))
            case Write(gpa, data, width) | DeviceWrite(gpa, data, width):
                self._operand(RAX, gpa)
                self._operand(RCX, data)
                self._asm.emit(x64.store(RCX, RAX, 0, width))
            case DeviceRead():
                self._device_read(step)
            case Walk():
                self._walk(step)
            case Marker(number):
                self._asm.emit(x64.load_constant(RAX, number))
                self._tell(port.MARKER, RAX)
            case Report():
                self._tell(port.VALUE, VALUE)
            case Expect(value):
                self._expect(value)
            case _:
                raise CapabilityMissing(f"x86 guests have no {type(step).__name__}: it is a matter of arm64")

    def _device_read(self, step: DeviceRead) -> None:
        self._operand(RAX, step.gpa)
        if step.sign_extend:
            self._asm.emit(x64.load_signed(VALUE, RAX, 0, step.width, step.register_bits))
        else:
            # A load of up to 4 bytes names a 32-bit register; the result is the same.
            self._asm.emit(x64.load(VALUE, RAX, 0, step.width))

    def _walk(self, step: Walk) -> None:
        asm, loop, test = self._asm, self._asm.fresh("walk"), self._asm.fresh("walk.test")
        self._operand(RAX, step.start)
        self._operand(RCX, step.size)
        asm.emit(x64.add(RCX, RAX), x64.load_constant(RDX, step.stride), x64.load_constant(VALUE, 0))
        if 0 < step.write_permille < 1000:
            asm.emit(x64.load_constant(RSI, 0))
        asm.jump(test)
        asm.label(loop)
        self._walk_access(step.write_permille)
        asm.emit(x64.add(RAX, RDX))
        asm.label(test)
        asm.emit(x64.cmp(RAX, RCX))
        asm.jump_if(Condition.BELOW, loop)

    def _walk_access(self, write_permille: int) -> None:
        """Touch [rax]. Walk.is_write() says which accesses are writes; rsi is its remainder."""
        asm = self._asm
        write = x64.store(RAX, RAX)
        read = (x64.load(RDI, RAX), x64.add(VALUE, RDI))
        if write_permille == 0:
            asm.emit(*read)
        elif write_permille == 1000:
            asm.emit(write)
        else:
            reads, join = asm.fresh("walk.read"), asm.fresh("walk.join")
            asm.emit(x64.load_constant(RDI, write_permille), x64.add(RSI, RDI))
            asm.emit(x64.load_constant(RDI, 1000), x64.cmp(RSI, RDI))
            asm.jump_if(Condition.BELOW, reads)
            asm.emit(x64.sub(RSI, RDI), write)
            asm.jump(join)
            asm.label(reads)
            asm.emit(*read)
            asm.label(join)

    def _expect(self, value: Operand) -> None:
        asm, held, again = self._asm, self._asm.fresh("expect.held"), self._asm.fresh("expect.again")
        self._operand(RAX, value)
        asm.emit(x64.cmp(VALUE, RAX))
        asm.jump_if(Condition.EQUAL, held)
        asm.label(again)
        self._tell(port.EXPECTED, RAX)
        self._tell(port.UNEXPECTED, VALUE)
        asm.jump(again)
        asm.label(held)

    def _operand(self, register: int, operand: Operand) -> None:
        if isinstance(operand, int):
            self._asm.emit(x64.load_constant(register, operand))
        else:
            self._asm.emit(x64.mov(register, FIRST_ARGUMENT + operand.index))

    def _tell(self, offset: int, register: int) -> None:
        self._asm.emit(x64.load_constant(_PORT_BASE, PORT), x64.store(register, _PORT_BASE, offset))
