# SPDX-License-Identifier: Apache-2.0
"""From a ``Program`` to AArch64 machine code and tables, as one image for guest memory.

The guest runs with stage 1 off, at EL1, or at virtual EL2 if the vCPU has EL2. The code keeps to
these registers: x0 to x9 are scratch, x19 is the value, x20 to x27 are the arguments, x28 is
where L1 goes on when its L2 has ended. L2 shares all of them with L1.

Image layout, from ``Program.base``: code (entry first), vectors, then L1's stage-2 tables.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial

from prefault.guest import a64, port, tables
from prefault.guest.program import (
    PORT,
    DeviceRead,
    DeviceWrite,
    EnterL2,
    Execute,
    Expect,
    L2Mapping,
    Marker,
    Operand,
    Program,
    Read,
    Report,
    Step,
    TlbiIpa,
    TlbiRange,
    Walk,
    Write,
)

VALUE = 19
FIRST_ARGUMENT = 20
CONTINUATION = 28
_PORT_BASE = 9

_VECTOR_SIZE = 0x80
_LOWER_EL_SYNC = 8
_EC_SHIFT = 26
_EC_HVC64 = 0x16
_CURRENTEL_EL2 = 2 << 2
_HCR_E2H = 1 << 34
_HCR_VM_RW = 1 << 31 | 1
_SPSR_EL1H_MASKED = 0x3C5


@dataclass(frozen=True)
class Image:
    """What goes into guest memory at ``base``; execution begins at its first byte."""

    base: int
    data: bytes


@functools.lru_cache(64)  # the same program is installed in many VMs, and its size asked for before
def compile_program(program: Program, page_size: int) -> Image:
    """Compile ``program`` for guests of a host with ``page_size``, the granule of L1's tables."""
    tables.check_granule(page_size)
    # Where the tables lie depends on the length of the code, and the code loads their addresses,
    # in as many instructions as an address takes: try until the code fits in front of them.
    code_size = page_size
    while True:
        compiler = _Compiler(program, page_size, code_size)
        code = compiler.code()
        if len(code) <= code_size:
            break
        code_size = _round_up(len(code), page_size)
    if compiler.tables:
        code = code.ljust(code_size, b"\0") + compiler.tables
    return Image(program.base, code)


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to


