# SPDX-License-Identifier: Apache-2.0
"""What of a thread's registers differs between arm64 and x86-64.

Source: arch/arm64/include/uapi/asm/ptrace.h, arch/x86/include/asm/user_64.h
"""

from __future__ import annotations

import platform
import struct
from dataclasses import dataclass, field

from prefault.errors import Missing

ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
"""The kernel's own: do the call again, unless a signal's handler runs (NOHAND), or go on with it."""


@dataclass(frozen=True)
class Cpu:
    """One architecture.

    :ivar names: of the general registers, in the order of NT_PRSTATUS, all of 64 bits
    :ivar arguments: those that a system call takes its arguments in
    :ivar number: the one with the system call's number
    :ivar number_at_entry: where a tracer sees it
    :ivar result: the one with its result
    :ivar instruction: the system call instruction
    :ivar red_zone: bytes below the stack pointer that a function may use
    :ivar ioctl: the system call's number
    :ivar not_restarted: calls that fail with ERESTARTNOHAND
    :ivar broken_off: waits that a stop makes fail with EINTR, where the kernel has others go on
    :ivar left_alone: calls that would do harm with another's arguments, which they have for a moment
    :ivar ends: the code that ends a signal handler, as the C library or the vDSO has it: rt_sigreturn(2)
    """

    name: str
    names: tuple[str, ...]
    arguments: tuple[str, ...]
    number: str
    number_at_entry: str
    result: str
    instruction: bytes
    red_zone: int
    ioctl: int
    not_restarted: frozenset[int] = field(default=frozenset())
    left_alone: frozenset[int] = field(default=frozenset())
    broken_off: frozenset[int] = field(default=frozenset())
    ends: tuple[bytes, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the register set."""
        return 8 * len(self.names)

    def unpack(self, data: bytes) -> dict[str, int]:
        """Registers by name."""
        return dict(zip(self.names, struct.unpack(f"<{len(self.names)}Q", data), strict=True))

    def pack(self, registers: dict[str, int]) -> bytes:
        """The register set."""
        return struct.pack(f"<{len(self.names)}Q", *(registers[name] & (1 << 64) - 1 for name in self.names))


_X86_NAMES = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi"),
    *("rdi", "orig_rax", "pc", "cs", "eflags", "sp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)

X86_64 = Cpu(
    "x86_64",
    _X86_NAMES,
    ("rdi", "rsi", "rdx", "r10", "r8", "r9"),
    "rax",
    "orig_rax",
    "rax",
    b"\x0f\x05",
    128,
    16,
    # of epoll, POSIX asynchronous I/O and io_uring, System V semaphores and messages, sockets, sigtimedwait
    broken_off=frozenset(
        {232, 281, 441, 208, 333, 426, 65, 220, 69, 70, 42, 43, 44, 45, 46, 47, 288, 299, 307, 128}
    ),
    ends=(b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05", b"\xb8\x0f\0\0\0\x0f\x05"),  # mov $15,%rax (%eax); syscall
)

ARM64 = Cpu(
    "aarch64",
    (*(f"x{index}" for index in range(31)), "sp", "pc", "pstate"),
    tuple(f"x{index}" for index in range(6)),
    "x8",
    "x8",
    "x0",
    b"\x01\x00\x00\xd4",
    0,
    29,
    frozenset({72, 73, 133}),  # pselect6, ppoll, rt_sigsuspend
    frozenset({57}),  # close: of the vCPU's descriptor
    # But sigtimedwait: QEMU calls it without a time-out between EINTR and the next KVM_RUN.
    frozenset({22, 441, 4, 292, 426, 193, 192, 188, 189, 202, 203, 206, 207, 211, 212, 242, 243, 269}),
    (b"\x68\x11\x80\xd2\x01\0\0\xd4",),  # mov x8, #139; svc #0
)


def host() -> Cpu:
    """That of this machine.

    :raises Missing: it is neither
    """
    found = {"x86_64": X86_64, "aarch64": ARM64}.get(platform.machine())
    if found is None:
        raise Missing(
            f"system calls are injected on arm64 and x86-64 only, this machine is {platform.machine()}"
        )
    return found


def signed(value: int) -> int:
    """A register as the result of a system call."""
    return value - (1 << 64) if value >> 63 else value
