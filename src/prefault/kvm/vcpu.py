# SPDX-License-Identifier: Apache-2.0
"""A vCPU descriptor: what those of all architectures have, and arm64's."""

from __future__ import annotations

import ctypes
import errno
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from prefault.abi import arm64, constants, ioctls, structures
from prefault.errors import CapabilityMissing, KvmError, UsageError
from prefault.guest.compile import FIRST_ARGUMENT
from prefault.guest.program import MAX_ARGUMENTS, Program
from prefault.kvm import mapping, prefault
from prefault.kvm.descriptor import Descriptor, ioctl
from prefault.machine import (
    Exit,
    Failed,
    Interrupted,
    MemoryFault,
    MmioExit,
    OtherExit,
    PreFaultProgress,
    VcpuConfig,
)

_MMIO = struct.Struct("<8xI20xQ8sIB")
"""What of struct kvm_run an MMIO exit needs: reason, address, data, length, direction."""

_PSTATE_EL1H_MASKED = 0x3C5
_PSTATE_EL2H_MASKED = 0x3C9


class Bus(Protocol):
    """Devices, by guest physical address."""

    def read(self, gpa: int, width: int) -> int:
        """What a device answers to a read of ``width`` bytes."""

    def write(self, gpa: int, width: int, value: int) -> None:
        """Give a device ``width`` bytes."""


class AnyVcpu(Descriptor):
    """KVM's vCPU descriptor, of any architecture, with the page that it shares with its VMM.

    :param before_run: called before each KVM_RUN with the thread that will run
    :param can_pre_fault: whether the VM reports KVM_CAP_PRE_FAULT_MEMORY
    """

    def __init__(
        self,
        fd: int,
        mmap_size: int,
        config: VcpuConfig,
        before_run: Callable[[int], None],
        can_pre_fault: Callable[[], bool],
    ) -> None:
        super().__init__(fd)
        self._config = config
        self._before_run = before_run
        self._can_pre_fault = can_pre_fault
        self._mmap_size = mmap_size
        self._run_page = mapping.map_shared(fd, mmap_size)
        self._run = structures.kvm_run.from_address(self._run_page)

    def load(self, program: Program, arguments: Sequence[int] = ()) -> None:
        """Point the vCPU at ``program``, which ``Vm.install`` has put into guest memory."""
        if len(arguments) < program.argument_count or len(arguments) > MAX_ARGUMENTS:
            raise UsageError(
                f"the program uses {program.argument_count} of {MAX_ARGUMENTS} possible arguments, "
                f"{len(arguments)} were given"
            )
        if program.nested and not self._config.el2:
            raise UsageError("the program enters an L2; create its vCPU with VcpuConfig(el2=True)")
        self._complete_exit()
        self._start(program, arguments)

    def _start(self, program: Program, arguments: Sequence[int]) -> None:
        """Set the registers so that the vCPU begins with ``program``."""
        raise NotImplementedError

    def _complete_exit(self) -> None:
        """Let KVM finish the exit it is in, which would otherwise move the PC after it was set."""
        if self._run.exit_reason != constants.KVM_EXIT_MMIO:
            return
        self._run.immediate_exit = 1
        self.try_ioctl("KVM_RUN")
        self._run.immediate_exit = 0

    def run(self, *, immediate_exit: bool = False) -> Exit:
        """KVM_RUN once; with ``immediate_exit`` it completes a pending exit and returns."""
        self._before_run(threading.get_native_id())
        self._run.immediate_exit = int(immediate_exit)
        result, error = self.try_ioctl("KVM_RUN")
        self._run.immediate_exit = 0
        return decode(self._run, error if result < 0 else 0)

    def last_exit(self) -> Exit:
        """What the last KVM_RUN that did not fail has left, for who called the ioctl without ``run``."""
        return decode(self._run, 0)

    def run_with(self, bus: Bus) -> Exit:
        """KVM_RUN again and again, devices answering MMIO; returns any other exit.

        ``kick`` and a signal to the thread make it return ``Interrupted``, with no exit pending.
        """
        self._before_run(threading.get_native_id())
        page = memoryview((ctypes.c_ubyte * _MMIO.size).from_address(self._run_page)).cast("B")
        data = self._run_page + structures.kvm_run.exit.offset + structures._mmio.data.offset
        while True:
            # As try_ioctl does, without looking everything up again: a console is many exits.
            if ioctl(self.fd, ioctls.KVM_RUN)[0] < 0:
                return decode(self._run, ctypes.get_errno())
            reason, gpa, value, width, is_write = _MMIO.unpack(page)
            if reason != constants.KVM_EXIT_MMIO:
                return decode(self._run, 0)
            if is_write:
                bus.write(gpa, width, int.from_bytes(value[:width], "little"))
            else:
                ctypes.memmove(data, bus.read(gpa, width).to_bytes(8, "little"), 8)

    def kick(self) -> None:
        """Have ``run_with`` return at once, now or the next time, until ``settle``.

        A vCPU that is in the guest needs a signal to its thread besides.
        """
        self._run.immediate_exit = 1

    def settle(self) -> None:
        """Undo ``kick``."""
        self._run.immediate_exit = 0

    def complete_mmio(self, value: int) -> None:
        """Give the pending MMIO read its value; the next ``run`` delivers it to the guest."""
        mmio = self._run.mmio
        if self._run.exit_reason != constants.KVM_EXIT_MMIO or mmio.is_write:
            raise UsageError("no MMIO read is pending; call complete_mmio after an MmioExit that reads")
        mask = (1 << 8 * mmio.len) - 1
        ctypes.memmove(mmio.data, (value & mask).to_bytes(8, "little"), 8)

    def pre_fault_memory_once(self, gpa: int, size: int, flags: int = 0) -> PreFaultProgress:
        """One KVM_PRE_FAULT_MEMORY call; never raises for what the kernel answers."""
        request = structures.kvm_pre_fault_memory(gpa, size, flags)
        _, error = self.try_ioctl(prefault.NAME, request)
        return PreFaultProgress(request.gpa, request.size, error)

    def pre_fault_memory(self, gpa: int, size: int) -> None:
        """Pre-fault guest memory at stage 2 without running the vCPU.

        :param gpa: L1 guest physical address, page-aligned
        :param size: length, a multiple of the host page size
        :raises CapabilityMissing: this VM does not report KVM_CAP_PRE_FAULT_MEMORY
        :raises KvmError: the ioctl failed; .gpa and .size are what was not done, .errno says why

        Source: Documentation/virt/kvm/api.rst, KVM_PRE_FAULT_MEMORY
        """
        if not self._can_pre_fault():
            raise CapabilityMissing(
                "this VM does not report KVM_CAP_PRE_FAULT_MEMORY (236): the kernel lacks it, or the VM "
                "is protected; boot a kernel with the series, for instance in the lab"
            )
        prefault.pre_fault_all(self.pre_fault_memory_once, gpa, size)

    def get_mp_state(self) -> int:
        """Whether the vCPU runs or is powered off: KVM_MP_STATE_*."""
        state = structures.kvm_mp_state()
        self.ioctl("KVM_GET_MP_STATE", state)
        return int(state.mp_state)

    def set_mp_state(self, value: int) -> None:
        """Set what ``get_mp_state`` reads."""
        self.ioctl("KVM_SET_MP_STATE", structures.kvm_mp_state(value))

    def close(self) -> None:
        """Close the descriptor. Safe to call again."""
        page, self._run_page = self._run_page, 0
        if page:
            self._run = structures.kvm_run()
            mapping.unmap(page, self._mmap_size)
        super().close()


