# SPDX-License-Identifier: Apache-2.0
"""The small programs that are explored, and the invariants of M12.

- No leaf and no TLB entry leads to a frame that the host has taken back. Where nothing is being
  invalidated, every leaf is what the host has behind that memory, and not writable if that is not.
- At the end: no writable leaf of a logged memslot that the log does not know; no leaf without a
  memslot; no table lost, no page still pinned, every reference counted.
- No deadlock, and no actor that runs on for ever.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace

from prefault.guest.program import EnterL2, L2Mapping, Program, Read, Step, Write
from prefault.machine import Backing, MemoryRegion, Resident, SlotFlags, VcpuConfig
from prefault.spec.cpu import Cpu
from prefault.spec.descriptors import S2AP_W, VALID
from prefault.spec.mm import WRITABLE
from prefault.spec.nested import handle_vmalls12e1
from prefault.spec.state import Faults, HostConfig, S2Mmu
from prefault.spec.steps import Violation
from prefault.spec.system import open_spec
from prefault.spec.vcpu import SpecVcpu

CODE, DATA, PAGE = 0x4000_0000, 0x4010_0000, 0x1000
_CODE_SIZE = 0x4_0000

_MEMSLOTS = frozenset({"slots.lookup", "srcu.read_lock", "notifier.start", "slots_lock.write_lock"})
"""Steps that matter only where memslots change."""

Make = Callable[[Faults], "Race"]


class Race:
    """One VM with a slot of a few pages, and actors that race for it."""

    def __init__(
        self, faults: Faults, *, resident: Resident = Resident.WRITE, nested: bool = False, pages: int = 1
    ) -> None:
        self.kvm = open_spec(HostConfig(), faults)
        self.host = self.kvm.host
        self.vm = self.kvm.create_vm()
        self.vm.set_user_memory_region(MemoryRegion(0, CODE, _CODE_SIZE, resident=Resident.WRITE))
        self.region = MemoryRegion(1, DATA, pages * PAGE, Backing.PRIVATE, resident)
        self.vm.set_user_memory_region(self.region)
        self.vcpus = [self.vm.create_vcpu(VcpuConfig(el2=nested)) for _ in range(2)]
        self.hva = self.vm.hva_of(DATA)
        # The level-3 table is there already, which halves the steps of a fault.
        self.vcpus[0].pre_fault_memory_once(CODE, PAGE)
        self.errors: list[int] = []
        self.actors: dict[str, Callable[[], object]] = {}
        self.quiet = _MEMSLOTS

    # What actors do.

    def pre_fault(self) -> None:
        """KVM_PRE_FAULT_MEMORY on the slot."""
        progress = self.vcpus[0].pre_fault_memory_once(DATA, self.region.size)
        self.errors.append(progress.errno)

    def pre_fault_again(self) -> None:
        """The same, on another vCPU."""
        progress = self.vcpus[1].pre_fault_memory_once(DATA, self.region.size)
        self.errors.append(progress.errno)

    def dontneed(self) -> None:
        """MADV_DONTNEED on the memory behind the slot."""
        self.host.mm.dontneed(self.hva, self.hva + self.region.size)

    def fork(self) -> None:
        """A fork of the VMM."""
        self.host.mm.fork()

    def delete(self) -> None:
        """Delete the slot, and unmap what was behind it."""
        self.vm.set_user_memory_region(replace(self.region, size=0))
        self.host.mm.munmap(self.hva, self.hva + self.region.size)

    def start_log(self) -> None:
        """Switch dirty logging on."""
        self.vm.set_user_memory_region(replace(self.region, flags=SlotFlags.LOG_DIRTY_PAGES))

    def host_write(self) -> None:
        """The VMM writes to the memory, which breaks CoW."""
        self.host.mm.write(self.hva, b"host")

    def guest(self, vcpu: SpecVcpu, *steps: Step) -> Callable[[], object]:
        """A guest that does these steps, prepared up to its first instruction."""
        program = Program(steps, CODE + (0x2_0000 if vcpu is self.vcpus[1] else 0))
        self.vm.install(program)
        vcpu.load(program)
        self.vcpus[0].pre_fault_memory_once(program.base, 2 * PAGE)
        return vcpu.run

    def tlbi(self) -> None:
        """L1 drops what its L2 had."""
        for mmu in self.vm.kvm.nested_mmus[:1]:
            handle_vmalls12e1(self.vm.kvm, mmu.tlb_vttbr or 0)

    # What is seen of it.

    def state(self) -> Hashable:
        """All that actors share."""
        kvm, mm = self.vm.kvm, self.host.mm
        lock = kvm.mmu_lock
        return (
            tuple(frozenset(entries.items()) for entries in mm.ptes.values()),
            frozenset(self.host.memory.freed),
            frozenset(mm.mapcount.items()),
            frozenset([(table.pa, table.entries.tobytes()) for table in self.host.memory.tables.values()]),
            tuple(
                [
                    (frozenset(one.pgt.tlb.pages.items()), one.refcnt, one.pending_unmap)
                    for one in self._mmus()
                ]
            ),
            tuple([(slot.id, slot.flags, self._logged(slot.dirty)) for slot in kvm.slots]),
            (lock.readers, lock.writer, *kvm.srcu.readers, kvm.srcu.index),
            (kvm.mmu_invalidate_in_progress, kvm.mn_active_invalidate_count),
            (len(mm.vmas), *self.errors),
            tuple([_registers(vcpu.cpu) for vcpu in self.vcpus]),
            frozenset(mm.pins.items()),
        )

    @staticmethod
    def _logged(dirty: object) -> Hashable:
        return frozenset(getattr(dirty, "pages", ())) if dirty is not None else None

    def _mmus(self) -> list[S2Mmu]:
        return [self.vm.kvm.mmu, *self.vm.kvm.nested_mmus]

    def check(self, *, done: bool) -> None:
        """The invariants."""
        kvm = self.vm.kvm
        for mmu in self._mmus():
            self._check_freed(mmu)
        if not kvm.mn_active_invalidate_count:
            self._check_coherent()
        if done:
            self._check_end()

    def _check_freed(self, mmu: S2Mmu) -> None:
        freed = self.host.memory.freed
        if not freed:
            return
        for ipa, _, pte in mmu.pgt.leaves():
            if mmu.pgt.granule.to_phys(pte) // PAGE in freed:
                raise Violation(f"ipa {ipa:#x} is mapped to a frame that the host has taken back: {pte:#x}")
        for page, to in mmu.pgt.tlb.pages.items():
            if to // PAGE in freed:
                raise Violation(f"the TLB has ipa {page * PAGE:#x} at a frame that the host has taken back")

    def _data_leaves(self) -> Iterator[tuple[int, int]]:
        """(IPA, descriptor) of what is mapped of the slot that is raced for; L2 has it one to one."""
        for mmu in self._mmus():
            for ipa in range(DATA, DATA + self.region.size, PAGE):
                pte, _ = mmu.pgt.get_leaf(ipa)
                if pte & VALID:
                    yield ipa, pte

    def _check_coherent(self) -> None:
        pgt = self.vm.kvm.mmu.pgt
        for ipa, pte in self._data_leaves():
            hva = self.hva + ipa - DATA
            found = self.host.mm.lookup(hva)
            if found is None or self.host.mm.pfn_of(hva, *found) != pgt.granule.to_phys(pte) // PAGE:
                raise Violation(f"ipa {ipa:#x} is mapped to {pte:#x}, which is not what the host has there")
            if pte & S2AP_W and not found[0] & WRITABLE:
                raise Violation(f"ipa {ipa:#x} is writable, but the host's page is not: {pte:#x}")

    def _check_end(self) -> None:
        kvm = self.vm.kvm
        slot = kvm.slot_at(DATA)
        for ipa, pte in self._data_leaves():
            if slot is None:
                raise Violation(f"ipa {ipa:#x} is mapped, but its memslot was deleted")
            if slot.dirty is not None and pte & S2AP_W and (ipa - DATA) // PAGE not in slot.dirty.pages:
                raise Violation(f"ipa {ipa:#x} is writable in a logged memslot, and the log does not know")
        reached = set().union(*(mmu.pgt.check() for mmu in self._mmus()))
        if reached != set(self.host.memory.tables):
            raise Violation("a table is reached by no entry, and not freed")
        if self.host.mm.pins:
            raise Violation(f"pages are still pinned: {self.host.mm.pins}")
        allowed = {0, errno.EAGAIN, errno.ENOENT, errno.EFAULT}
        if not set(self.errors) <= allowed:
            raise Violation(f"pre-faulting ended with {self.errors}")


def _registers(cpu: Cpu) -> Hashable:
    return cpu.pc, cpu.el, cpu.generation == cpu.mmu.pgt.tlb.generation, *cpu.x


def _pair(other: str, resident: Resident = Resident.WRITE) -> Make:
    def make(faults: Faults) -> Race:
        race = Race(faults, resident=resident)
        race.quiet = frozenset() if other in ("delete", "start_log") else _MEMSLOTS
        race.actors = {"pre-fault": race.pre_fault, other.replace("_", "-"): getattr(race, other)}
        return race

    return make


def _guest(step: Step, other: str = "", resident: Resident = Resident.NOTHING) -> Make:
    def make(faults: Faults) -> Race:
        race = Race(faults, resident=resident)
        race.actors = {"pre-fault": race.pre_fault, "guest": race.guest(race.vcpus[1], step)}
        if other:
            race.quiet = frozenset() if other in ("delete", "start_log") else _MEMSLOTS
            race.actors[other] = getattr(race, other)
        return race

    return make


def _l2(other: str) -> Make:
    def make(faults: Faults) -> Race:
        race = Race(faults, nested=True)
        mapping = L2Mapping(DATA, DATA, PAGE)
        guest = race.guest(race.vcpus[1], EnterL2((Read(DATA),), (mapping,)))
        race.actors = {"pre-fault": race.pre_fault, "L2": guest, other: getattr(race, other)}
        return race

    return make


RACES: dict[str, Make] = {
    "prefault-madvise": _pair("dontneed"),
    "prefault-fork": _pair("fork"),
    "prefault-cow": _pair("host_write", Resident.READ),
    "prefault-delete": _pair("delete"),
    "prefault-log": _pair("start_log"),
    "prefault-prefault": _pair("pre_fault_again"),
    "prefault-read": _guest(Read(DATA)),
    "prefault-write": _guest(Write(DATA, 1)),
    "prefault-write-madvise": _guest(Write(DATA, 1), "dontneed", Resident.READ),
    "prefault-write-log": _guest(Write(DATA, 1), "start_log", Resident.WRITE),
    "prefault-l2-tlbi": _l2("tlbi"),
    "prefault-l2-madvise": _l2("dontneed"),
}
"""By name: what races, the pre-fault first."""
