# SPDX-License-Identifier: Apache-2.0
"""The system descriptor of the spec."""

from __future__ import annotations

import errno

from prefault.abi import constants
from prefault.closing import Closing
from prefault.errors import CapabilityMissing, KvmError, UsageError
from prefault.machine import VmConfig
from prefault.spec.state import Faults, Host, HostConfig
from prefault.spec.vm import SpecVm, check_extension

_MIN_IPA_BITS = 32


class SpecKvm(Closing):
    """/dev/kvm of a host that is a Python object.

    :ivar host: its memory, and the address space of the VMM
    """

    def __init__(self, config: HostConfig, faults: Faults) -> None:
        self.host = Host(config, faults)
        self._vms: list[SpecVm] = []

    @property
    def name(self) -> str:
        """Which back end this is."""
        return "spec"

    @property
    def page_size(self) -> int:
        """The host's page size."""
        return self.host.config.page_size

    @property
    def shows_stage2(self) -> bool:
        """The specification shows its tables."""
        return True

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on the system descriptor."""
        return check_extension(self.host, capability)

    def create_vm(self, config: VmConfig = VmConfig()) -> SpecVm:  # noqa: B008 - frozen
        """KVM_CREATE_VM. Mirrors: kvm_init_ipa_range()

        :raises UsageError: the IPA space is larger than it can be
        :raises CapabilityMissing: protected VMs need a protected host
        """
        limit = self.host.config.ipa_limit
        if config.ipa_bits > limit:
            raise UsageError(f"an IPA space of {config.ipa_bits} bits is more than this host's {limit}")
        if config.ipa_bits and config.ipa_bits < _MIN_IPA_BITS:
            raise KvmError("KVM_CREATE_VM", errno.EINVAL, hint=f"machine type {config.ipa_bits:#x}")
        if config.protected and not self.host.config.protected:
            raise CapabilityMissing("this host makes no protected VMs; boot it with kvm-arm.mode=protected")
        if config.mte and not self.check_extension(constants.KVM_CAP_ARM_MTE):
            raise CapabilityMissing(
                "KVM_CAP_ARM_MTE is 0: guests cannot have memory tags here; use HostConfig(mte=True)"
            )
        vm = SpecVm(self.host, config)
        self._vms.append(vm)
        return vm

    def close(self) -> None:
        """Close the descriptor. Safe to call again."""
        while self._vms:
            self._vms.pop().close()


def open_spec(config: HostConfig = HostConfig(), faults: Faults = Faults()) -> SpecKvm:  # noqa: B008 - frozen
    """A new host with nothing on it."""
    return SpecKvm(config, faults)
