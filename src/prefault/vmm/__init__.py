# SPDX-License-Identifier: Apache-2.0
"""A small VMM: boots an arm64 Linux Image on KVM, snapshots it, and restores it in several ways.

It has what a Linux guest needs and no more: memory, vCPUs, the in-kernel GICv3 and timers, PSCI by
KVM, a PL011 console, a device tree. It also runs inside the lab and inside its guests: besides the
standard library it needs only the pure-Python package ``fdt``, which the lab's payload carries.

``machine.Machine`` is the VM with its devices, ``run.run`` runs it to its end, ``snapshot`` has the
files, ``state`` the registers, ``pager`` serves memory while the guest runs.
"""
