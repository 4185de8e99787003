# SPDX-License-Identifier: Apache-2.0
"""The assembler against the cross assembler, and its own laws."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefault.guest import a64

AS = shutil.which("aarch64-linux-gnu-as") or ""
OBJCOPY = shutil.which("aarch64-linux-gnu-objcopy") or ""

needs_binutils = pytest.mark.skipif(not (AS and OBJCOPY), reason="binutils for aarch64 are not installed")

registers = st.integers(0, 30)
widths = st.sampled_from([1, 2, 4, 8])
branches = st.integers(-(1 << 18), (1 << 18) - 1).map(lambda words: 4 * words)
STORE = {1: "strb w", 2: "strh w", 4: "str w", 8: "str x"}
LOAD = {1: "ldrb w", 2: "ldrh w", 4: "ldr w", 8: "ldr x"}
LOAD_SIGNED = {1: "ldrsb", 2: "ldrsh", 4: "ldrsw"}

MOVZ = 0x1A5
Line = tuple[str, int]


@st.composite
def _moves(draw: st.DrawFn) -> Line:
    rd, value, shift = draw(registers), draw(st.integers(0, 0xFFFF)), draw(st.sampled_from([0, 16, 32, 48]))
    if draw(st.booleans()):
        return f"movz x{rd}, #{value}, lsl #{shift}", a64.movz(rd, value, shift)
    return f"movk x{rd}, #{value}, lsl #{shift}", a64.movk(rd, value, shift)


@st.composite
def _arithmetic(draw: st.DrawFn) -> Line:
    rd, rn, rm, shift = draw(registers), draw(registers), draw(registers), draw(st.integers(0, 63))
    return draw(
        st.sampled_from(
            [
                (f"add x{rd}, x{rn}, x{rm}", a64.add(rd, rn, rm)),
                (f"sub x{rd}, x{rn}, x{rm}", a64.sub(rd, rn, rm)),
                (f"and x{rd}, x{rn}, x{rm}", a64.and_(rd, rn, rm)),
                (f"orr x{rd}, x{rn}, x{rm}", a64.orr(rd, rn, rm)),
                (f"mov x{rd}, x{rm}", a64.mov(rd, rm)),
                (f"cmp x{rn}, x{rm}", a64.cmp(rn, rm)),
                (f"lsr x{rd}, x{rn}, #{shift}", a64.lsr(rd, rn, shift)),
            ]
        )
    )


@st.composite
def _transfers(draw: st.DrawFn) -> Line:
    rt, rn, width = draw(registers), draw(registers), draw(widths)
    offset = width * draw(st.integers(0, 4095))
    choices = [
        (f"{STORE[width]}{rt}, [x{rn}, #{offset}]", a64.store(rt, rn, offset, width)),
        (f"{LOAD[width]}{rt}, [x{rn}, #{offset}]", a64.load(rt, rn, offset, width)),
    ]
    for bits, letter in ((32, "w"), (64, "x")):
        if width * 8 < bits:
            text = f"{LOAD_SIGNED[width]} {letter}{rt}, [x{rn}, #{offset}]"
            choices.append((text, a64.load_signed(rt, rn, offset, width, bits)))
    return draw(st.sampled_from(choices))


@st.composite
def _control(draw: st.DrawFn) -> Line:
    rt, rn, offset = draw(registers), draw(registers), draw(branches)
    condition = draw(st.sampled_from(list(a64.Condition)))
    immediate, near = draw(st.integers(0, 0xFFFF)), draw(st.integers(-(1 << 20), (1 << 20) - 1))
    return draw(
        st.sampled_from(
            [
                (f"b . + {offset}", a64.branch(offset)),
                (f"b.{condition.name} . + {offset}", a64.branch_if(condition, offset)),
                (f"adr x{rn}, . + {near}", a64.adr(rn, near)),
                (f"br x{rn}", a64.br(rn)),
                (f"blr x{rn}", a64.blr(rn)),
                (f"ret x{rn}", a64.ret(rn)),
                ("eret", a64.eret()),
                (f"hvc #{immediate}", a64.hvc(immediate)),
                ("isb", a64.isb()),
                ("dsb sy", a64.dsb()),
                ("tlbi vmalls12e1", a64.tlbi_vmalls12e1()),
                (f"tlbi ipas2e1, x{rn}", a64.tlbi_ipas2e1(rn)),
                (f"tlbi ripas2e1, x{rn}", a64.tlbi_ripas2e1(rn)),
                (f"ldg x{rt}, [x{rn}]", a64.ldg(rt, rn)),
                (f"stg x{rt}, [x{rn}]", a64.stg(rt, rn)),
            ]
        )
    )


@st.composite
def _system(draw: st.DrawFn) -> Line:
    rt, name = draw(registers), draw(st.sampled_from(sorted(a64.SYSTEM_REGISTERS)))
    if draw(st.booleans()) and name not in ("currentel", "cntvct_el0"):
        return f"msr {name}, x{rt}", a64.msr(name, rt)
    return f"mrs x{rt}, {name}", a64.mrs(rt, name)


lines = st.one_of(_moves(), _arithmetic(), _transfers(), _control(), _system())


@needs_binutils
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(listing=st.lists(lines, min_size=50, max_size=200))
def test_every_encoding_is_the_cross_assemblers(
    listing: list[Line], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("a64")
    theirs = _assemble([text for text, _ in listing], folder)
    ours = [word for _, word in listing]
    for (text, _), mine, reference in zip(listing, ours, theirs, strict=True):
        assert mine == reference, f"{text}: {mine:#010x}, the assembler says {reference:#010x}"


def _assemble(texts: list[str], folder: Path) -> list[int]:
    source, object_file, binary = folder / "a.s", folder / "a.o", folder / "a.bin"
    source.write_text("\n".join(texts) + "\n")
    subprocess.run([AS, "-march=armv8.5-a+memtag", "-o", object_file, source], check=True)
    subprocess.run([OBJCOPY, "-O", "binary", "-j", ".text", object_file, binary], check=True)
    code = binary.read_bytes()
    return [int.from_bytes(code[at : at + 4], "little") for at in range(0, len(code), 4)]


@given(value=st.integers(0, (1 << 64) - 1), register=registers)
def test_a_constant_is_built_from_its_halves(value: int, register: int) -> None:
    assembler = a64.Assembler()
    assembler.load_constant(register, value)
    code, result = assembler.finish(), 0
    for at in range(0, len(code), 4):
        word = int.from_bytes(code[at : at + 4], "little")
        shift, half = 16 * (word >> 21 & 3), word >> 5 & 0xFFFF
        assert word & 31 == register
        result = half << shift if word >> 23 == MOVZ else result & ~(0xFFFF << shift) | half << shift
    assert result == value


def test_a_label_resolves_forwards_and_backwards() -> None:
    assembler = a64.Assembler()
    assembler.emit_to("end", a64.branch)
    assembler.label("middle")
    assembler.emit(a64.isb())
    assembler.emit_to("middle", a64.branch)
    assembler.label("end")
    expected = [a64.branch(12), a64.isb(), a64.branch(-4)]
    assert assembler.finish() == b"".join(word.to_bytes(4, "little") for word in expected)


def test_an_undefined_label_is_refused() -> None:
    assembler = a64.Assembler()
    assembler.emit_to("nowhere", a64.branch)
    with pytest.raises(ValueError, match="nowhere"):
        assembler.finish()


def test_a_label_has_one_place() -> None:
    assembler = a64.Assembler()
    assembler.label("here")
    with pytest.raises(ValueError, match="twice"):
        assembler.label("here")


@pytest.mark.parametrize(
    "encode",
    [
        lambda: a64.movz(0, 1 << 16),
        lambda: a64.movz(32, 0),
        lambda: a64.movz(0, 0, 8),
        lambda: a64.load(0, 0, 4, 8),
        lambda: a64.load(0, 0, 8 * 4096, 8),
        lambda: a64.load(0, 0, 0, 3),
        lambda: a64.load_signed(0, 0, 0, 4, 32),
        lambda: a64.branch(2),
        lambda: a64.branch(1 << 28),
        lambda: a64.hvc(-1),
    ],
)
def test_an_operand_that_does_not_fit_is_refused(encode: object) -> None:
    assert callable(encode)
    with pytest.raises(ValueError):
        encode()