class _Compiler:
    """One pass over a program."""

    def __init__(self, program: Program, page_size: int, code_size: int) -> None:
        self._program = program
        self._page_size = page_size
        self._code_size = code_size
        self._asm = a64.Assembler()
        self._l2: list[tuple[str, EnterL2]] = []
        self.tables = b""

    def code(self) -> bytes:
        """Emit everything."""
        self._entry()
        self._steps(self._program.steps)
        self._asm.label("done")
        self._tell(port.DONE, a64.XZR)
        self._asm.emit_to("done", a64.branch)
        for name, enter in self._l2:
            self._l2_body(name, enter)
        self._failure_handler("el1")
        self._failure_handler("el2")
        self._l2_exit_handler()
        self._vectors("el1")
        self._vectors("el2")
        return self._asm.finish()

    # Parts of the image.

    def _entry(self) -> None:
        asm = self._asm
        asm.emit(a64.mrs(0, "currentel"))
        asm.load_constant(1, _CURRENTEL_EL2)
        asm.emit(a64.cmp(0, 1))
        asm.emit_to("entry.el2", partial(a64.branch_if, a64.Condition.EQ))
        self._set_vectors("el1")
        asm.emit_to("entry.done", a64.branch)
        asm.label("entry.el2")
        self._set_vectors("el2")
        asm.label("entry.done")
        asm.load_constant(VALUE, 0)

    def _l2_body(self, name: str, enter: EnterL2) -> None:
        self._asm.label(name)
        self._set_vectors("el1")
        self._steps(enter.steps)
        self._asm.emit(a64.hvc(0))

    def _set_vectors(self, level: str) -> None:
        self._asm.emit_to(f"vectors.{level}", partial(a64.adr, 0))
        self._asm.emit(a64.msr(f"vbar_{level}", 0), a64.isb())

    def _vectors(self, level: str) -> None:
        self._asm.align(16 * _VECTOR_SIZE)
        self._asm.label(f"vectors.{level}")
        for entry in range(16):
            self._asm.align(_VECTOR_SIZE)
            l2_exit = level == "el2" and entry == _LOWER_EL_SYNC
            self._asm.emit_to("l2.exit" if l2_exit else f"failed.{level}", a64.branch)

    def _failure_handler(self, level: str) -> None:
        asm = self._asm
        asm.label(f"failed.{level}")
        reports = [(port.ELR, f"elr_{level}"), (port.FAR, f"far_{level}")]
        reports += [(port.HPFAR, "hpfar_el2")] if level == "el2" else []
        # The syndrome comes last: with it the host has everything.
        for register, name in (*reports, (port.ESR, f"esr_{level}")):
            asm.emit(a64.mrs(0, name))
            self._tell(register, 0)
        asm.emit_to(f"failed.{level}", a64.branch)

    def _l2_exit_handler(self) -> None:
        asm = self._asm
        asm.label("l2.exit")
        asm.emit(a64.mrs(0, "esr_el2"), a64.lsr(0, 0, _EC_SHIFT))
        asm.load_constant(1, _EC_HVC64)
        asm.emit(a64.cmp(0, 1))
        asm.emit_to("failed.el2", partial(a64.branch_if, a64.Condition.NE))
        asm.emit(a64.br(CONTINUATION))

    # Steps.

    def _steps(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            self._step(step)

    def _step(self, step: Step) -> None:
        match step:
            case Read(gpa, width):
                self._operand(0, gpa)
                self._asm.emit(a64.load(VALUE, 0, 0, width))
            case Write(gpa, data, width) | DeviceWrite(gpa, data, width):
                self._operand(0, gpa)
                self._operand(1, data)
                self._asm.emit(a64.store(1, 0, 0, width))
            case DeviceRead():
                self._device_read(step)
            case Execute(gpa):
                self._operand(0, gpa)
                self._asm.emit(a64.blr(0))
            case Walk():
                self._walk(step)
            case Marker(number):
                self._asm.load_constant(0, number)
                self._tell(port.MARKER, 0)
            case Report():
                self._tell(port.VALUE, VALUE)
            case Expect(value):
                self._expect(value)
            case EnterL2():
                self._enter_l2(step)
            case TlbiIpa(ipa, level):
                self._tlbi(a64.tlbi_ipas2e1(0), tables.tlbi_ipa(self._page_size, ipa, level))
            case TlbiRange(ipa, size):
                self._tlbi(a64.tlbi_ripas2e1(0), tables.tlbi_range(self._page_size, ipa, size))
            case _:
                raise TypeError(f"no code for {type(step).__name__}")

    def _device_read(self, step: DeviceRead) -> None:
        self._operand(0, step.gpa)
        if step.sign_extend:
            self._asm.emit(a64.load_signed(VALUE, 0, 0, step.width, step.register_bits))
        else:
            # A zero-extending load of up to 4 bytes names a W register; the result is the same.
            self._asm.emit(a64.load(VALUE, 0, 0, step.width))

    def _walk(self, step: Walk) -> None:
        asm, loop, test = self._asm, self._asm.fresh("walk"), self._asm.fresh("walk.test")
        self._operand(0, step.start)
        self._operand(1, step.size)
        asm.emit(a64.add(1, 0, 1))
        asm.load_constant(2, step.stride)
        asm.load_constant(VALUE, 0)
        if 0 < step.write_permille < 1000:
            asm.load_constant(3, 0)
            asm.load_constant(4, step.write_permille)
            asm.load_constant(5, 1000)
        asm.emit_to(test, a64.branch)
        asm.label(loop)
        self._walk_access(step.write_permille)
        asm.emit(a64.add(0, 0, 2))
        asm.label(test)
        asm.emit(a64.cmp(0, 1))
        asm.emit_to(loop, partial(a64.branch_if, a64.Condition.LO))

    def _walk_access(self, write_permille: int) -> None:
        """Touch [x0]. Walk.is_write() says which accesses are writes; x3 is its remainder."""
        asm = self._asm
        write = a64.store(0, 0)
        read = (a64.load(6, 0), a64.add(VALUE, VALUE, 6))
        if write_permille == 0:
            asm.emit(*read)
        elif write_permille == 1000:
            asm.emit(write)
        else:
            reads, join = asm.fresh("walk.read"), asm.fresh("walk.join")
            asm.emit(a64.add(3, 3, 4), a64.cmp(3, 5))
            asm.emit_to(reads, partial(a64.branch_if, a64.Condition.LO))
            asm.emit(a64.sub(3, 3, 5), write)
            asm.emit_to(join, a64.branch)
            asm.label(reads)
            asm.emit(*read)
            asm.label(join)

    def _expect(self, value: Operand) -> None:
        asm, held, again = self._asm, self._asm.fresh("expect.held"), self._asm.fresh("expect.again")
        self._operand(0, value)
        asm.emit(a64.cmp(VALUE, 0))
        asm.emit_to(held, partial(a64.branch_if, a64.Condition.EQ))
        asm.label(again)
        self._tell(port.EXPECTED, 0)
        self._tell(port.UNEXPECTED, VALUE)
        asm.emit_to(again, a64.branch)
        asm.label(held)

    def _enter_l2(self, step: EnterL2) -> None:
        asm, body, after = self._asm, self._asm.fresh("l2"), self._asm.fresh("l2.after")
        self._l2.append((body, step))
        builder = self._build_tables(step)
        vttbr = builder.base | self._vmid(len(self._l2)) << 48
        for name, value in (("vtcr_el2", builder.vtcr), ("vttbr_el2", vttbr)):
            asm.load_constant(0, value)
            asm.emit(a64.msr(name, 0))
        # E2H stays what this vCPU was made with; TGE must be clear for the guest to be at EL1.
        asm.emit(a64.mrs(0, "hcr_el2"))
        asm.load_constant(1, _HCR_E2H)
        asm.load_constant(2, _HCR_VM_RW)
        asm.emit(a64.and_(0, 0, 1), a64.orr(0, 0, 2), a64.msr("hcr_el2", 0), a64.isb())
        # Another program may have used this VMID for other tables.
        asm.emit(a64.tlbi_vmalls12e1(), a64.dsb(), a64.isb())
        asm.load_constant(0, _SPSR_EL1H_MASKED)
        asm.emit(a64.msr("spsr_el2", 0))
        asm.emit_to(body, partial(a64.adr, 0))
        asm.emit(a64.msr("elr_el2", 0))
        asm.emit_to(after, partial(a64.adr, CONTINUATION))
        asm.emit(a64.eret())
        asm.label(after)

    def _tlbi(self, instruction: int, operand: int) -> None:
        self._asm.load_constant(0, operand)
        self._asm.emit(a64.dsb(), instruction, a64.dsb(), a64.isb())

    def _vmid(self, number: int) -> int:
        """An 8-bit VMID that programs 2 MiB apart do not share: a TLBI is for all tables of a VMID."""
        return (self._program.base // (2 << 20) * 4 + number) % 255 + 1

    def _build_tables(self, step: EnterL2) -> tables.Stage2Builder:
        base = self._program.base + self._code_size + len(self.tables)
        builder = tables.Stage2Builder(self._page_size, base)
        needed: list[L2Mapping] = []
        for start, size in ((PORT, self._page_size), (self._program.base, self._code_size)):
            needed += tables.identity(step.mappings, start, size, self._page_size)
        for mapping in (*step.mappings, *needed):
            builder.map(mapping)
        self.tables += builder.finish()
        return builder

    # Pieces of code.

    def _operand(self, register: int, operand: Operand) -> None:
        if isinstance(operand, int):
            self._asm.load_constant(register, operand)
        else:
            self._asm.emit(a64.mov(register, FIRST_ARGUMENT + operand.index))

    def _tell(self, offset: int, register: int) -> None:
        self._asm.load_constant(_PORT_BASE, PORT)
        self._asm.emit(a64.store(register, _PORT_BASE, offset))
