# SPDX-License-Identifier: Apache-2.0
"""What only arm64 has: vCPU features, register ids, the GICv3 device.

Source: arch/arm64/include/uapi/asm/kvm.h, include/uapi/linux/kvm.h
"""

# Features of KVM_ARM_VCPU_INIT, by bit.
KVM_ARM_VCPU_POWER_OFF = 0
KVM_ARM_VCPU_PSCI_0_2 = 2
KVM_ARM_VCPU_PMU_V3 = 3
KVM_ARM_VCPU_SVE = 4
KVM_ARM_VCPU_HAS_EL2 = 7
KVM_ARM_VCPU_HAS_EL2_E2H0 = 8

# Devices.
KVM_DEV_TYPE_ARM_VGIC_V3 = 7
KVM_DEV_ARM_VGIC_GRP_ADDR = 0
KVM_DEV_ARM_VGIC_GRP_DIST_REGS = 1
KVM_DEV_ARM_VGIC_GRP_NR_IRQS = 3
KVM_DEV_ARM_VGIC_GRP_CTRL = 4
KVM_DEV_ARM_VGIC_GRP_REDIST_REGS = 5
KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS = 6
KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO = 7
KVM_DEV_ARM_VGIC_CTRL_INIT = 0
KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT = 32
KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT = 10
VGIC_LEVEL_INFO_LINE_LEVEL = 0
KVM_VGIC_V3_ADDR_TYPE_DIST = 2
KVM_VGIC_V3_ADDR_TYPE_REDIST = 3
KVM_VGIC_V3_DIST_SIZE = 0x1_0000
KVM_VGIC_V3_REDIST_SIZE = 0x2_0000

# Interrupts of KVM_IRQ_LINE.
KVM_ARM_IRQ_TYPE_SHIFT = 24
KVM_ARM_IRQ_TYPE_SPI = 1

# Register ids.
KVM_REG_ARM64 = 0x6000000000000000
KVM_REG_SIZE_U64 = 0x0030000000000000
KVM_REG_SIZE_SHIFT = 52
KVM_REG_SIZE_MASK = 0x00F0000000000000
KVM_REG_ARM_COPROC_SHIFT = 16
KVM_REG_ARM_CORE = 0x0010 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM64_SYSREG = 0x0013 << KVM_REG_ARM_COPROC_SHIFT

# The counters, by the ids that the kernel's list of registers has for them. The first is CNTVCT_EL0's under a
# number that was meant for another register and is ABI now.
KVM_REG_ARM_TIMER_CNT = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG | 0xDF1A
KVM_REG_ARM_PTIMER_CNT = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG | 0xDF01
COUNTERS = (KVM_REG_ARM_TIMER_CNT, KVM_REG_ARM_PTIMER_CNT)
"""The virtual and the physical counter. They are the VM's, not a vCPU's, and go on while they are read."""

# Byte offsets of the 64-bit core registers in struct kvm_regs; x0 to x30 come first.
CORE_OFFSETS = {f"x{number}": 8 * number for number in range(31)} | {
    "sp_el0": 248,
    "pc": 256,
    "pstate": 264,
    "sp_el1": 272,
    "elr_el1": 280,
    "spsr_el1": 288,
}

# Encodings (op0, op1, CRn, CRm, op2) of the system registers that get_register() knows.
SYSTEM_REGISTERS = {
    "midr_el1": (3, 0, 0, 0, 0),
    "mpidr_el1": (3, 0, 0, 0, 5),
    "id_aa64pfr0_el1": (3, 0, 0, 4, 0),
    "id_aa64mmfr0_el1": (3, 0, 0, 7, 0),
    "id_aa64mmfr1_el1": (3, 0, 0, 7, 1),
    "id_aa64mmfr2_el1": (3, 0, 0, 7, 2),
    "id_aa64mmfr4_el1": (3, 0, 0, 7, 4),
    "sctlr_el1": (3, 0, 1, 0, 0),
    "cpacr_el1": (3, 0, 1, 0, 2),
    "ttbr0_el1": (3, 0, 2, 0, 0),
    "ttbr1_el1": (3, 0, 2, 0, 1),
    "tcr_el1": (3, 0, 2, 0, 2),
    "esr_el1": (3, 0, 5, 2, 0),
    "far_el1": (3, 0, 6, 0, 0),
    "par_el1": (3, 0, 7, 4, 0),
    "mair_el1": (3, 0, 10, 2, 0),
    "vbar_el1": (3, 0, 12, 0, 0),
    "contextidr_el1": (3, 0, 13, 0, 1),
    "tpidr_el1": (3, 0, 13, 0, 4),
    "tpidr_el0": (3, 3, 13, 0, 2),
    "vpidr_el2": (3, 4, 0, 0, 0),
    "vmpidr_el2": (3, 4, 0, 0, 5),
    "sctlr_el2": (3, 4, 1, 0, 0),
    "hcr_el2": (3, 4, 1, 1, 0),
    "mdcr_el2": (3, 4, 1, 1, 1),
    "cptr_el2": (3, 4, 1, 1, 2),
    "hstr_el2": (3, 4, 1, 1, 3),
    "ttbr0_el2": (3, 4, 2, 0, 0),
    "ttbr1_el2": (3, 4, 2, 0, 1),
    "tcr_el2": (3, 4, 2, 0, 2),
    "vttbr_el2": (3, 4, 2, 1, 0),
    "vtcr_el2": (3, 4, 2, 1, 2),
    "spsr_el2": (3, 4, 4, 0, 0),
    "elr_el2": (3, 4, 4, 0, 1),
    "sp_el2": (3, 6, 4, 1, 0),
    "esr_el2": (3, 4, 5, 2, 0),
    "far_el2": (3, 4, 6, 0, 0),
    "hpfar_el2": (3, 4, 6, 0, 4),
    "mair_el2": (3, 4, 10, 2, 0),
    "vbar_el2": (3, 4, 12, 0, 0),
    "tpidr_el2": (3, 4, 13, 0, 2),
}


def core_register_id(offset: int) -> int:
    """The id of the 64-bit core register at a byte offset of ``struct kvm_regs``."""
    return KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | offset // 4


def system_register_id(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """The id of an AArch64 system register by its encoding (ARM64_SYS_REG)."""
    encoding = op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
    return KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG | encoding


def register_size(register: int) -> int:
    """The size of a register by its id."""
    return 1 << ((register & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT)


def register_id(name: str) -> int | None:
    """The id of a register by its architectural name, or None if this module has no such name."""
    name = name.lower()
    name = {"sp": "sp_el0"}.get(name, name)
    if name in CORE_OFFSETS:
        return core_register_id(CORE_OFFSETS[name])
    if name in SYSTEM_REGISTERS:
        return system_register_id(*SYSTEM_REGISTERS[name])
    return None


_NAMES = {core_register_id(offset): name for name, offset in CORE_OFFSETS.items()} | {
    system_register_id(*encoding): name for name, encoding in SYSTEM_REGISTERS.items()
}


def register_name(register: int) -> str:
    """The architectural name of a register by its id: as assemblers have it (S3_0_C4_C6_0), or the id."""
    if register & ~0xFFFF == KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG:
        code = register & 0xFFFF
        parts = (code >> 14, code >> 11 & 7, code >> 7 & 15, code >> 3 & 15, code & 7)
        return _NAMES.get(register, "S{}_{}_C{}_C{}_{}".format(*parts))
    return _NAMES.get(register, f"{register:#x}")
