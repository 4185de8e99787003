# SPDX-License-Identifier: Apache-2.0
"""Inside the lab: the documentation's loop in C, called on a vCPU of ours; prints a line of JSON."""

from __future__ import annotations

import ctypes
import json

from prefault.guest import port
from prefault.guest.program import Marker, Program, Walk
from prefault.kvm import open_kvm
from prefault.machine import MemoryRegion, Resident, VcpuConfig, VmConfig

CODE, DATA, SIZE, PAGE = 0x4000_0000, 0x1_0000_0000, 4 << 20, 4096


def main() -> None:
    """Pre-fault all of a slot and more."""
    library = ctypes.CDLL("/loop.so")
    with open_kvm() as kvm, kvm.create_vm(VmConfig()) as vm:
        vm.set_user_memory_region(MemoryRegion(0, CODE, 2 << 20, resident=Resident.WRITE))
        vm.set_user_memory_region(MemoryRegion(1, DATA, SIZE, resident=Resident.WRITE))
        program = Program((Marker(0), Walk(DATA, SIZE, PAGE), Marker(1)), CODE)
        vm.install(program)
        vcpu = vm.create_vcpu(VcpuConfig())
        vcpu.load(program)
        port.proceed(vcpu)
        gpa = ctypes.c_uint64(DATA)
        result = library.pre_fault(vcpu.fd, ctypes.byref(gpa), ctypes.c_uint64(SIZE + PAGE))
        with vm.count_faults() as counts:
            port.proceed(vcpu)
    print(json.dumps({"result": result, "gpa": gpa.value, "faults": counts.total}))


if __name__ == "__main__":
    main()
