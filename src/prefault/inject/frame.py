# SPDX-License-Identifier: Apache-2.0
"""A signal frame that takes a thread back to where it was stopped, if its tracer does not live to do so.

While a system call is run in a thread, the thread is to return from it to the code that ends a signal
handler, with its stack pointer at such a frame. As long as the tracer lives, it does not come to that. If
the tracer is killed, the thread ends a "handler", and the kernel itself puts back its registers, vectors
included, and its signal mask. (On x86 that holds for calls that are not restarted, as KVM's are not: the
kernel would take the thread to the two bytes before that code.)

Source: arch/arm64/kernel/signal.c, arch/x86/kernel/{signal_64,fpu/signal}.c: rt_sigreturn() and what it reads
"""

from __future__ import annotations

import struct

_KEEP_SIGNAL_STACK = 0x7FFF
"""No mode of a signal stack: the kernel then leaves it as it is."""

Registers = dict[str, int]


def _stack() -> bytes:
    """stack_t."""
    return struct.pack("<QiIQ", 0, _KEEP_SIGNAL_STACK, 0, 0)


_ARM_RESERVED = 4096
_FPSIMD_MAGIC, _FPSIMD_BYTES = 0x46508001, 528
_SVE_MAGIC = 0x53564501
_VECTORS = 512


def arm64(registers: Registers, mask: int, vectors: bytes, sve: bytes = b"") -> bytes:
    """struct rt_sigframe of arm64; the stack pointer is to be its address, a multiple of 16.

    :param vectors: register set NT_PRFPREG
    :param sve: register set NT_ARM_SVE, if SVE is in use; left out if it is too long for a plain frame
    """
    fpsr, fpcr = struct.unpack_from("<II", vectors, _VECTORS)
    records = struct.pack("<IIII", _FPSIMD_MAGIC, _FPSIMD_BYTES, fpsr, fpcr) + vectors[:_VECTORS]
    extra = _sve_record(sve) if sve else b""
    if len(records) + len(extra) + 8 <= _ARM_RESERVED:
        records += extra
    general = [
        *(registers[f"x{index}"] for index in range(31)),
        *(registers[one] for one in ("sp", "pc", "pstate")),
    ]
    context = struct.pack("<Q34Q8x", 0, *general) + records.ljust(_ARM_RESERVED, b"\0")
    head = bytes(16) + _stack() + struct.pack("<Q120x8x", mask)
    return bytes(128) + head + context


def _sve_record(sve: bytes) -> bytes:
    """struct sve_context: its registers lie as in NT_ARM_SVE, without the status registers behind them."""
    vector_length = struct.unpack_from("<H", sve, 8)[0]
    quads = vector_length // 16
    size = (32 * 16 + 16 * 2 + 2) * quads
    whole = 16 + -(-size // 16) * 16
    head = struct.pack("<IIHHI", _SVE_MAGIC, whole, vector_length, 0, 0)
    return (head + sve[16 : 16 + size]).ljust(whole, b"\0")


_X86_ORDER = (
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx", "rdx", "rax"),
    *("rcx", "sp", "pc", "eflags"),
)
_UC_FLAGS = 1 | 2 | 4
"""UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS."""
_X86_HEAD = 8 + 16 + 24 + 256 + 8
_SOFTWARE = 464
"""Where in a saved state there is room for software."""
_MAGIC1, _MAGIC2 = 0x46505853, 0x46505845
_LONGEST_STATE = 4096
"""Without AMX."""
_TILES, _TILES_SIZE = 1 << 18, 8192
"""AMX's tiles: they come last, and most threads have none, nor may have them."""
_IN_USE = 512
"""Where a saved state says what is in use."""


def x86_64(registers: Registers, mask: int, state: bytes, address: int) -> bytes:
    """struct rt_sigframe of x86-64; the stack pointer is to be 8 beyond its address.

    :param state: register set NT_X86_XSTATE
    :param address: of the frame, a multiple of 64
    """
    start = -(-_X86_HEAD // 64) * 64
    segments = (registers["cs"], 0, 0, registers["ss"])
    context = struct.pack(
        "<18Q4H4QQ64x", *(registers[name] for name in _X86_ORDER), *segments, 0, 0, 0, 0, address + start
    )
    head = struct.pack("<QQQ", 0, _UC_FLAGS, 0) + _stack() + context + struct.pack("<Q", mask)
    (features,) = struct.unpack_from("<Q", state, _SOFTWARE)
    state, features = _without_tiles(state), features & ~_TILES
    software = struct.pack("<IIQI28x", _MAGIC1, len(state) + 4, features, len(state))
    saved = state[:_SOFTWARE] + software + state[_SOFTWARE + len(software) :]
    return head.ljust(start, b"\0") + saved + struct.pack("<I", _MAGIC2)


def fits_x86_64(state: bytes) -> bool:
    """Whether the state of a thread's vectors is one that a frame can be made of: without tiles."""
    if not _IN_USE + 8 < len(_without_tiles(state)) <= _LONGEST_STATE:
        return False
    (in_use,) = struct.unpack_from("<Q", state, _IN_USE)
    return not in_use & _TILES


def _without_tiles(state: bytes) -> bytes:
    """A saved state without the room for tiles that CPUs with AMX have in it."""
    return state[:-_TILES_SIZE] if len(state) > _LONGEST_STATE else state
