# SPDX-License-Identifier: Apache-2.0
"""The back end over the real KVM, laid out as KVM's object model.

``system.Kvm`` → ``vm.Vm`` → ``vcpu.Vcpu``, one module per kind of file descriptor, with
``device.Device`` beside them; ``x86`` has the same for x86 hosts. Standard library only: it also runs inside
the lab.

It fails with ``KvmMissing`` where /dev/kvm cannot be had, with ``CapabilityMissing`` where this
KVM lacks something, with ``UsageError`` where guests cannot be run at all (hosts other than
arm64), and with ``KvmError`` where an ioctl failed.
"""

import platform

from prefault.kvm.system import DEVICE, Kvm, open_kvm
from prefault.kvm.x86 import X86Kvm, open_x86

__all__ = ["Kvm", "X86Kvm", "open_host", "open_kvm"]


def open_host(path: str = DEVICE) -> Kvm | X86Kvm:
    """Open /dev/kvm for guests of this host's architecture.

    :raises KvmMissing: it is not there, may not be opened, or is no KVM
    """
    return open_x86(path) if platform.machine() == "x86_64" else open_kvm(path)
