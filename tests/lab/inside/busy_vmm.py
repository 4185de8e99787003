# SPDX-License-Identifier: Apache-2.0
"""A VMM at work while a plan is applied to it: two vCPUs compute, and ask a device again and again.

Between exits it sleeps a little, so that its threads are stopped in the guest, in the kernel and outside of
it. It prints that it is ready. For each line of its input it says how many rounds its guests have done; after
``go`` it has them walk the plan's memory, and says what they took: ``python3 busy_vmm.py MIB [kick]``. With
``kick`` its vCPUs get signals all the time.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time

from prefault.guest import port
from prefault.guest.program import DeviceRead, Expect, Marker, Program, Report, Step, Walk
from prefault.kvm import open_host
from prefault.machine import Exit, Interrupted, MemoryRegion, MmioExit, Resident, Vcpu, VcpuConfig, VmConfig

CODE = 0x4000_0000
SMALL = 0x6000_0000
DATA = 0x1_0000_0000
DEVICE = 0x0A00_0000
VCPUS = 2
MIB = 1 << 20
ROUNDS = 100
"""Of a program, which is run again and again."""
SPIN = 16 << 10


def answer(index: int, round_: int) -> int:
    """What the device says to a vCPU."""
    return 0xABCD_0000_0000_0000 | index << 32 | round_


def work(index: int) -> tuple[Step, ...]:
    """Rounds of computing and asking."""
    found: list[Step] = []
    for round_ in range(ROUNDS):
        found += [Walk(SMALL + index * MIB, SPIN, 8), DeviceRead(DEVICE), Expect(answer(index, round_))]
    return tuple(found)


def walk(index: int, size: int) -> tuple[Step, ...]:
    """A walk of the plan's memory."""
    return (Marker(1), Walk(DATA + index * size, size, 4096), Report())


class Worker:
    """A vCPU's thread."""

    def __init__(
        self, vcpu: Vcpu, index: int, programs: tuple[Program, Program], go: threading.Event
    ) -> None:
        self.vcpu, self.index, self.go = vcpu, index, go
        self.work, self.walk = programs
        self.interrupted = self.rounds = self.signals = 0
        self.ended = ""
        self.values: list[int] = []
        self.at_marker = threading.Event()
        self.proceed = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def kick(self) -> None:
        """What a VMM does to have its vCPU's attention: a signal with a handler."""
        signal.pthread_kill(self.thread.ident or 0, signal.SIGUSR1)
        self.signals += 1

    def run(self) -> None:
        """Run the guest to its end, and note what is seen."""
        try:
            self._run()
        except Exception as error:  # the main thread tells it
            self.ended = repr(error)
        self.at_marker.set()

    def _run(self) -> None:
        ended: Exit = port.Done()
        while ended == port.Done() and not self.go.is_set():
            self.vcpu.load(self.work)
            ended = self._run_program()
        if ended == port.Done():
            self.vcpu.load(self.walk)
            ended = self._run_program()
        self.ended = repr(ended)

    def _run_program(self) -> Exit:
        """Up to its end, or to what must not come."""
        while True:
            exit_ = port.proceed(self.vcpu)
            if isinstance(exit_, MmioExit) and not exit_.is_write:
                self._answer()
            elif isinstance(exit_, Interrupted):
                self.interrupted += 1
            elif exit_ == port.AtMarker(1):
                self.at_marker.set()
                self.proceed.wait()
            elif isinstance(exit_, port.Reported):
                self.values.append(exit_.value)
            else:
                return exit_

    def _answer(self) -> None:
        """Take the time that a device takes."""
        if self.rounds % 3 == 0:
            time.sleep(0.002)
        self.vcpu.complete_mmio(answer(self.index, self.rounds % ROUNDS))
        self.rounds += 1


class Kicker(threading.Thread):
    """Kicks vCPUs now and then."""

    def __init__(self, workers: list[Worker]) -> None:
        super().__init__()
        self._workers = workers
        self._over = threading.Event()

    def run(self) -> None:
        """Until the end."""
        while self._workers and not self._over.wait(0.01):
            for one in self._workers:
                one.kick()

    def end(self) -> None:
        """Stop kicking."""
        self._over.set()
        self.join()


def main() -> None:
    """Do what the module says."""
    size = int(sys.argv[1]) * MIB
    signal.signal(signal.SIGUSR1, lambda *_: None)
    with open_host() as kvm, kvm.create_vm(VmConfig()) as vm:
        code = MemoryRegion(0, CODE, VCPUS * 2 * MIB, resident=Resident.WRITE)
        vm.set_user_memory_region(code)
        vm.set_user_memory_region(MemoryRegion(1, SMALL, VCPUS * MIB, resident=Resident.WRITE))
        vm.set_user_memory_region(MemoryRegion(2, DATA, VCPUS * size, resident=Resident.WRITE))
        go, workers = threading.Event(), []
        for index in range(VCPUS):
            base = CODE + index * 2 * MIB
            programs = Program(work(index), base), Program(walk(index, size), base + MIB)
            for program in programs:
                assert vm.program_size(program) <= MIB
                vm.install(program)
            vcpu = vm.create_vcpu(VcpuConfig())
            for page in range(DATA + index * size, DATA + (index + 1) * size, 4096):
                vm.write_memory(page, page.to_bytes(8, "little"))
            workers.append(Worker(vcpu, index, programs, go))
        for one in workers:
            one.thread.start()
        kicker = Kicker(workers if "kick" in sys.argv else [])
        kicker.start()
        print("ready", flush=True)
        for line in sys.stdin:
            if line == "go\n":
                break
            print(json.dumps([one.rounds for one in workers]), flush=True)
        kicker.end()
        go.set()
        for one in workers:
            one.at_marker.wait()
        with vm.count_faults() as counts:
            for one in workers:
                one.proceed.set()
            for one in workers:
                one.thread.join()
        told = {
            "rounds": [one.rounds for one in workers],
            "signals": [one.signals for one in workers],
            "interrupted": [one.interrupted for one in workers],
            "ended": [one.ended for one in workers],
            "values": [one.values for one in workers],
            "faults": sum(DATA <= ipa < DATA + VCPUS * size for ipa in counts.ipas),
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
