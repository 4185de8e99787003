# SPDX-License-Identifier: Apache-2.0
"""What KVM does when a guest takes a stage-2 fault.

Mirrors: arch/arm64/kvm/mmu.c, arch/arm64/kvm/mmio.c, arch/arm64/kvm/inject_fault.c
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from prefault.abi.constants import KVM_MEM_READONLY
from prefault.errors import EHWPOISON
from prefault.machine import Exit, Failed, Interrupted, MemoryFault, MmioExit
from prefault.spec import nested
from prefault.spec.cpu import EC_DABT, EC_IABT, EC_SHIFT, IL, SF, SSE, WNR, Abort, Cpu
from prefault.spec.descriptors import Prot
from prefault.spec.faults import FaultDesc, gmem_abort, user_mem_abort
from prefault.spec.nested import (
    FSC_ACCESS,
    FSC_ADDRSZ,
    FSC_FAULT,
    FSC_PERM,
    GuestWalk,
    S2Translation,
    S2WalkFault,
)
from prefault.spec.pkvm import pkvm_mem_abort
from prefault.spec.state import KvmState

Trace = Callable[[int, int], None]
"""Told (IPA, ESR) of each fault, where the tracepoint kvm_guest_fault stands."""

_FSC = 0x3F
_FSC_TYPE = 0x3C
_FSC_EXTABT = 0x10


@dataclass(slots=True)
class PendingMmio:
    """An MMIO access that user space has yet to complete, as the syndrome describes it to KVM."""

    width: int
    is_write: bool
    register: int
    sign_extend: bool
    is_64: bool
    value: int = 0

    def complete(self, cpu: Cpu) -> None:
        """Mirrors: kvm_handle_mmio_return()"""
        if not self.is_write and self.register != 31:
            sign = 1 << 8 * self.width - 1
            value = (self.value ^ sign) - sign if self.sign_extend and self.width < 8 else self.value
            cpu.x[self.register] = value & ((1 << 64) - 1 if self.is_64 else (1 << 32) - 1)
        cpu.pc += 4


class AbortHandler:
    """Handles the aborts of one vCPU.

    :ivar cpu: its processor, another one after a reset
    """

    def __init__(self, kvm: KvmState, cpu: Cpu, trace: Trace) -> None:
        self._kvm = kvm
        self.cpu = cpu
        self._trace = trace
        self.pending: PendingMmio | None = None

    def kvm_handle_guest_abort(self, abort: Abort) -> Exit | None:
        """What to tell user space; None lets the guest go on. Mirrors: kvm_handle_guest_abort()"""
        kvm, cpu = self._kvm, self.cpu
        iabt = abort.esr >> EC_SHIFT == EC_IABT
        if abort.esr & _FSC_TYPE == FSC_FAULT and abort.ipa >> cpu.mmu.pgt.ia_bits:
            too_large = abort.ipa >> kvm.host.config.ipa_limit
            self.kvm_inject_sea(iabt, abort.ipa, FSC_ADDRSZ if too_large else _FSC_EXTABT)
            return None
        fault_ipa = abort.ipa & ~0xFFF
        self._trace(fault_ipa, abort.esr)
        token = kvm.srcu.read_lock()
        try:
            translation = self._translate_l2(fault_ipa, abort)
            if isinstance(translation, bool):
                return None
            return self._handle(abort, fault_ipa, translation, iabt)
        finally:
            kvm.srcu.read_unlock(token)

    def _translate_l2(self, fault_ipa: int, abort: Abort) -> S2Translation | bool | None:
        """L1's translation of an L2 IPA, None outside of L2, False if L1 was given the fault."""
        mmu = self.cpu.mmu
        if not mmu.shadow or not mmu.nested_stage2_enabled:
            return None
        found = GuestWalk(self._kvm, mmu.tlb_vtcr, mmu.tlb_vttbr or 0).walk(fault_ipa)
        if isinstance(found, S2Translation):
            if not kvm_s2_handle_perm_fault(abort, found):
                return found
            found = S2WalkFault(FSC_PERM | found.level & 3)
        fsc = found.fsc if isinstance(found, S2WalkFault) else nested.FSC_SEA_TTW
        self.kvm_inject_s2_fault(abort, fsc)
        return False

    def _handle(
        self, abort: Abort, fault_ipa: int, translation: S2Translation | None, iabt: bool
    ) -> Exit | None:
        kvm = self._kvm
        ipa = translation.output if translation else fault_ipa
        slot = kvm.slot_at(ipa)
        write = bool(abort.esr & WNR) and not iabt
        if slot is None or (write and slot.flags & KVM_MEM_READONLY):
            if iabt:
                self.kvm_inject_sea(True, abort.ipa)
                return None
            return self.io_mem_abort(abort, ipa | abort.ipa & 0xFFF)
        if abort.esr & _FSC_TYPE == FSC_ACCESS:
            self.handle_access_fault(fault_ipa)
            return None
        s2fd = FaultDesc(
            kvm,
            self.cpu.mmu,
            fault_ipa,
            slot,
            slot.hva_of(ipa) & -kvm.page_size,
            level=abort.esr & 3,
            nested=translation,
            write=write,
            exec=iabt,
            perm=abort.esr & _FSC_TYPE == FSC_PERM,
        )
        if kvm.protected:
            return self._result(s2fd, pkvm_mem_abort(s2fd))
        return self._result(s2fd, gmem_abort(s2fd) if slot.gmem else user_mem_abort(s2fd))

    def _result(self, s2fd: FaultDesc, mapped: int) -> Exit | None:
        if mapped >= 0:
            return Interrupted() if self._kvm.host.take_sigbus() else None
        if s2fd.memory_fault and mapped in (-errno.EFAULT, -EHWPOISON):
            return MemoryFault(*s2fd.memory_fault, 0, -mapped)
        return Failed(-mapped)

    def handle_access_fault(self, ipa: int) -> None:
        """Mirrors: handle_access_fault()"""
        self._kvm.mmu_lock.read_lock()
        self.cpu.mmu.pgt.mkyoung(ipa)
        self._kvm.mmu_lock.read_unlock()

    def io_mem_abort(self, abort: Abort, ipa: int) -> Exit:
        """Mirrors: io_mem_abort()"""
        esr = abort.esr
        width, register = 1 << (esr >> 22 & 3), esr >> 16 & 31
        is_write = bool(esr & WNR)
        sign_extend = bool(esr & SSE) and self._kvm.host.config.mmio_sign_extends
        self.pending = PendingMmio(width, is_write, register, sign_extend, bool(esr & SF))
        data = self.cpu.x[register] & (1 << 8 * width) - 1 if is_write else 0
        return MmioExit(ipa, width, is_write, data)

    def kvm_inject_sea(self, iabt: bool, address: int, fsc: int = _FSC_EXTABT) -> None:
        """An abort at the EL that the guest is at. Mirrors: kvm_inject_sea(), kvm_inject_size_fault()"""
        cpu = self.cpu
        ec = (EC_IABT if iabt else EC_DABT) + 1
        cpu.take_exception(cpu.el, ec << EC_SHIFT | IL | fsc, address, cpu.pc)

    def kvm_inject_s2_fault(self, abort: Abort, fsc: int) -> None:
        """Mirrors: kvm_inject_s2_fault()"""
        cpu = self.cpu
        cpu.system["hpfar_el2"] = abort.ipa >> 12 << 4
        cpu.take_exception(2, abort.esr & ~_FSC | fsc, abort.ipa, cpu.pc)


def kvm_s2_handle_perm_fault(abort: Abort, translation: S2Translation) -> bool:
    """Whether it is L1 that does not allow the access. Mirrors: kvm_s2_handle_perm_fault()"""
    if abort.esr & _FSC_TYPE != FSC_PERM:
        return False
    if abort.esr >> EC_SHIFT == EC_IABT:
        return not translation.exec & Prot.PX
    return not (translation.writable if abort.esr & WNR else translation.readable)
