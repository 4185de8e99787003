# SPDX-License-Identifier: Apache-2.0
"""The back end over the real KVM, laid out as KVM's object model.

``system.Kvm`` → ``vm.Vm`` → ``vcpu.Vcpu``, one module per kind of file descriptor, with
``device.Device`` beside them. Standard library only: it also runs inside the lab.

It fails with ``KvmMissing`` where /dev/kvm cannot be had, with ``CapabilityMissing`` where this
KVM lacks something, with ``UsageError`` where guests cannot be run at all (hosts other than
arm64), and with ``KvmError`` where an ioctl failed.
"""

from prefault.kvm.system import Kvm, open_kvm

__all__ = ["Kvm", "open_kvm"]
