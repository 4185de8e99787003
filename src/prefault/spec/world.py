# SPDX-License-Identifier: Apache-2.0
"""What is explored: one VM with a memslot that actors race for, and the invariants of M12.

- No leaf and no TLB entry leads to a frame that the host has taken back. Where nothing is being
  invalidated, every leaf is what the host has behind that memory, and not writable if that is not.
- No leaf of a read-only memslot is writable.
- At the end: no writable leaf of a logged memslot that the log does not know; no leaf without a memslot;
  nothing dirty, private or in a shadow MMU that no guest and no VMM has put there; no
  byte lost; no table lost, no page still pinned, every reference counted, no invalidation still open.
- What was pre-faulted is mapped, unless somebody took it away.
- No deadlock, and no actor that runs on for ever.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace

from prefault.guest import port
from prefault.guest.program import EnterL2, L2Mapping, Marker, Program, Read, Step, Write
from prefault.machine import Backing, MemoryRegion, MmioExit, Resident, SlotFlags, UserfaultMode, VcpuConfig
from prefault.spec.cpu import Cpu
from prefault.spec.descriptors import S2AP_W, VALID
from prefault.spec.mm import PFN_SHIFT, WRITABLE
from prefault.spec.nested import GuestWalk, S2Translation, handle_vmalls12e1
from prefault.spec.state import Faults, HostConfig, S2Mmu
from prefault.spec.steps import Violation, step, wait
from prefault.spec.system import open_spec
from prefault.spec.tlb import Tlb
from prefault.spec.userfault import Context, Wait
from prefault.spec.vcpu import SpecVcpu

CODE, PAGE, BLOCK = 0x4000_0000, 0x1000, 2 << 20
_CODE_SIZE = 16 * PAGE
_NEAR, _BLOCK_AT, _MOVED_TO = CODE + 0x10_0000, CODE + BLOCK, CODE + 0x18_0000
"""Near is below the same level-3 table as the code. It is there already: that halves the steps of a fault."""

_MEMSLOTS = frozenset({"slots.lookup", "srcu.read_lock", "notifier.start", "slots_lock.write_lock"})
"""Steps that make a difference only where memslots change."""
_CHANGE_MEMSLOTS = {"delete", "move", "start_log", "stop_log"}
_TAKE_AWAY = {"madvise", "fork", "host_write", "ksm", "delete", "move", "mprotect"}
_WRITE = {"guest_write", "host_write", "l2_write", "handler"}
_ENTER_L2 = {"l2_read", "l2_write", "tlbi", "remap", "pre_fault_in_l2"}
_ERRORS = {0, errno.EAGAIN, errno.ENOENT, errno.EFAULT}
"""What pre-faulting may end with when its memory is taken away."""


@dataclass(frozen=True)
class Race:
    """A small program to explore.

    :ivar about: what races, for people
    :ivar actors: names of methods of ``RaceWorld``
    :ivar pages: size of the memslot
    :ivar known: what is found in it is in Linux, too; why that is no news
    """

    about: str
    actors: tuple[str, ...]
    resident: Resident = Resident.WRITE
    backing: Backing = Backing.PRIVATE
    flags: SlotFlags = SlotFlags.NONE
    pages: int = 1
    known: str = ""


class RaceWorld:
    """One VM, before its actors begin."""

    def __init__(self, race: Race, faults: Faults) -> None:
        self.race = race
        self.kvm = open_spec(HostConfig(), faults)
        self.host = self.kvm.host
        self.vm = self.kvm.create_vm()
        self.data = _BLOCK_AT if race.backing is Backing.THP else _NEAR
        self.region = MemoryRegion(
            1, self.data, race.pages * PAGE, race.backing, race.resident, flags=race.flags
        )
        # Shared, so that a fork need not look at it.
        self.vm.set_user_memory_region(MemoryRegion(0, CODE, _CODE_SIZE, Backing.SHARED, Resident.WRITE))
        self.vm.set_user_memory_region(self.region)
        nested = bool(_ENTER_L2 & set(race.actors))
        self.vcpus = [self.vm.create_vcpu(VcpuConfig(el2=nested)) for _ in range(2)]
        self.hva = self.vm.hva_of(self.data)
        self.vcpus[0].pre_fault_memory(CODE, _CODE_SIZE)
        self.errors: list[int] = []
        self.quiet = frozenset() if _CHANGE_MEMSLOTS & set(race.actors) else _MEMSLOTS
        self._served = 0
        """Actors that have what they faulted for."""
        end = self.hva + PAGE * ("handler" in race.actors)
        self._context = Context(self.host.mm, self.hva, end, UserfaultMode.MISSING)
        self._prepare(race.actors)
        self._shadowed = {(ipa, pte) for ipa, pte, shadow in self._leaves() if shadow}
        self._slots = self.vm.kvm.slots
        self.actors: dict[str, Callable[[], object]] = {
            name.replace("_", "-"): getattr(self, name) for name in race.actors
        }

    @property
    def _faulters(self) -> int:
        """How many actors fault on the memory, and count themselves when they are done."""
        return len({"pre_fault", "guest_read"} & set(self.race.actors))

    def _prepare(self, actors: tuple[str, ...]) -> None:
        """Bring the guest to where its race begins."""
        mapping = L2Mapping(self.data, self.data, PAGE)
        if "guest_read" in actors:
            self._load(Read(self.data))
        elif "guest_write" in actors:
            self._load(Write(self.data, 1))
        elif "pre_fault_in_l2" in actors:
            self._enter_l2(EnterL2((Read(self.data), Marker(1)), (mapping,)))
        elif _ENTER_L2 & set(actors):
            access = Write(self.data, 1) if "l2_write" in actors else Read(self.data)
            self._enter_l2(EnterL2((Marker(1), access), (mapping,)))

    def _load(self, step: Step) -> None:
        program = Program((step,), CODE)
        self.vm.install(program)
        self.vcpus[1].load(program)

    def _enter_l2(self, step: EnterL2) -> None:
        self._load(step)
        assert port.proceed(self.vcpus[1]) == port.AtMarker(1)

    # What actors do.

    def pre_fault(self) -> None:
        """KVM_PRE_FAULT_MEMORY on the first page of the slot."""
        self._pre_fault(self.vcpus[0], PAGE)

    def pre_fault_slot(self) -> None:
        """The same, on the whole slot."""
        self._pre_fault(self.vcpus[0], self.region.size)

    def pre_fault_again(self) -> None:
        """The same, on the first page, on another vCPU."""
        self._pre_fault(self.vcpus[1], PAGE)

    def pre_fault_in_l2(self) -> None:
        """The same, on a vCPU that is stopped in L2."""
        self._pre_fault(self.vcpus[1], PAGE)

    def _pre_fault(self, vcpu: SpecVcpu, size: int) -> None:
        progress = vcpu.pre_fault_memory_once(self.data, size)
        if progress.gpa + progress.size != self.data + size or not 0 <= progress.size <= size:
            raise Violation(f"pre-faulting {size:#x} bytes left {progress.size:#x} at {progress.gpa:#x}")
        if not progress.errno and not self._taken_away:
            for ipa in range(self.data, progress.gpa, PAGE):
                if not self.vm.kvm.mmu.pgt.get_leaf(ipa)[0] & VALID:
                    raise Violation(f"ipa {ipa:#x} was pre-faulted, but is not mapped")
        self.errors.append(progress.errno)
        self._served += 1

    @property
    def _taken_away(self) -> bool:
        """Whether somebody takes mappings away: a write does that, too, where it breaks CoW."""
        breaks_cow = _WRITE if self.race.resident is not Resident.WRITE else set()
        return bool((_TAKE_AWAY | breaks_cow) & set(self.race.actors))

    def madvise(self) -> None:
        """MADV_DONTNEED on the first page."""
        self.host.mm.dontneed(self.hva, self.hva + PAGE)

    def mprotect(self) -> None:
        """mprotect(PROT_READ) on the slot's memory."""
        self.host.mm.mprotect(self.hva, self.hva + self.region.size, readable=True, writable=False)

    def fork(self) -> None:
        """A fork of the VMM."""
        self.host.mm.fork()

    def ksm(self) -> None:
        """KSM finds the first two pages to be the same."""
        self.host.mm.ksm_merge([self.hva, self.hva + PAGE])

    def host_write(self) -> None:
        """The VMM writes to the memory, which breaks CoW."""
        self.host.mm.write(self.hva + 8, b"host")

    def delete(self) -> None:
        """Delete the slot, and unmap what was behind it."""
        self.vm.set_user_memory_region(replace(self.region, size=0))
        self.host.mm.munmap(self.hva, self.hva + self.region.size)

    def move(self) -> None:
        """Move the slot to another IPA."""
        self.vm.set_user_memory_region(replace(self.region, gpa=_MOVED_TO))

    def start_log(self) -> None:
        """Switch dirty logging on."""
        self.vm.set_user_memory_region(replace(self.region, flags=SlotFlags.LOG_DIRTY_PAGES))

    def stop_log(self) -> None:
        """Switch dirty logging off."""
        self.vm.set_user_memory_region(replace(self.region, flags=SlotFlags.NONE))

    def get_log(self) -> None:
        """Take the dirty log."""
        self.vm.get_dirty_log(1)

    def age(self) -> None:
        """The host looks at what was accessed, and forgets it."""
        self.host.mm.age(self.hva, PAGE)

    def guest_read(self) -> None:
        """A guest reads the first page."""
        self._run()

    def guest_write(self) -> None:
        """A guest writes to the first page."""
        self._run()

    def l2_read(self) -> None:
        """An L2 reads the first page."""
        self._run()

    def l2_write(self) -> None:
        """An L2 writes to the first page."""
        self._run()

    def _run(self) -> None:
        exit_ = self.vcpus[1].run()
        if not isinstance(exit_, MmioExit):
            raise Violation(f"the guest stopped with {exit_}")
        self._served += 1

    def handler(self) -> None:
        """The VMM's userfaultfd handler: serves whoever waits, until all have what they came for."""
        while True:
            step("uffd.read")
            wait("uffd.read", lambda: bool(self._unserved()) or self._served == self._faulters)
            if not self._unserved():
                return
            step("uffd.copy")
            self._context.copy(self.hva, b"\2" * PAGE)

    def _unserved(self) -> list[Wait]:
        return [one for one in self._context.waiting if not one.woken]

    def tlbi(self) -> None:
        """L1 drops what its L2 had."""
        for mmu in self.vm.kvm.nested_mmus[:1]:
            handle_vmalls12e1(self.vm.kvm, mmu.tlb_vttbr or 0)

    def remap(self) -> None:
        """L1 gives its L2 another page in place of the first one: break, TLBI, make."""
        where = self._descriptor()
        made = int.from_bytes(self.vm.read_memory(where, 8), "little") + PAGE
        self.vm.write_memory(where, bytes(8))
        self.tlbi()
        self.vm.write_memory(where, made.to_bytes(8, "little"))

    def _descriptor(self) -> int:
        """Where L1 has the leaf of its own table for the first page."""
        vttbr = self.vm.kvm.nested_mmus[0].tlb_vttbr or 0
        table, shift = vttbr & (1 << 48) - PAGE, 30
        while shift > 12:
            entry = int.from_bytes(self.vm.read_memory(table + 8 * (self.data >> shift & 511), 8), "little")
            table, shift = entry & (1 << 48) - PAGE, shift - 9
        return table + 8 * (self.data >> 12 & 511)

    # What is seen of it.

    def state(self) -> Hashable:
        """All that actors share."""
        kvm, mm, memory = self.vm.kvm, self.host.mm, self.host.memory
        lock = kvm.mmu_lock
        return (
            tuple([frozenset(entries.items()) for entries in mm.ptes.values()]),
            frozenset([(vma.start, vma.end, vma.writable) for vma in mm.vmas]),
            (frozenset(memory.freed), frozenset(mm.mapcount.items()), frozenset(mm.pins.items())),
            self._bytes(),
            frozenset([(table.pa, table.entries.tobytes()) for table in memory.tables.values()]),
            tuple([_mmu(mmu) for mmu in self._mmus()]),
            tuple([(slot.id, slot.base, slot.flags, self._logged(slot.dirty)) for slot in kvm.slots]),
            (lock.readers, lock.writer, kvm.slots_lock.writer, *kvm.srcu.readers, kvm.srcu.index),
            (kvm.mmu_invalidate_in_progress, kvm.mn_active_invalidate_count, *self.errors),
            (self._served, *[one.woken for one in self._context.waiting]),
            tuple([_registers(vcpu.cpu) for vcpu in self.vcpus]),
        )

    def _bytes(self) -> bytes:
        """What was written to the first page: the only one that is written to."""
        found = self.host.mm.lookup(self.hva)
        return self.host.memory.read(self.host.mm.pfn_of(self.hva, *found) * PAGE, 16) if found else b""

    @staticmethod
    def _logged(dirty: object) -> Hashable:
        return frozenset(getattr(dirty, "pages", ())) if dirty is not None else None

    def _mmus(self) -> list[S2Mmu]:
        return [self.vm.kvm.mmu, *self.vm.kvm.nested_mmus]

    def _leaves(self) -> Iterator[tuple[int, int, bool]]:
        """(IPA, descriptor, shadow) of what is mapped of the slot's pages; L2 has them one to one."""
        for mmu in self._mmus():
            ipa, end = self.data, self.data + self.region.size
            while ipa < end:
                pte, level = mmu.pgt.get_leaf(ipa)
                if pte & VALID:
                    yield ipa, pte, mmu.shadow
                ipa += mmu.pgt.granule.size(level)

    # The invariants.

    def check(self, *, done: bool) -> None:
        """What must hold after each step, and at the end."""
        kvm = self.vm.kvm
        if self.quiet and kvm.slots is not self._slots:
            raise AssertionError("memslots changed in a world where they are said not to")
        if self.host.memory.freed:
            self._check_freed()
        if not kvm.mn_active_invalidate_count:
            self._check_coherent()
        if done:
            self._check_memslot()
            self._check_log()
            self._check_shadow()
            self._check_nothing_made_up()
            self._check_nothing_lost()
            self._check_accounts()

    def _check_freed(self) -> None:
        freed, granule = self.host.memory.freed, self.vm.kvm.granule
        for ipa, pte, _ in self._leaves():
            if granule.to_phys(pte) // PAGE in freed:
                raise Violation(f"ipa {ipa:#x} is mapped to a frame that the host has taken back: {pte:#x}")
        for mmu in self._mmus():
            for page, to in mmu.pgt.tlb.pages.items():
                if to // PAGE in freed:
                    raise Violation(
                        f"the TLB has ipa {page * PAGE:#x} at a frame that the host has taken back"
                    )

    def _check_coherent(self) -> None:
        granule, mm = self.vm.kvm.granule, self.host.mm
        for ipa, pte, shadow in self._leaves():
            if shadow and "remap" in self.race.actors:
                continue  # L1's own table says what is right, and L1 is just changing it.
            hva = self.hva + ipa - self.data
            found = mm.lookup(hva)
            if found is None or mm.pfn_of(hva, *found) != granule.to_phys(pte) // PAGE:
                raise Violation(f"ipa {ipa:#x} is mapped to {pte:#x}, which is not what the host has there")
            if pte & S2AP_W and self.race.flags & SlotFlags.READONLY:
                raise Violation(f"ipa {ipa:#x} is writable in a read-only memslot")
            if pte & S2AP_W and not found[0] & WRITABLE:
                raise Violation(f"ipa {ipa:#x} is writable, but the host's page is not: {pte:#x}")

    def _check_memslot(self) -> None:
        if self.vm.kvm.slot_at(self.data) is None:
            for ipa, _, _ in self._leaves():
                raise Violation(f"ipa {ipa:#x} is mapped, but its memslot is not there any more")

    def _check_log(self) -> None:
        slot = self.vm.kvm.slot_at(self.data)
        if slot is None or slot.dirty is None:
            return
        writable = {ipa for ipa, pte, _ in self._leaves() if pte & S2AP_W}
        for mmu in self._mmus():
            writable |= {page * PAGE for page, to in mmu.pgt.tlb.pages.items() if to & Tlb.WRITE}
        known = {self.data + page * PAGE for page in slot.dirty.pages}
        for ipa in writable & set(range(self.data, self.data + self.region.size, PAGE)) - known:
            raise Violation(f"ipa {ipa:#x} is writable in a logged memslot, and the log does not know")
        if slot.dirty.pages and not _WRITE & set(self.race.actors):
            raise Violation(f"the log has pages {sorted(slot.dirty.pages)}, and nobody has written")

    def _check_shadow(self) -> None:
        """What a shadow has is what L1's own table says."""
        kvm, mm = self.vm.kvm, self.host.mm
        for mmu in kvm.nested_mmus if "remap" in self.race.actors else ():
            pte, _ = mmu.pgt.get_leaf(self.data)
            walk = GuestWalk(kvm, mmu.tlb_vtcr, mmu.tlb_vttbr or 0)
            found = walk.walk(self.data) if pte & VALID else None
            if isinstance(found, S2Translation):
                entry = mm.lookup(self.hva + found.output - self.data)
                if entry is None or entry[0] >> PFN_SHIFT != kvm.granule.to_phys(pte) // PAGE:
                    raise Violation(f"the shadow has {pte:#x}, but L1's own table leads elsewhere by now")

    def _check_nothing_made_up(self) -> None:
        mm = self.host.mm
        if self.race.resident is not Resident.WRITE and not _WRITE & set(self.race.actors):
            found = mm.lookup(self.hva)
            if self.race.backing is Backing.PRIVATE and found and found[0] & WRITABLE:
                raise Violation("private memory that nobody has written has a page of its own")
        if not {"l2_read", "l2_write"} & set(self.race.actors):
            new = {(ipa, pte) for ipa, pte, shadow in self._leaves() if shadow} - self._shadowed
            for ipa, pte in new:
                raise Violation(f"a shadow MMU got a leaf at {ipa:#x}, and L2 did not run: {pte:#x}")

    def _check_nothing_lost(self) -> None:
        """What was written is there, unless it was thrown away."""
        actors = set(self.race.actors)
        if actors & {"madvise", "delete", "move"}:
            return
        written = (("guest_write", 0, b"\1"), ("l2_write", 0, b"\1"), ("host_write", 8, b"host"))
        for actor, offset, data in written:
            if actor in actors and self.host.mm.read(self.hva + offset, len(data)) != data:
                raise Violation(f"what {actor.replace('_', '-')} has written is lost")
        if "ksm" in actors and self.host.mm.read(self.hva + PAGE, 1) != b"\0":
            raise Violation("what was written to the first page is in the second one")

    def _check_accounts(self) -> None:
        kvm = self.vm.kvm
        reached = set().union(*(mmu.pgt.check() for mmu in self._mmus()))
        if reached != set(self.host.memory.tables):
            raise Violation("a table is reached by no entry, and not freed")
        if self.host.mm.pins:
            raise Violation(f"pages are still pinned: {[hex(pfn) for pfn in self.host.mm.pins]}")
        if kvm.mmu_invalidate_in_progress or kvm.mn_active_invalidate_count:
            raise Violation("an invalidation has no end: no fault on the VM will be served any more")
        if not set(self.errors) <= (_ERRORS if _TAKE_AWAY & set(self.race.actors) else {0}):
            raise Violation(f"pre-faulting ended with {[errno.errorcode[one] for one in self.errors if one]}")


def _mmu(mmu: S2Mmu) -> Hashable:
    return frozenset(mmu.pgt.tlb.pages.items()), mmu.refcnt, mmu.pending_unmap


def _registers(cpu: Cpu) -> Hashable:
    return cpu.pc, cpu.el, cpu.generation == cpu.mmu.pgt.tlb.generation, *cpu.x
