# SPDX-License-Identifier: Apache-2.0
"""The system descriptor, /dev/kvm."""

from __future__ import annotations

import errno
import os
import platform

from prefault.abi import constants
from prefault.errors import CapabilityMissing, KvmError, KvmMissing, UsageError
from prefault.kvm.descriptor import Descriptor
from prefault.kvm.vm import Vm, host_page_size
from prefault.machine import VmConfig

DEVICE = "/dev/kvm"


class AnyKvm(Descriptor):
    """KVM's system descriptor, on any architecture."""

    def check_version(self, path: str) -> None:
        """Refuse a descriptor that is no KVM of the one version that there is, and close it."""
        version, error = self.try_ioctl("KVM_GET_API_VERSION")
        if error or version != constants.KVM_API_VERSION:
            self.close()
            found = os.strerror(error) if error else f"version {version}"
            raise KvmMissing(
                f"{path} is not the KVM that prefault knows: {found}, where version "
                f"{constants.KVM_API_VERSION} was expected; check what the file is"
            )

    @property
    def name(self) -> str:
        """Which back end this is."""
        return "kvm"

    @property
    def page_size(self) -> int:
        """The host's page size."""
        return host_page_size()

    @property
    def shows_stage2(self) -> bool:
        """Whether the architecture's KVM shows its tables, if it was built to."""
        return True

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on the system descriptor."""
        return self.ioctl("KVM_CHECK_EXTENSION", capability)

    def create_vm_descriptor(self, kind: int) -> int:
        """KVM_CREATE_VM for a machine type, as a bare descriptor; a signal makes it try again."""
        while True:
            result, error = self.try_ioctl("KVM_CREATE_VM", kind)
            if result >= 0:
                return result
            if error != errno.EINTR:
                raise KvmError("KVM_CREATE_VM", error, hint=f"machine type {kind:#x}")


class Kvm(AnyKvm):
    """KVM's system descriptor, for arm64 guests."""

    def create_vm(self, config: VmConfig = VmConfig()) -> Vm:  # noqa: B008 - frozen
        """KVM_CREATE_VM.

        :raises UsageError: this host is not arm64, or the IPA space is larger than it can be
        """
        if platform.machine() not in ("aarch64", "arm64"):
            raise UsageError(
                f"guests here are arm64, this host is {platform.machine()}: use the lab (--machine lab)"
            )
        mmap_size = self.ioctl("KVM_GET_VCPU_MMAP_SIZE")
        fd = self._create_vm(config)
        try:
            return Vm(fd, config, self.page_size, mmap_size)
        except BaseException:
            os.close(fd)
            raise

    def _create_vm(self, config: VmConfig) -> int:
        limit = self.check_extension(constants.KVM_CAP_ARM_VM_IPA_SIZE)
        if config.ipa_bits > limit:
            # Not left to the kernel: in protected mode it takes any number.
            raise UsageError(f"an IPA space of {config.ipa_bits} bits is more than this host's {limit}")
        kind = config.ipa_bits | (constants.KVM_VM_TYPE_ARM_PROTECTED if config.protected else 0)
        try:
            return self.create_vm_descriptor(kind)
        except KvmError as error:
            if config.protected and error.errno == errno.EINVAL:
                raise CapabilityMissing(
                    "this host makes no protected VMs; boot it with kvm-arm.mode=protected"
                ) from error
            raise


def open_kvm(path: str = DEVICE) -> Kvm:
    """Open /dev/kvm.

    :raises KvmMissing: it is not there, may not be opened, or is no KVM
    """
    kvm = Kvm(open_device(path))
    kvm.check_version(path)
    return kvm


def open_device(path: str = DEVICE) -> int:
    """A descriptor of /dev/kvm.

    :raises KvmMissing: it is not there, or may not be opened
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as error:
        raise KvmMissing(
            f"{path} may not be opened: {error.strerror}; be root or join the group kvm "
            "(usermod -aG kvm $USER, then log in again)"
        ) from error
    except OSError as error:
        raise KvmMissing(
            f"{path} cannot be opened: {error.strerror}; KVM is not loaded, or this machine has no "
            "hardware virtualisation: use the lab (--machine lab)"
        ) from error
