# SPDX-License-Identifier: Apache-2.0
"""Processes to run system calls in: C programs that check themselves, and Python that waits in the kernel."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from prefault.inject.tracee import Memory, Tracee, find_end, find_instruction

PROC = Path("/proc")
GETPID, GETTIME, NANOSLEEP = 39, 228, 35  # of x86-64


def pipe(one: IO[str] | None) -> IO[str]:
    """A pipe that is there."""
    assert one is not None
    return one


@contextlib.contextmanager
def running(*argv: str, first_line: bool = True) -> Iterator[subprocess.Popen[str]]:
    """A child that has said its first line."""
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if first_line:
            assert pipe(child.stdout).readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.wait()
        for one in (child.stdin, child.stdout):
            pipe(one).close()


@contextlib.contextmanager
def python(code: str) -> Iterator[subprocess.Popen[str]]:
    """A child that runs Python; ``ready()`` is there for its first line."""
    head = "import ctypes, json, os, signal, sys, time\ndef ready(): print('ready', flush=True)\n"
    with running(sys.executable, "-c", head + code) as child:
        yield child


@contextlib.contextmanager
def tracee(pid: int, tid: int = 0, *, suspend_seccomp: bool = False) -> Iterator[Tracee]:
    """A thread to run system calls in; the only one of its process, if none is named."""
    with Memory(pid) as memory:
        yield Tracee(
            memory,
            tid or pid,
            find_instruction(memory),
            end=find_end(memory),
            suspend_seccomp=suspend_seccomp,
        )


def wait_for_call(pid: int, number: int) -> None:
    """Wait until a process is in a system call."""
    end = time.monotonic() + 10
    while not (PROC / str(pid) / "syscall").read_text().startswith(f"{number} "):
        assert time.monotonic() < end, (PROC / str(pid) / "syscall").read_text()
        time.sleep(0.001)


def compiler() -> str | None:
    """A C compiler."""
    return shutil.which("cc")


_GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{index}" for index in range(8, 15)))
_RED = range(8, 129, 8)


def registers_program(folder: Path) -> Path:
    """A program that has patterns in all registers and in the red zone, and looks whether they stay."""
    lines = [".globl once", "once:", *(f"push %{one}" for one in ("rbx", "rbp", "r12", "r13", "r14", "r15"))]
    for index in range(16):
        lines += [f"movabs ${_pattern(100 + index)}, %rax", f"movq %rax, %xmm{index}"]
        lines.append(f"punpcklqdq %xmm{index}, %xmm{index}")
    for offset in _RED:
        lines += [f"movabs ${_pattern(150 + offset // 8)}, %rax", f"mov %rax, -{offset}(%rsp)"]
    lines += [f"movabs ${_pattern(index + 1)}, %{one}" for index, one in enumerate(_GENERAL)]
    lines += ["mov $30000, %r15d", "stc", "1: dec %r15", "jnz 1b", "jnc 9f"]
    for index, one in enumerate(_GENERAL):
        lines += [f"movabs ${_pattern(index + 1)}, %r15", f"cmp %r15, %{one}", "jne 9f"]
    for index in range(16):
        lines += [f"movabs ${_pattern(100 + index)}, %r15", f"movq %xmm{index}, %rax", "cmp %r15, %rax"]
        lines += ["jne 9f", f"psrldq $8, %xmm{index}", f"movq %xmm{index}, %rax", "cmp %r15, %rax", "jne 9f"]
    for offset in _RED:
        lines += [f"movabs ${_pattern(150 + offset // 8)}, %r15", f"cmp %r15, -{offset}(%rsp)", "jne 9f"]
    pops = [f"pop %{one}" for one in ("r15", "r14", "r13", "r12", "rbp", "rbx")]
    lines += ["xor %eax, %eax", "jmp 8f", "9: mov $1, %eax", "8:", *pops, "ret"]
    text = "\n".join(f'"{line}\\n"' for line in lines)
    source = folder / "registers.c"
    source.write_text(
        f"#include <stdio.h>\n#include <signal.h>\n__asm__({text});\nint once(void);\n"
        "static volatile int end, signals; static void stop(int n) { end = 1; }\n"
        "static void count(int n) { signals++; }\n"
        "int main(void) { long good = 0, bad = 0; signal(SIGTERM, stop);\n"
        'signal(SIGRTMIN, count); puts("ready"); fflush(stdout);\n'
        "while (!end) { if (once()) bad++; else good++; }\n"
        'printf("%ld %ld %d\\n", good, bad, signals); return 0; }\n'
    )
    program = folder / "registers"
    subprocess.run([str(compiler()), "-O1", "-o", str(program), str(source)], check=True)
    return program


def _pattern(value: int) -> str:
    return hex(value * 0x0101_0101_0101_0101 & (1 << 63) - 1)
