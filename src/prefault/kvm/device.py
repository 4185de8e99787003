# SPDX-License-Identifier: Apache-2.0
"""A device descriptor (KVM_CREATE_DEVICE), and the in-kernel GICv3.

Source: Documentation/virt/kvm/devices/arm-vgic-v3.rst
"""

from __future__ import annotations

import ctypes

from prefault.abi import arm64, structures
from prefault.errors import CapabilityMissing, KvmError
from prefault.kvm.descriptor import Descriptor

GIC_DISTRIBUTOR = 0x0800_0000
GIC_REDISTRIBUTORS = 0x080A_0000


class Device(Descriptor):
    """A device of a VM."""

    def set_attribute(self, group: int, attribute: int, value: int | None = None) -> None:
        """KVM_SET_DEVICE_ATTR, with a 64-bit value if there is one."""
        cell = ctypes.c_uint64(value or 0)
        address = 0 if value is None else ctypes.addressof(cell)
        self.ioctl("KVM_SET_DEVICE_ATTR", structures.kvm_device_attr(0, group, attribute, address))

    def try_get_attribute(self, group: int, attribute: int) -> tuple[int, int]:
        """KVM_GET_DEVICE_ATTR of a value of up to 64 bits: (value, errno)."""
        cell = ctypes.c_uint64()
        request = structures.kvm_device_attr(0, group, attribute, ctypes.addressof(cell))
        _, error = self.try_ioctl("KVM_GET_DEVICE_ATTR", request)
        return cell.value, error

    def get_attribute(self, group: int, attribute: int) -> int:
        """KVM_GET_DEVICE_ATTR of a value of up to 64 bits."""
        value, error = self.try_get_attribute(group, attribute)
        if error:
            raise KvmError("KVM_GET_DEVICE_ATTR", error, hint=f"group {group}, attribute {attribute:#x}")
        return value


def create_gic(vm: Descriptor) -> Device:
    """A GICv3 with its frames below the port; ``initialise_gic`` finishes it."""
    request = structures.kvm_create_device(arm64.KVM_DEV_TYPE_ARM_VGIC_V3)
    try:
        vm.ioctl("KVM_CREATE_DEVICE", request)
    except KvmError as error:
        raise CapabilityMissing(
            f"{error}; this host has no GICv3 for guests: "
            "VmConfig(gic=False) makes a VM without one, for vCPUs without EL2"
        ) from error
    gic = Device(request.fd)
    group = arm64.KVM_DEV_ARM_VGIC_GRP_ADDR
    try:
        gic.set_attribute(group, arm64.KVM_VGIC_V3_ADDR_TYPE_DIST, GIC_DISTRIBUTOR)
        gic.set_attribute(group, arm64.KVM_VGIC_V3_ADDR_TYPE_REDIST, GIC_REDISTRIBUTORS)
    except BaseException:
        gic.close()
        raise
    return gic


def initialise_gic(gic: Device) -> None:
    """After the last vCPU was created and before the first one runs."""
    gic.set_attribute(arm64.KVM_DEV_ARM_VGIC_GRP_CTRL, arm64.KVM_DEV_ARM_VGIC_CTRL_INIT)
