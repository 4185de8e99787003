# SPDX-License-Identifier: Apache-2.0
"""Structures of the KVM ABI, with the kernel's names for types and members.

Source: include/uapi/linux/kvm.h, arch/arm64/include/uapi/asm/kvm.h
"""

import ctypes
from typing import ClassVar

_u8, _u16, _u32, _u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64


class kvm_userspace_memory_region(ctypes.Structure):
    """Argument of KVM_SET_USER_MEMORY_REGION."""

    _fields_: ClassVar = [
        ("slot", _u32),
        ("flags", _u32),
        ("guest_phys_addr", _u64),
        ("memory_size", _u64),
        ("userspace_addr", _u64),
    ]


class kvm_userspace_memory_region2(ctypes.Structure):
    """Argument of KVM_SET_USER_MEMORY_REGION2."""

    _fields_: ClassVar = [
        ("slot", _u32),
        ("flags", _u32),
        ("guest_phys_addr", _u64),
        ("memory_size", _u64),
        ("userspace_addr", _u64),
        ("guest_memfd_offset", _u64),
        ("guest_memfd", _u32),
        ("pad1", _u32),
        ("pad2", _u64 * 14),
    ]


class kvm_dirty_log(ctypes.Structure):
    """Argument of KVM_GET_DIRTY_LOG. ``dirty_bitmap`` shares its bytes with ``padding2``."""

    _fields_: ClassVar = [("slot", _u32), ("padding1", _u32), ("dirty_bitmap", _u64)]


class kvm_dirty_gfn(ctypes.Structure):
    """An entry of a dirty ring."""

    _fields_: ClassVar = [("flags", _u32), ("slot", _u32), ("offset", _u64)]


class kvm_enable_cap(ctypes.Structure):
    """Argument of KVM_ENABLE_CAP."""

    _fields_: ClassVar = [("cap", _u32), ("flags", _u32), ("args", _u64 * 4), ("pad", _u8 * 64)]


class kvm_reg_list(ctypes.Structure):
    """The head of KVM_GET_REG_LIST's argument; ``n`` ids of 64 bits follow."""

    _fields_: ClassVar = [("n", _u64)]


class kvm_one_reg(ctypes.Structure):
    """Argument of KVM_GET_ONE_REG and KVM_SET_ONE_REG."""

    _fields_: ClassVar = [("id", _u64), ("addr", _u64)]


class kvm_mp_state(ctypes.Structure):
    """Argument of KVM_GET_MP_STATE and KVM_SET_MP_STATE."""

    _fields_: ClassVar = [("mp_state", _u32)]


class _exception(ctypes.Structure):
    _fields_: ClassVar = [
        ("serror_pending", _u8),
        ("serror_has_esr", _u8),
        ("ext_dabt_pending", _u8),
        ("pad", _u8 * 5),
        ("serror_esr", _u64),
    ]


class kvm_vcpu_events(ctypes.Structure):
    """Argument of KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS (arm64)."""

    _fields_: ClassVar = [("exception", _exception), ("reserved", _u32 * 12)]


class kvm_irq_level(ctypes.Structure):
    """Argument of KVM_IRQ_LINE."""

    _fields_: ClassVar = [("irq", _u32), ("level", _u32)]


class kvm_create_device(ctypes.Structure):
    """Argument of KVM_CREATE_DEVICE."""

    _fields_: ClassVar = [("type", _u32), ("fd", _u32), ("flags", _u32)]


class kvm_device_attr(ctypes.Structure):
    """Argument of KVM_SET_DEVICE_ATTR, KVM_GET_DEVICE_ATTR and KVM_HAS_DEVICE_ATTR."""

    _fields_: ClassVar = [("flags", _u32), ("group", _u32), ("attr", _u64), ("addr", _u64)]


class kvm_create_guest_memfd(ctypes.Structure):
    """Argument of KVM_CREATE_GUEST_MEMFD."""

    _fields_: ClassVar = [("size", _u64), ("flags", _u64), ("reserved", _u64 * 6)]


class kvm_pre_fault_memory(ctypes.Structure):
    """Argument of KVM_PRE_FAULT_MEMORY; the kernel writes progress back into gpa and size."""

    _fields_: ClassVar = [("gpa", _u64), ("size", _u64), ("flags", _u64), ("padding", _u64 * 5)]


class kvm_vcpu_init(ctypes.Structure):
    """Argument of KVM_ARM_VCPU_INIT (arm64)."""

    _fields_: ClassVar = [("target", _u32), ("features", _u32 * 7)]


class _fail_entry(ctypes.Structure):
    _fields_: ClassVar = [("hardware_entry_failure_reason", _u64), ("cpu", _u32)]


class _mmio(ctypes.Structure):
    _fields_: ClassVar = [("phys_addr", _u64), ("data", _u8 * 8), ("len", _u32), ("is_write", _u8)]


class _internal(ctypes.Structure):
    _fields_: ClassVar = [("suberror", _u32), ("ndata", _u32), ("data", _u64 * 16)]


class _system_event(ctypes.Structure):
    _fields_: ClassVar = [("type", _u32), ("ndata", _u32), ("data", _u64 * 16)]


class _arm_nisv(ctypes.Structure):
    _fields_: ClassVar = [("esr_iss", _u64), ("fault_ipa", _u64)]


class _memory_fault(ctypes.Structure):
    _fields_: ClassVar = [("flags", _u64), ("gpa", _u64), ("size", _u64)]


class _arm_sea(ctypes.Structure):
    _fields_: ClassVar = [("flags", _u64), ("esr", _u64), ("gva", _u64), ("gpa", _u64)]


class _exit_union(ctypes.Union):
    """What an exit carries. Only members that arm64 guests can meet are here."""

    _fields_: ClassVar = [
        ("fail_entry", _fail_entry),
        ("mmio", _mmio),
        ("internal", _internal),
        ("system_event", _system_event),
        ("arm_nisv", _arm_nisv),
        ("memory_fault", _memory_fault),
        ("arm_sea", _arm_sea),
        ("padding", _u8 * 256),
    ]


class kvm_run(ctypes.Structure):
    """The page that a vCPU shares with its VMM, up to the end of the exit union.

    Not for s390, which has two more members before the union.
    """

    _anonymous_: ClassVar = ["exit"]
    _fields_: ClassVar = [
        ("request_interrupt_window", _u8),
        ("immediate_exit", _u8),
        ("padding1", _u8 * 6),
        ("exit_reason", _u32),
        ("ready_for_interrupt_injection", _u8),
        ("if_flag", _u8),
        ("flags", _u16),
        ("cr8", _u64),
        ("apic_base", _u64),
        ("exit", _exit_union),
    ]
