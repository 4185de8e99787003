# SPDX-License-Identifier: Apache-2.0
"""What of the KVM ABI only x86 has: structures, with the kernel's names, and ioctl numbers.

Source: arch/x86/include/uapi/asm/kvm.h, include/uapi/linux/kvm.h
"""

import ctypes
from typing import ClassVar

from .ioctls import ior, iow, iowr

_u8, _u16, _u32, _u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64


class kvm_regs(ctypes.Structure):
    """Argument of KVM_GET_REGS and KVM_SET_REGS."""

    _fields_: ClassVar = [
        (name, _u64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
            *("rip", "rflags"),
        )
    ]


class kvm_segment(ctypes.Structure):
    """A segment register."""

    _fields_: ClassVar = [
        ("base", _u64),
        ("limit", _u32),
        ("selector", _u16),
        *((name, _u8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable")),
        ("padding", _u8),
    ]


class kvm_dtable(ctypes.Structure):
    """GDTR or IDTR."""

    _fields_: ClassVar = [("base", _u64), ("limit", _u16), ("padding", _u16 * 3)]


class kvm_sregs(ctypes.Structure):
    """Argument of KVM_GET_SREGS and KVM_SET_SREGS."""

    _fields_: ClassVar = [
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        *((name, _u64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", _u64 * 4),
    ]


class kvm_cpuid2(ctypes.Structure):
    """The head of the argument of KVM_GET_SUPPORTED_CPUID and KVM_SET_CPUID2; ``nent`` entries follow."""

    _fields_: ClassVar = [("nent", _u32), ("padding", _u32)]


class kvm_cpuid_entry2(ctypes.Structure):
    """What CPUID answers to one question."""

    _fields_: ClassVar = [
        *((name, _u32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", _u32 * 3),
    ]


class kvm_msr_list(ctypes.Structure):
    """The head of the argument of KVM_GET_MSR_INDEX_LIST; ``nmsrs`` numbers of 32 bits follow."""

    _fields_: ClassVar = [("nmsrs", _u32)]


class kvm_msrs(ctypes.Structure):
    """The head of the argument of KVM_GET_MSRS; ``nmsrs`` entries follow."""

    _fields_: ClassVar = [("nmsrs", _u32), ("pad", _u32)]


class kvm_msr_entry(ctypes.Structure):
    """A model-specific register."""

    _fields_: ClassVar = [("index", _u32), ("reserved", _u32), ("data", _u64)]


class kvm_xsave(ctypes.Structure):
    """Argument of KVM_GET_XSAVE."""

    _fields_: ClassVar = [("region", _u32 * 1024)]


class kvm_debugregs(ctypes.Structure):
    """Argument of KVM_GET_DEBUGREGS."""

    _fields_: ClassVar = [
        ("db", _u64 * 4),
        ("dr6", _u64),
        ("dr7", _u64),
        ("flags", _u64),
        ("reserved", _u64 * 9),
    ]


# System descriptor.
KVM_GET_MSR_INDEX_LIST = iowr(0x02, kvm_msr_list)
KVM_GET_SUPPORTED_CPUID = iowr(0x05, kvm_cpuid2)

# vCPU descriptor.
KVM_GET_REGS = ior(0x81, kvm_regs)
KVM_SET_REGS = iow(0x82, kvm_regs)
KVM_GET_SREGS = ior(0x83, kvm_sregs)
KVM_SET_SREGS = iow(0x84, kvm_sregs)
KVM_GET_MSRS = iowr(0x88, kvm_msrs)
KVM_SET_CPUID2 = iow(0x90, kvm_cpuid2)
KVM_GET_DEBUGREGS = ior(0xA1, kvm_debugregs)
KVM_GET_XSAVE = ior(0xA4, kvm_xsave)

COUNTERS = frozenset(
    (
        0x10,  # MSR_IA32_TSC
        0x4000_0010,  # HV_X64_MSR_VP_RUNTIME
        0x4000_0020,  # HV_X64_MSR_TIME_REF_COUNT
    )
)
"""Model-specific registers that never rest.

Source: arch/x86/include/asm/msr-index.h, include/hyperv/hvgdk_mini.h
"""
