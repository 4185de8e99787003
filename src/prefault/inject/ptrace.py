# SPDX-License-Identifier: Apache-2.0
"""The requests of ptrace(2) that are needed here, as functions that raise OSError.

All of them must come from the thread that seized the tracee.

Source: include/uapi/linux/ptrace.h, include/uapi/linux/elf.h
"""

from __future__ import annotations

import ctypes
import os

_CONT, _SYSCALL, _DETACH = 7, 24, 17
_GETREGSET, _SETREGSET = 0x4204, 0x4205
_SEIZE, _INTERRUPT = 0x4206, 0x4207
_GETSIGMASK, _SETSIGMASK = 0x420A, 0x420B
_GET_SYSCALL_INFO = 0x420E
_GET_RSEQ_CONFIGURATION = 0x420F

TRACESYSGOOD = 1
SUSPEND_SECCOMP = 1 << 21
"""The thread's seccomp filters do not apply while it is traced; wants CAP_SYS_ADMIN."""

NT_PRSTATUS = 1
NT_PRFPREG = 2
NT_X86_XSTATE = 0x202
NT_ARM_SYSTEM_CALL = 0x404
NT_ARM_SVE = 0x405
NT_ARM_SSVE = 0x40B
NT_ARM_GCS = 0x410

SYSCALL_ENTRY, SYSCALL_EXIT = 1, 2
EVENT_STOP = 128

WALL = 0x40000000

_REGSET_BYTES = 1 << 17
"""Room for the largest, that of SVE at its greatest vector length."""


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class _Rseq(ctypes.Structure):
    _fields_ = [
        ("pointer", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    ]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def _ptrace(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    result = int(_libc.ptrace(request, tid, address, data))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def seize(tid: int, options: int) -> None:
    """Become the tracer of a thread, which goes on as it was."""
    _ptrace(_SEIZE, tid, 0, options)


def interrupt(tid: int) -> None:
    """Have the thread stop as soon as it can; a wait in the kernel ends early."""
    _ptrace(_INTERRUPT, tid)


def cont(tid: int, signal: int = 0) -> None:
    """Let a stopped thread go on, with a signal if that is not 0."""
    _ptrace(_CONT, tid, 0, signal)


def to_system_call(tid: int, signal: int = 0) -> None:
    """Let a stopped thread go on until it enters, or leaves, a system call."""
    _ptrace(_SYSCALL, tid, 0, signal)


def detach(tid: int, signal: int = 0) -> None:
    """Let a stopped thread go for good."""
    _ptrace(_DETACH, tid, 0, signal)


def get_registers(tid: int, kind: int = NT_PRSTATUS) -> bytes:
    """A register set as the kernel lays it out."""
    buffer = ctypes.create_string_buffer(_REGSET_BYTES if kind != NT_PRSTATUS else 512)
    vector = _Iovec(ctypes.addressof(buffer), len(buffer))
    _ptrace(_GETREGSET, tid, kind, ctypes.addressof(vector))
    return buffer.raw[: vector.size]


def set_registers(tid: int, values: bytes, kind: int = NT_PRSTATUS) -> None:
    """Set what ``get_registers`` reads."""
    buffer = ctypes.create_string_buffer(values, len(values))
    vector = _Iovec(ctypes.addressof(buffer), len(values))
    _ptrace(_SETREGSET, tid, kind, ctypes.addressof(vector))


def get_signal_mask(tid: int) -> int:
    """The signals that the thread has blocked, as a bit each."""
    value = ctypes.c_uint64()
    _ptrace(_GETSIGMASK, tid, 8, ctypes.addressof(value))
    return value.value


def set_signal_mask(tid: int, mask: int) -> None:
    """Set what ``get_signal_mask`` reads."""
    value = ctypes.c_uint64(mask)
    _ptrace(_SETSIGMASK, tid, 8, ctypes.addressof(value))


def system_call_stop(tid: int) -> int:
    """Whether the thread is stopped at the entry of a system call (1), at its exit (2), or elsewhere (0)."""
    buffer = ctypes.create_string_buffer(128)
    _ptrace(_GET_SYSCALL_INFO, tid, len(buffer), ctypes.addressof(buffer))
    return buffer.raw[0]


def rseq_pointer(tid: int) -> int:
    """Address of the thread's struct rseq; 0 if it has none, or the kernel does not tell."""
    value = _Rseq()
    try:
        _ptrace(_GET_RSEQ_CONFIGURATION, tid, ctypes.sizeof(value), ctypes.addressof(value))
    except OSError:
        return 0
    return int(value.pointer)
