# SPDX-License-Identifier: Apache-2.0
"""A small VMM for recordings: two vCPU threads, named as QEMU names them, that walk private memory.

It prints that it is ready, waits for a line on its standard input, runs its guests, prints what they touched
as JSON, and waits for the end of its input. ``python3 traced_vmm.py PAGES [nested]``.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from prefault.guest import port
from prefault.guest.program import EnterL2, L2Mapping, Program, Report, Step, Walk
from prefault.kvm import open_host
from prefault.machine import MemoryRegion, Resident, Vcpu, VcpuConfig, VmConfig

CODE = 0x4000_0000
DATA = 0x1_0000_0000
VCPUS = 2
CODE_BYTES = 2 << 20


def steps(start: int, size: int, nested: bool) -> tuple[Step, ...]:
    """Read all pages, report, write every other one: each of these breaks copy-on-write."""
    walk = (Walk(start, size, 4096), Report(), Walk(start, size, 4096, 500), Report())
    if not nested:
        return walk
    return (EnterL2(walk, (L2Mapping(start, start, size, 3),)), Report())


def run(vcpu: Vcpu, index: int, failures: list[str]) -> None:
    """Run one vCPU to the end of its program."""
    Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(f"CPU {index}/KVM")
    *_, last = port.events(vcpu)
    if last != port.Done():
        failures.append(f"vCPU {index} ended with {last}")


def main() -> None:
    """Do what the module says."""
    size, nested = int(sys.argv[1]) * 4096, "nested" in sys.argv
    with open_host() as kvm, kvm.create_vm(VmConfig()) as vm:
        code = MemoryRegion(0, CODE, VCPUS * CODE_BYTES, resident=Resident.WRITE)
        vm.set_user_memory_region(code)
        vm.set_user_memory_region(MemoryRegion(1, DATA, VCPUS * size, resident=Resident.NOTHING))
        threads, failures = [], list[str]()
        for index in range(VCPUS):
            program = Program(steps(DATA + index * size, size, nested), CODE + index * CODE_BYTES)
            vm.install(program)
            vcpu = vm.create_vcpu(VcpuConfig(el2=nested))
            vcpu.load(program)
            threads.append(threading.Thread(target=run, args=(vcpu, index, failures)))
        print("ready", flush=True)
        sys.stdin.readline()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(json.dumps({"failures": failures, "data": DATA, "size": VCPUS * size}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
