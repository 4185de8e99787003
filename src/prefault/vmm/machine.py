# SPDX-License-Identifier: Apache-2.0
"""The VM with its memory, vCPUs, GIC and serial port, ready to be loaded and run."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator

from prefault.abi import arm64, constants
from prefault.closing import Closing
from prefault.errors import CapabilityMissing
from prefault.kvm.system import Kvm
from prefault.kvm.vm import Vm
from prefault.machine import Backing, MemoryRegion, VcpuConfig, VmConfig
from prefault.vmm import devicetree
from prefault.vmm.bus import Bus
from prefault.vmm.config import IRQS, RAM_BASE, UART_SPI, GuestConfig
from prefault.vmm.console import Console
from prefault.vmm.image import Image, place
from prefault.vmm.uart import Pl011

_SEED_SIZE = 64
_PSTATE_EL1H_MASKED = 0x3C5
_PSTATE_EL2H_MASKED = 0x3C9


class Machine(Closing):
    """A guest's hardware. Its vCPUs are powered off but for the first.

    :param out: given what the guest says
    :param contents: descriptor of a file whose private mapping is the memory, or -1; then the guest's own
        backing is not used
    :raises CapabilityMissing: this KVM has no GICv3, or lacks what the backing or the vCPUs need
    """

    def __init__(
        self, kvm: Kvm, guest: GuestConfig, out: Callable[[bytes], None], *, contents: int = -1
    ) -> None:
        self.guest = guest
        self.vm = _create_vm(kvm)
        try:
            self.vm.gic.set_attribute(arm64.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, IRQS)
            self.vcpus = [self.vm.create_vcpu(VcpuConfig(el2=guest.el2)) for _ in range(guest.vcpus)]
            for vcpu in self.vcpus[1:]:
                vcpu.set_mp_state(constants.KVM_MP_STATE_STOPPED)
            self.console = Console(out)
            self.uart = Pl011(self.console.send, lambda level: self.vm.set_spi(UART_SPI, level))
            self.bus = Bus(self.uart)
            self._set_memory(contents)
        except BaseException:
            self.vm.close()
            raise

    def _set_memory(self, contents: int) -> None:
        guest = self.guest
        with _empty_file(guest) as empty:
            file = contents if contents >= 0 else empty
            backing = Backing.FILE_PRIVATE if contents >= 0 else guest.backing
            region = MemoryRegion(
                0, RAM_BASE, guest.memory, backing, guest.resident, page_size=guest.huge_page_size
            )
            self.vm.set_user_memory_region(region, file)

    @property
    def memory(self) -> memoryview:
        """The guest's memory as the host has it. Not to be touched where somebody else has yet to fill it."""
        hva = self.vm.hva_of(RAM_BASE)
        return memoryview((ctypes.c_ubyte * self.guest.memory).from_address(hva)).cast("B")

    def load_linux(self, image: Image, initrd: bytes, command_line: str) -> None:
        """Put a kernel where the first vCPU starts it.

        :raises UsageError: the guest has not enough memory
        """
        placement = place(image, len(initrd), self.guest.memory)
        where = (placement.initrd, placement.initrd + len(initrd)) if initrd else None
        tree = devicetree.build(self.guest, command_line, where, os.urandom(_SEED_SIZE))
        self.vm.write_memory(placement.kernel, image.data)
        self.vm.write_memory(placement.dtb, tree)
        if initrd:
            self.vm.write_memory(placement.initrd, initrd)
        first = self.vcpus[0]
        first.set_register("x0", placement.dtb)
        first.set_register("pc", placement.kernel)
        first.set_register("pstate", _PSTATE_EL2H_MASKED if self.guest.el2 else _PSTATE_EL1H_MASKED)

    def pre_fault(self, ranges: list[tuple[int, int]]) -> int:
        """Pre-fault ranges of guest memory, (ipa, size) each; returns the bytes.

        :raises CapabilityMissing: the kernel cannot
        :raises KvmError: it failed on the way
        """
        for ipa, size in ranges:
            self.vcpus[0].pre_fault_memory(ipa, size)
        return sum(size for _, size in ranges)

    def close(self) -> None:
        """Close the VM. Safe to call again."""
        self.vm.close()


@contextlib.contextmanager
def _empty_file(guest: GuestConfig) -> Iterator[int]:
    """For Backing.FILE_PRIVATE, a file that holds zeroes; the mapping keeps it."""
    if guest.backing is not Backing.FILE_PRIVATE:
        yield -1
        return
    fd = os.memfd_create("prefault-guest")
    try:
        os.ftruncate(fd, guest.memory)
        yield fd
    finally:
        os.close(fd)


def _create_vm(kvm: Kvm) -> Vm:
    """A VM with a GICv3; what it means for a guest where there can be none.

    :raises CapabilityMissing: there can be none
    """
    try:
        return kvm.create_vm(VmConfig())
    except CapabilityMissing as error:
        raise CapabilityMissing(
            "this host's KVM has no GICv3 for guests, and Linux needs it here: use the lab, which has one "
            f"(--machine lab); {error}"
        ) from error
