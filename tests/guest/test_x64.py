# SPDX-License-Identifier: Apache-2.0
"""The x86 assembler against a disassembler, and its own laws."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefault.guest import x64

NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))
HALF = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", *(f"r{number}d" for number in range(8, 16)))
WORD = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di", *(f"r{number}w" for number in range(8, 16)))
BYTE = ("al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil", *(f"r{number}b" for number in range(8, 16)))
OF_WIDTH = {1: BYTE, 2: WORD, 4: HALF, 8: NAMES}
POINTER = {1: "BYTE PTR", 2: "WORD PTR", 4: "DWORD PTR", 8: "QWORD PTR"}

OBJDUMP = shutil.which("x86_64-linux-gnu-objdump") or ""
needs_objdump = pytest.mark.skipif(not OBJDUMP, reason="binutils for x86-64 are not installed")

registers = st.integers(0, 15)
bases = registers.filter(lambda number: number & 7 != x64.RSP)
widths = st.sampled_from([1, 2, 4, 8])
offsets = st.integers(1, (1 << 31) - 1)
Line = tuple[str, bytes]


@st.composite
def _arithmetic(draw: st.DrawFn) -> Line:
    rd, rs = draw(registers), draw(registers)
    name = draw(st.sampled_from(["mov", "add", "sub", "cmp"]))
    return f"{name} {NAMES[rd]},{NAMES[rs]}", getattr(x64, name)(rd, rs)


@st.composite
def _constants(draw: st.DrawFn) -> Line:
    rd, value = draw(registers), draw(st.integers(0, (1 << 64) - 1) | st.integers(0, (1 << 32) - 1))
    name = f"movabs {NAMES[rd]}" if value >> 32 else f"mov {HALF[rd]}"
    return f"{name},{value:#x}", x64.load_constant(rd, value)


@st.composite
def _transfers(draw: st.DrawFn) -> Line:
    reg, base, offset, width = draw(registers), draw(bases), draw(offsets), draw(widths)
    memory = f"{POINTER[width]} [{NAMES[base]}+{offset:#x}]"
    if draw(st.booleans()):
        return f"mov {memory},{OF_WIDTH[width][reg]}", x64.store(reg, base, offset, width)
    target = NAMES[reg] if width == 8 else HALF[reg]
    name = "movzx" if width < 4 else "mov"
    return f"{name} {target},{memory}", x64.load(reg, base, offset, width)


@st.composite
def _signed_loads(draw: st.DrawFn) -> Line:
    reg, base, offset = draw(registers), draw(bases), draw(offsets)
    width, bits = draw(st.sampled_from([(1, 32), (1, 64), (2, 32), (2, 64), (4, 64)]))
    name = "movsxd" if width == 4 else "movsx"
    memory = f"{POINTER[width]} [{NAMES[base]}+{offset:#x}]"
    target = NAMES[reg] if bits == 64 else HALF[reg]
    return f"{name} {target},{memory}", x64.load_signed(reg, base, offset, width, bits)


def disassemble(code: bytes, folder: Path) -> list[str]:
    """Instructions, in Intel's syntax, prefixes that change nothing taken off."""
    (folder / "code").write_bytes(code)
    argv = [OBJDUMP, "-D", "-b", "binary", "-m", "i386:x86-64", "-M", "intel", "--no-show-raw-insn"]
    done = subprocess.run([*argv, str(folder / "code")], capture_output=True, text=True, check=True)
    lines = re.findall(r"^ +[0-9a-f]+:\s+(.*)$", done.stdout, re.MULTILINE)
    return [re.sub(r"\s+", " ", re.sub(r"^rex ", "", line.split("#")[0])).strip() for line in lines]


@needs_objdump
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_arithmetic() | _constants() | _transfers() | _signed_loads(), min_size=20, max_size=60))
def test_every_instruction_is_what_a_disassembler_takes_it_for(tmp_path: Path, lines: list[Line]) -> None:
    assert disassemble(b"".join(code for _, code in lines), tmp_path) == [text for text, _ in lines]


@needs_objdump
def test_jumps_go_to_their_labels(tmp_path: Path) -> None:
    asm = x64.Assembler()
    asm.label("start")
    asm.jump("end")
    asm.jump_if(x64.Condition.BELOW, "start")
    asm.jump_if(x64.Condition.EQUAL, "end")
    asm.label("end")
    asm.emit(x64.mov(0, 0))
    assert disassemble(asm.finish(), tmp_path)[:3] == ["jmp 0x11", "jb 0x0", "je 0x11"]


@pytest.mark.parametrize("base", [x64.RSP, x64.R12])
def test_a_base_that_means_something_else_is_refused(base: int) -> None:
    with pytest.raises(ValueError, match="base"):
        x64.load(0, base)


def test_labels_are_defined_once_and_before_the_end() -> None:
    asm = x64.Assembler()
    asm.label("here")
    with pytest.raises(ValueError, match="twice"):
        asm.label("here")
    asm.jump("nowhere")
    with pytest.raises(ValueError, match="not defined"):
        asm.finish()
