# SPDX-License-Identifier: Apache-2.0
"""A vCPU of the spec: the run loop around the processor, and what a VMM can do with it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

from prefault.abi import arm64, constants
from prefault.errors import CapabilityMissing, KvmError, UsageError
from prefault.guest.compile import FIRST_ARGUMENT
from prefault.guest.program import MAX_ARGUMENTS, Program
from prefault.machine import Exit, Failed, Interrupted, OtherExit, PreFaultProgress, VcpuConfig
from prefault.spec import nested
from prefault.spec.abort import AbortHandler, Trace
from prefault.spec.cpu import EC_HVC, EC_SHIFT, EC_UNKNOWN, IL, Abort, Cpu, Eret, Hvc, Tlbi, Trap, Undefined
from prefault.spec.prefault import kvm_vcpu_pre_fault_memory
from prefault.spec.state import KvmState, S2Mmu
from prefault.spec.steps import LOCK
from prefault.spec.unmap import stage2_unmap_vm

_PSTATE_EL1H_MASKED = 0x3C5
_PSTATE_EL2H_MASKED = 0x3C9
_HCR_E2H = 1 << 34
_PSCI_SYSTEM_OFF = 0x8400_0008
_PSCI_INTERNAL_FAILURE = (1 << 64) - 6
_NAME = "KVM_PRE_FAULT_MEMORY"


class SpecVcpu:
    """A vCPU descriptor.

    :param can_pre_fault: whether the VM reports KVM_CAP_PRE_FAULT_MEMORY
    """

    def __init__(
        self, kvm: KvmState, config: VcpuConfig, trace: Trace, can_pre_fault: Callable[[], bool]
    ) -> None:
        self._kvm = kvm
        self._config = config
        self._can_pre_fault = can_pre_fault
        self._open = True
        self._has_run = False
        self.cpu = self._new_cpu()
        self.aborts = AbortHandler(kvm, self.cpu, trace)

    def _new_cpu(self) -> Cpu:
        """Mirrors: kvm_reset_vcpu()"""
        cpu = Cpu(self._kvm.host.memory, self._kvm.mmu, self._kvm.host.config.hafdbs)
        if self._config.el2:
            cpu.el = 2
            cpu.system["hcr_el2"] = 0 if self._config.e2h0 else _HCR_E2H
        return cpu

    def reset(self) -> None:
        """KVM_ARM_VCPU_INIT again, as a VMM does when its guest reboots; ``load`` gives it a program.

        Mirrors: kvm_arch_vcpu_ioctl_vcpu_init()
        """
        if not self._config.initialised:
            raise UsageError("the vCPU was never initialised; create it with VcpuConfig(initialised=True)")
        with LOCK:
            self.cpu = self.aborts.cpu = self._new_cpu()
            # The guest will run with its caches off: the first access of each page cleans it.
            if self._has_run and not self._kvm.host.config.fwb:
                stage2_unmap_vm(self._kvm)

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
        for index, value in enumerate(arguments):
            self.set_register(f"x{FIRST_ARGUMENT + index}", value)
        self.set_register("pstate", _PSTATE_EL2H_MASKED if self._config.el2 else _PSTATE_EL1H_MASKED)
        self.set_register("pc", program.base)

    def _complete_exit(self) -> None:
        pending, self.aborts.pending = self.aborts.pending, None
        if pending:
            pending.complete(self.cpu)

    # KVM_RUN.

    def run(self, *, immediate_exit: bool = False) -> Exit:
        """KVM_RUN once; with ``immediate_exit`` it completes a pending exit and returns.

        Mirrors: kvm_arch_vcpu_ioctl_run()
        """
        if not self._open:
            raise KvmError("KVM_RUN", errno.EBADF)
        if not self._config.initialised:
            return Failed(errno.ENOEXEC)
        with LOCK:
            self._kvm.has_run = self._has_run = True
            self._complete_exit()
            if immediate_exit:
                return Interrupted()
            self._load_mmu()
            try:
                return self._run()
            finally:
                nested.put_s2_mmu(self.cpu.mmu)

    def _run(self) -> Exit:
        while True:
            if self._kvm.host.signal_pending:
                return Interrupted()
            nested.check_nested_vcpu_requests(self._kvm, self.cpu.mmu)
            try:
                self.cpu.execute()
            except Abort as abort:
                exit_ = self.aborts.kvm_handle_guest_abort(abort)
                if exit_ is not None:
                    return exit_
            except Trap as trap:
                if isinstance(trap, Hvc) and not self._config.el2 and self.cpu.x[0] == _PSCI_SYSTEM_OFF:
                    return self._system_off()
                self._emulate(trap)
            if self._config.el2:
                self._switch_mmu()

    def _system_off(self) -> Exit:
        """The one call of PSCI that is known here. Mirrors: kvm_psci_system_off(), kvm_psci_0_2_call()"""
        self.cpu.x[:4] = [_PSCI_INTERNAL_FAILURE, 0, 0, 0]
        self.cpu.pc += 4
        reason = constants.KVM_EXIT_SYSTEM_EVENT
        return OtherExit(reason, constants.exit_name(reason), (constants.KVM_SYSTEM_EVENT_SHUTDOWN, 0))

    @property
    def in_nested_context(self) -> bool:
        """Whether the vCPU runs an L2. Mirrors: is_nested_ctxt()"""
        return self._config.el2 and self.cpu.el < 2

    def _load_mmu(self) -> None:
        """Mirrors: kvm_vcpu_load_hw_mmu()"""
        self.cpu.mmu = self._wanted_mmu()

    def _wanted_mmu(self) -> S2Mmu:
        if not self.in_nested_context:
            return self._kvm.mmu
        system = self.cpu.system
        registers = (system.get(name, 0) for name in ("vttbr_el2", "vtcr_el2", "hcr_el2"))
        return nested.get_s2_mmu_nested(self._kvm, *registers)

    def _switch_mmu(self) -> None:
        """After an exception or its return between virtual EL2 and L2."""
        if self.cpu.mmu.shadow != self.in_nested_context:
            nested.put_s2_mmu(self.cpu.mmu)
            self._load_mmu()

    def _emulate(self, trap: Trap) -> None:
        cpu = self.cpu
        if isinstance(trap, Eret) and cpu.el == 2:
            cpu.pstate, cpu.pc = cpu.system.get("spsr_el2", 0), cpu.system.get("elr_el2", 0)
        elif isinstance(trap, Hvc) and self.in_nested_context:
            cpu.take_exception(2, EC_HVC << EC_SHIFT | IL, None, cpu.pc + 4)
        elif isinstance(trap, Tlbi) and cpu.el == 2:
            nested.HANDLE_TLBI[trap.operation](self._kvm, cpu.system.get("vttbr_el2", 0), trap.value)
            cpu.pc += 4
        elif isinstance(trap, Eret | Hvc | Tlbi | Undefined):
            cpu.take_exception(cpu.el, EC_UNKNOWN << EC_SHIFT | IL, None, cpu.pc)
        else:
            raise trap

    # The rest.

    def complete_mmio(self, value: int) -> None:
        """Give the pending MMIO read its value; the next ``run`` delivers it to the guest."""
        pending = self.aborts.pending
        if pending is None or pending.is_write:
            raise UsageError("no MMIO read is pending; call complete_mmio after an MmioExit that reads")
        pending.value = value & (1 << 8 * pending.width) - 1

    def pre_fault_memory_once(self, gpa: int, size: int, flags: int = 0) -> PreFaultProgress:
        """One KVM_PRE_FAULT_MEMORY call; never raises for what the kernel answers."""
        with LOCK:
            host, initialised = self._kvm.host, self._config.initialised
            host.in_call = True
            try:
                return PreFaultProgress(
                    *kvm_vcpu_pre_fault_memory(self._kvm, gpa, size, flags, initialised=initialised)
                )
            finally:
                host.in_call = host.signal_pending = False  # on the way out, its handler runs

    def pre_fault_memory(self, gpa: int, size: int) -> None:
        """Pre-fault ``[gpa, gpa+size)``, calling again while the kernel reports progress.

        :raises CapabilityMissing: this VM does not report KVM_CAP_PRE_FAULT_MEMORY
        :raises KvmError: the ioctl failed; .gpa and .size are what was not done, .errno says why
        """
        if not self._can_pre_fault():
            raise CapabilityMissing(
                "this VM does not report KVM_CAP_PRE_FAULT_MEMORY (236): a protected VM never does, "
                "another on a protected host does with HostConfig(pkvm_pre_faults=True)"
            )
        while size:
            progress = self.pre_fault_memory_once(gpa, size)
            if progress.errno and progress.errno != errno.EINTR:
                raise KvmError(_NAME, progress.errno, gpa=progress.gpa, size=progress.size)
            gpa, size = progress.gpa, progress.size

    def get_register(self, name: str) -> int:
        """A general register (x0…x30, sp, pc, pstate) or system register by architectural name."""
        name = self._register("KVM_GET_ONE_REG", name)
        if name in ("pc", "pstate"):
            return int(getattr(self.cpu, name))
        return self.cpu.x[int(name[1:])] if name[0] == "x" else self.cpu.system.get(name, 0)

    def set_register(self, name: str, value: int) -> None:
        """Set what ``get_register`` reads."""
        name = self._register("KVM_SET_ONE_REG", name)
        if name in ("pc", "pstate"):
            setattr(self.cpu, name, value)
        elif name[0] == "x":
            self.cpu.x[int(name[1:])] = value
        else:
            self.cpu.system[name] = value

    def registers(self) -> dict[str, bytes]:
        """All registers that user space can read, but for counters, which never rest."""
        names = (*arm64.CORE_OFFSETS, *arm64.SYSTEM_REGISTERS)
        return {name: self.get_register(name).to_bytes(8, "little") for name in names if self._has(name)}

    def _has(self, name: str) -> bool:
        return not name.startswith(("id_", "midr")) and (self._config.el2 or not name.endswith("el2"))

    def _register(self, ioctl: str, name: str) -> str:
        name = name.lower()
        if arm64.register_id(name) is None:
            raise UsageError(f"register {name!r} is unknown; prefault.abi.arm64 lists those that are known")
        if not self._config.initialised:
            raise KvmError(ioctl, errno.ENOEXEC, hint="the vCPU is not initialised")
        if not self._has(name):
            raise KvmError(ioctl, errno.ENOENT, hint=f"this vCPU has no register {name}")
        return name

    def close(self) -> None:
        """Close the descriptor. Safe to call again."""
        self._open = False
