# SPDX-License-Identifier: Apache-2.0
"""The loop around KVM_PRE_FAULT_MEMORY that every caller needs.

Source: Documentation/virt/kvm/api.rst, KVM_PRE_FAULT_MEMORY
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from prefault.abi.constants import EHWPOISON
from prefault.errors import KvmError, PrefaultError
from prefault.machine import PreFaultProgress

NAME = "KVM_PRE_FAULT_MEMORY"

HINTS = {
    errno.EINVAL: "gpa and size must be multiples of the page size, size not 0, gpa + size below 2^64",
    errno.ENOENT: "there is no memslot; pre-fault only what KVM_SET_USER_MEMORY_REGION has set",
    errno.EAGAIN: "the memslot is being deleted or moved; call again when that is done",
    errno.EFAULT: "the host has no usable mapping there; check the mapping behind the memslot",
    EHWPOISON: "the page is poisoned; replace it before the guest touches it",
    errno.ENOEXEC: "the vCPU is not initialised; call KVM_ARM_VCPU_INIT first",
    errno.EOPNOTSUPP: "this kind of VM cannot be pre-faulted; a protected VM's memory is its own",
    errno.ENOMEM: "the host is out of memory",
    errno.ENOTTY: "this kernel does not know the ioctl",
}


def pre_fault_all(once: Callable[[int, int], PreFaultProgress], gpa: int, size: int) -> None:
    """Call ``once`` until nothing is left, as long as it gets anywhere.

    A signal without progress is no failure: Python has run its handlers by then, so call again.

    :raises KvmError: a call failed; .gpa and .size are what was not done
    :raises PrefaultError: a call claimed progress that cannot be
    """
    end = gpa + size
    while size:
        progress = once(gpa, size)
        if progress.errno == errno.EINTR:
            continue
        if progress.errno:
            hint = HINTS.get(progress.errno, "")
            raise KvmError(NAME, progress.errno, gpa=progress.gpa, size=progress.size, hint=hint)
        if not gpa < progress.gpa <= end or progress.gpa + progress.size != end:
            raise PrefaultError(
                f"{NAME} returned 0 for gpa {gpa:#x}, size {size:#x}, but left gpa {progress.gpa:#x}, "
                f"size {progress.size:#x}, which is no progress towards {end:#x}; this is a kernel bug"
            )
        gpa, size = progress.gpa, progress.size