class Vcpu(AnyVcpu):
    """An arm64 vCPU."""

    def _start(self, program: Program, arguments: Sequence[int]) -> None:
        for index, value in enumerate(arguments):
            self.set_register(f"x{FIRST_ARGUMENT + index}", value)
        self.set_register("pstate", _PSTATE_EL2H_MASKED if self._config.el2 else _PSTATE_EL1H_MASKED)
        self.set_register("pc", program.base)

    _target: structures.kvm_vcpu_init | None = None

    def reset(self) -> None:
        """KVM_ARM_VCPU_INIT again, as a VMM does when its guest reboots; ``load`` gives it a program."""
        if self._target is None:
            raise UsageError("the vCPU was never initialised; create it with VcpuConfig(initialised=True)")
        self.ioctl("KVM_ARM_VCPU_INIT", self._target)

    def get_register(self, name: str) -> int:
        """A general register (x0…x30, sp, pc, pstate) or system register by architectural name."""
        value = ctypes.c_uint64()
        request = structures.kvm_one_reg(_register_id(name), ctypes.addressof(value))
        self.ioctl("KVM_GET_ONE_REG", request, hint=f"this vCPU has no register {name}")
        return value.value

    def set_register(self, name: str, value: int) -> None:
        """Set what ``get_register`` reads."""
        cell = ctypes.c_uint64(value)
        request = structures.kvm_one_reg(_register_id(name), ctypes.addressof(cell))
        self.ioctl("KVM_SET_ONE_REG", request, hint=f"{name} cannot be set to {value:#x} on this vCPU")

    def registers(self) -> dict[str, bytes]:
        """All registers that user space can read, but for counters, which never rest.

        By architectural name, as assemblers have it where it is not a common one, or by KVM's id.
        """
        return {
            arm64.register_name(register): self.get_register_bytes(register)
            for register in self.register_list()
            if register not in arm64.COUNTERS
        }

    def register_list(self) -> tuple[int, ...]:
        """The ids of all registers that make up the vCPU's state (KVM_GET_REG_LIST)."""
        head = structures.kvm_reg_list()
        result, error = self.try_ioctl("KVM_GET_REG_LIST", head)
        if result < 0 and error != errno.E2BIG:
            raise KvmError("KVM_GET_REG_LIST", error)
        numbers = (ctypes.c_uint64 * (head.n + 1))(head.n)
        self.ioctl("KVM_GET_REG_LIST", ctypes.addressof(numbers))
        return tuple(numbers[1 : numbers[0] + 1])

    def get_register_bytes(self, register: int) -> bytes:
        """A register of any size, by its id."""
        cell = (ctypes.c_ubyte * arm64.register_size(register))()
        self.ioctl("KVM_GET_ONE_REG", structures.kvm_one_reg(register, ctypes.addressof(cell)))
        return bytes(cell)

    def set_register_bytes(self, register: int, value: bytes) -> None:
        """Set what ``get_register_bytes`` reads."""
        cell = (ctypes.c_ubyte * arm64.register_size(register))(*value)
        name = arm64.register_name(register)
        hint = f"{name} cannot be set to {int.from_bytes(value, 'little'):#x} on this vCPU"
        self.ioctl("KVM_SET_ONE_REG", structures.kvm_one_reg(register, ctypes.addressof(cell)), hint=hint)

    def get_events(self) -> bytes:
        """Exceptions that wait for the vCPU (struct kvm_vcpu_events)."""
        events = structures.kvm_vcpu_events()
        self.ioctl("KVM_GET_VCPU_EVENTS", events)
        return bytes(events)

    def set_events(self, value: bytes) -> None:
        """Set what ``get_events`` reads."""
        self.ioctl("KVM_SET_VCPU_EVENTS", structures.kvm_vcpu_events.from_buffer_copy(value))

    def initialise(self, target: structures.kvm_vcpu_init) -> None:
        """KVM_ARM_VCPU_INIT with the features that the configuration asks for."""
        features = 1 << arm64.KVM_ARM_VCPU_PSCI_0_2
        if self._config.el2:
            features |= 1 << arm64.KVM_ARM_VCPU_HAS_EL2
        if self._config.e2h0:
            features |= 1 << arm64.KVM_ARM_VCPU_HAS_EL2_E2H0
        target.features[0] |= features
        hint = "the host must run with kvm-arm.mode=nested for vCPUs with EL2" if self._config.el2 else ""
        self.ioctl("KVM_ARM_VCPU_INIT", target, hint=hint)
        self._target = target


