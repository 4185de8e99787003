# SPDX-License-Identifier: Apache-2.0
"""Everything that prefault raises on purpose, and the exit status each one ends a command with.

    PrefaultError                 the root, never raised itself
    ├── UsageError                the caller asked for something that cannot be        exit 2
    ├── KvmError                  an ioctl failed; .errno says why                     exit 3
    │   └── MemoryFaultExit       KVM_RUN ended with KVM_EXIT_MEMORY_FAULT
    ├── Mismatch                  checked, and it does not hold                        exit 1
    │   ├── GuestFailed           the guest program ended in its own exception handler
    │   ├── GuestDied             a guest's operating system ended as it should not have
    │   └── BadSnapshot           a snapshot is truncated, damaged or of another kind of machine
    ├── Missing                   a tool, a right or a capability is not here          exit 77
    │   ├── CapabilityMissing     this VM does not report a KVM capability
    │   ├── KvmMissing            /dev/kvm is absent or may not be opened
    │   ├── NotTraceable          this process may not be traced, or not without harm
    │   └── ToolMissing           a program or package is not installed
    ├── ProcessLost               the process that was worked on ended                 exit 3
    └── LabError                  the lab could not do its work                        exit 3
        ├── BuildFailed           a patch, the compiler or checkpatch said no
        ├── Splat                 the lab's kernel log has a WARN, BUG, KASAN, …       exit 1
        ├── JobTimeout            the job ran over its time                            exit 124
        └── LabLost               the machine hung, panicked or died                   exit 125

A message says what failed, with which values, and what to do next.
"""

from __future__ import annotations

import enum
import errno as errno_names
import os

EHWPOISON = 133
"""Python's errno module does not have it."""


class ExitCode(enum.IntEnum):
    """Exit status of every command (docs/exit-codes.md has the same table)."""

    DONE = 0
    DOES_NOT_HOLD = 1
    USAGE = 2
    OPERATING_ERROR = 3
    MISSING = 77
    TIMED_OUT = 124
    LAB_LOST = 125


class PrefaultError(Exception):
    """Root of what prefault raises on purpose."""

    exit_code = ExitCode.OPERATING_ERROR


class UsageError(PrefaultError):
    """The caller asked for something that cannot be."""

    exit_code = ExitCode.USAGE


def errno_name(errno: int) -> str:
    """ENOENT and the like; the number itself if it has no name."""
    return "EHWPOISON" if errno == EHWPOISON else errno_names.errorcode.get(errno, str(errno))


class KvmError(PrefaultError):
    """A KVM ioctl failed.

    :ivar ioctl: name of the ioctl, for instance ``KVM_PRE_FAULT_MEMORY``
    :ivar errno: the error number it returned
    :ivar gpa: first byte not done, for ioctls on a range, else None
    :ivar size: bytes not done, for ioctls on a range, else None
    """

    def __init__(
        self,
        ioctl: str,
        errno: int,
        *,
        gpa: int | None = None,
        size: int | None = None,
        hint: str = "",
    ) -> None:
        self.ioctl = ioctl
        self.errno = errno
        self.gpa = gpa
        self.size = size
        self.hint = hint
        where = "" if gpa is None else f" at gpa {gpa:#x}, {size or 0:#x} bytes left"
        tail = f"; {hint}" if hint else ""
        super().__init__(f"{ioctl} failed{where}: {errno_name(errno)} ({os.strerror(errno)}){tail}")


class MemoryFaultExit(KvmError):
    """KVM_RUN ended with KVM_EXIT_MEMORY_FAULT: the backing has no memory there."""


class Mismatch(PrefaultError):
    """Something was checked and does not hold."""

    exit_code = ExitCode.DOES_NOT_HOLD


class GuestFailed(Mismatch):
    """The guest program took an exception that it did not expect, or said so itself.

    :ivar esr: syndrome of the exception, or None if the program itself found something wrong
    :ivar elr: address of the instruction, or None
    :ivar far: faulting virtual address, or None
    """

    def __init__(
        self, message: str, *, esr: int | None = None, elr: int | None = None, far: int | None = None
    ) -> None:
        self.esr = esr
        self.elr = elr
        self.far = far
        super().__init__(message)


class GuestDied(Mismatch):
    """A guest's operating system asked for a reset, said that it crashed, or ended before its time."""


class BadSnapshot(Mismatch):
    """A snapshot cannot be restored here; nothing of it has run.

    :ivar folder: where it is
    """

    def __init__(self, folder: object, reason: str) -> None:
        self.folder = str(folder)
        super().__init__(f"the snapshot {folder} cannot be restored: {reason}")


class Missing(PrefaultError):
    """A tool, a right or a capability is not here."""

    exit_code = ExitCode.MISSING


class CapabilityMissing(Missing):
    """This VM does not report a KVM capability."""


class KvmMissing(Missing):
    """/dev/kvm is absent, or may not be opened."""


class NotTraceable(Missing):
    """This process may not be traced by this user, or not without harm to it."""


class ToolMissing(Missing):
    """A program or a package is not installed."""


class ProcessLost(PrefaultError):
    """The process, or the thread, that was worked on ended in the middle."""


class LabError(PrefaultError):
    """The lab could not do its work."""


class BuildFailed(LabError):
    """A patch did not apply, the compiler warned, or checkpatch objected."""


class Splat(LabError):
    """The lab's kernel log has a WARN, BUG, KASAN report, lockdep report or RCU stall."""

    exit_code = ExitCode.DOES_NOT_HOLD


class JobTimeout(LabError):
    """The job ran over its time."""

    exit_code = ExitCode.TIMED_OUT


class LabLost(LabError):
    """The lab's machine hung, panicked or died before the job reported.

    :ivar splats: what its kernel complained of on the console
    """

    exit_code = ExitCode.LAB_LOST

    def __init__(self, text: str, splats: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.splats = splats
