# SPDX-License-Identifier: Apache-2.0
"""What must hold of non-protected VMs on a host that can make protected ones, kvm-arm.mode=protected.

There, the first pre-fault of a vCPU that has not run makes the configuration of its VM final, as the first
KVM_RUN does everywhere: the hypervisor copies it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from prefault.abi import arm64, structures
from prefault.kvm.vm import Vm
from prefault.machine import MemoryRegion, Resident, VcpuConfig, VmConfig
from tests.lab.inside.checks import Checks, main
from tests.lab.inside.guests import CODE, DATA, MIB, PAGE, data_region, kvm

checks = Checks()
UNINITIALISED = VcpuConfig(initialised=False)


@contextmanager
def _vm_without_a_gic() -> Iterator[Vm]:
    with kvm().create_vm(VmConfig(gic=False)) as vm:
        vm.set_user_memory_region(MemoryRegion(0, CODE, MIB, resident=Resident.WRITE))
        vm.set_user_memory_region(data_region(MIB, resident=Resident.WRITE))
        yield vm


def _creates_a_gic(vm: Vm) -> int:
    """Ask whether a GIC could be created; 0 or the error number."""
    request = structures.kvm_create_device(arm64.KVM_DEV_TYPE_ARM_VGIC_V3)
    return vm.try_ioctl("KVM_CREATE_DEVICE", request)[1]


@checks
def a_vm_whose_vcpus_never_ran_can_be_given_a_gic() -> None:
    with _vm_without_a_gic() as vm:
        vm.create_vcpu()
        assert _creates_a_gic(vm) == 0


@checks
def a_vm_is_final_once_memory_was_pre_faulted() -> None:
    with _vm_without_a_gic() as vm:
        vcpus = [vm.create_vcpu() for _ in range(2)]
        vcpus[1].pre_fault_memory(DATA, PAGE)
        assert _creates_a_gic(vm) == errno.EBUSY


@checks
def a_pre_fault_of_a_vcpu_that_is_not_initialised_makes_nothing_final() -> None:
    with _vm_without_a_gic() as vm:
        progress = vm.create_vcpu(UNINITIALISED).pre_fault_memory_once(DATA, PAGE)
        assert progress.errno == errno.ENOEXEC, progress
        assert _creates_a_gic(vm) == 0


if __name__ == "__main__":
    main(checks)