def _register_id(name: str) -> int:
    number = arm64.register_id(name)
    if number is None:
        raise UsageError(f"register {name!r} is unknown; prefault.abi.arm64 lists those that are known")
    return number


def decode(run: structures.kvm_run, error: int) -> Exit:
    """What KVM_RUN's outcome means."""
    if error == errno.EINTR:
        return Interrupted()
    if error:
        if (
            error in (errno.EFAULT, constants.EHWPOISON)
            and run.exit_reason == constants.KVM_EXIT_MEMORY_FAULT
        ):
            fault = run.memory_fault
            return MemoryFault(fault.gpa, fault.size, fault.flags, error)
        return Failed(error)
    reason = run.exit_reason
    if reason == constants.KVM_EXIT_MMIO:
        mmio = run.mmio
        data = int.from_bytes(bytes(mmio.data[: mmio.len]), "little") if mmio.is_write else 0
        return MmioExit(mmio.phys_addr, mmio.len, bool(mmio.is_write), data)
    return OtherExit(reason, constants.exit_name(reason), _details(run))


def _details(run: structures.kvm_run) -> tuple[int, ...]:
    """The numbers that say more about an exit, for the reasons that have some."""
    match run.exit_reason:
        case constants.KVM_EXIT_SYSTEM_EVENT:
            event = run.system_event
            return (event.type, *event.data[: min(event.ndata, 16)])
        case constants.KVM_EXIT_INTERNAL_ERROR:
            return (run.internal.suberror, *run.internal.data[: min(run.internal.ndata, 16)])
        case constants.KVM_EXIT_FAIL_ENTRY:
            return (run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu)
        case constants.KVM_EXIT_ARM_NISV | constants.KVM_EXIT_ARM_LDST64B:
            return (run.arm_nisv.esr_iss, run.arm_nisv.fault_ipa)
        case constants.KVM_EXIT_ARM_SEA:
            return (run.arm_sea.flags, run.arm_sea.esr, run.arm_sea.gva, run.arm_sea.gpa)
    return ()
