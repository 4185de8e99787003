# SPDX-License-Identifier: Apache-2.0
"""KVM's user-space ABI: numbers and structures, nothing that does anything.

Names are the kernel's. ``tests/abi`` compiles every one of them against the kernel's own headers.
This package imports nothing of the project.

Source: include/uapi/linux/kvm.h, arch/arm64/include/uapi/asm/kvm.h
"""
