# SPDX-License-Identifier: Apache-2.0
"""Ioctl numbers of the KVM ABI, in the encoding of x86, arm64, riscv and s390.

Source: include/uapi/asm-generic/ioctl.h, include/uapi/linux/kvm.h
"""

import ctypes

from . import structures

KVMIO = 0xAE

_NONE, _WRITE, _READ = 0, 1, 2


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | KVMIO << 8 | number


def io(number: int) -> int:
    """An ioctl without an argument."""
    return _ioc(_NONE, number, 0)


def iow(number: int, argument: type[ctypes.Structure]) -> int:
    """An ioctl whose argument the kernel reads."""
    return _ioc(_WRITE, number, ctypes.sizeof(argument))


def ior(number: int, argument: type[ctypes.Structure]) -> int:
    """An ioctl whose argument the kernel writes."""
    return _ioc(_READ, number, ctypes.sizeof(argument))


def iowr(number: int, argument: type[ctypes.Structure]) -> int:
    """An ioctl whose argument the kernel reads and writes."""
    return _ioc(_READ | _WRITE, number, ctypes.sizeof(argument))


# System descriptor.
KVM_GET_API_VERSION = io(0x00)
KVM_CREATE_VM = io(0x01)
KVM_CHECK_EXTENSION = io(0x03)
KVM_GET_VCPU_MMAP_SIZE = io(0x04)

# VM descriptor.
KVM_CREATE_VCPU = io(0x41)
KVM_GET_DIRTY_LOG = iow(0x42, structures.kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION = iow(0x46, structures.kvm_userspace_memory_region)
KVM_IRQ_LINE = iow(0x61, structures.kvm_irq_level)
KVM_SET_USER_MEMORY_REGION2 = iow(0x49, structures.kvm_userspace_memory_region2)
KVM_ENABLE_CAP = iow(0xA3, structures.kvm_enable_cap)
KVM_RESET_DIRTY_RINGS = io(0xC7)
KVM_ARM_PREFERRED_TARGET = ior(0xAF, structures.kvm_vcpu_init)
KVM_CREATE_GUEST_MEMFD = iowr(0xD4, structures.kvm_create_guest_memfd)
KVM_CREATE_DEVICE = iowr(0xE0, structures.kvm_create_device)

# vCPU descriptor.
KVM_RUN = io(0x80)
KVM_GET_MP_STATE = ior(0x98, structures.kvm_mp_state)
KVM_SET_MP_STATE = iow(0x99, structures.kvm_mp_state)
KVM_GET_VCPU_EVENTS = ior(0x9F, structures.kvm_vcpu_events)
KVM_SET_VCPU_EVENTS = iow(0xA0, structures.kvm_vcpu_events)
KVM_GET_ONE_REG = iow(0xAB, structures.kvm_one_reg)
KVM_SET_ONE_REG = iow(0xAC, structures.kvm_one_reg)
KVM_GET_REG_LIST = iowr(0xB0, structures.kvm_reg_list)
KVM_ARM_VCPU_INIT = iow(0xAE, structures.kvm_vcpu_init)
KVM_PRE_FAULT_MEMORY = iowr(0xD5, structures.kvm_pre_fault_memory)

# Device descriptor.
KVM_SET_DEVICE_ATTR = iow(0xE1, structures.kvm_device_attr)
KVM_GET_DEVICE_ATTR = iow(0xE2, structures.kvm_device_attr)
KVM_HAS_DEVICE_ATTR = iow(0xE3, structures.kvm_device_attr)
