# SPDX-License-Identifier: Apache-2.0
"""The VMM's memory, and what KVM makes of what happens to it."""

from __future__ import annotations

import errno

import pytest

from prefault.errors import EHWPOISON
from prefault.guest import port
from prefault.guest.program import Marker, Program, Read, Report, Step, Write
from prefault.machine import Backing, Exit, Failed, Interrupted, Leaf, MemoryRegion, Resident
from prefault.spec import SpecKvm, open_spec, unmap
from prefault.spec.mm import Vma
from prefault.spec.state import Slot
from prefault.spec.vcpu import SpecVcpu

CODE, DATA, PAGE, BLOCK = 0x4000_0000, 0x1_0000_0000, 0x1000, 2 << 20


class Guest:
    """A VM with one slot and one vCPU."""

    def __init__(
        self, backing: Backing = Backing.PRIVATE, resident: Resident = Resident.WRITE, size: int = BLOCK
    ):
        self.kvm: SpecKvm = open_spec()
        self.mm = self.kvm.host.mm
        self.vm = self.kvm.create_vm()
        self.vm.set_user_memory_region(MemoryRegion(0, CODE, BLOCK, resident=Resident.WRITE))
        self.vm.set_user_memory_region(MemoryRegion(1, DATA, size, backing, resident))
        self.vcpu: SpecVcpu = self.vm.create_vcpu()
        self.hva = self.vm.hva_of(DATA)
        self.pre_fault(CODE)

    def pre_fault(self, gpa: int = DATA, size: int = PAGE) -> int:
        return self.vcpu.pre_fault_memory_once(gpa, size).errno

    def run(self, *steps: Step) -> list[Exit]:
        program = Program(steps, CODE)
        self.vm.install(program)
        self.vcpu.load(program)
        return list(port.events(self.vcpu))

    def leaves(self) -> list[Leaf]:
        self.vm.check()
        return [leaf for leaf in self.vm.stage2() if leaf.ipa >= DATA]


def test_memory_never_written_is_mapped_read_only_and_a_write_breaks_cow() -> None:
    guest = Guest(resident=Resident.NOTHING)
    assert guest.pre_fault() == 0
    assert not guest.leaves()[0].writable
    with guest.vm.count_faults() as faults:
        guest.run(Write(DATA, 5), Read(DATA), Report())
    assert (faults.write, faults.permission) == (2, 1)
    assert guest.leaves()[0].writable
    assert guest.vm.read_memory(DATA, 1) == b"\5"


def test_a_fork_takes_write_access_away_until_the_next_write() -> None:
    guest = Guest()
    guest.pre_fault()
    guest.mm.write(guest.hva, b"before")
    child = guest.mm.fork()
    assert guest.leaves() == []
    guest.pre_fault()
    assert not guest.leaves()[0].writable
    guest.run(Write(DATA, 0x21, 1))
    assert child.read(guest.hva, 6) == b"before"
    assert guest.vm.read_memory(DATA, 6) == b"!efore"


def test_the_last_owner_of_a_forked_page_writes_without_a_copy() -> None:
    guest = Guest()
    before = guest.mm.lookup(guest.hva)
    assert before
    guest.mm.fork().exit()
    guest.mm.write(guest.hva, b"x")
    after = guest.mm.lookup(guest.hva)
    assert after
    assert guest.mm.pfn_of(guest.hva, *before) == guest.mm.pfn_of(guest.hva, *after)


def test_ksm_pages_are_mapped_read_only_and_stay_merged() -> None:
    guest = Guest()
    pages = [guest.hva, guest.hva + PAGE]
    for hva in pages:
        guest.mm.write(hva, b"same")
    guest.mm.ksm_merge(pages)
    guest.pre_fault(DATA, 2 * PAGE)
    assert [(leaf.size, leaf.writable) for leaf in guest.leaves()] == [(2 * PAGE, False)]
    guest.run(Write(DATA, 0x21, 1))
    assert guest.vm.read_memory(DATA + PAGE, 4) == b"same"
    assert guest.vm.read_memory(DATA, 4) == b"!ame"


def test_madvise_dontneed_unmaps_and_the_guest_then_reads_zeros() -> None:
    guest = Guest()
    guest.run(Write(DATA, 7))
    guest.mm.dontneed(guest.hva, guest.hva + PAGE)
    assert guest.leaves() == []
    assert guest.run(Read(DATA), Report())[0] == port.Reported(0)


def test_a_block_is_lost_when_its_thp_is_split() -> None:
    guest = Guest(Backing.THP, size=2 * BLOCK)
    guest.pre_fault(DATA, 2 * BLOCK)
    assert [(leaf.size, leaf.level) for leaf in guest.leaves()] == [(2 * BLOCK, 2)]
    guest.mm.dontneed(guest.hva + PAGE, guest.hva + 2 * PAGE)
    assert [(leaf.ipa, leaf.level) for leaf in guest.leaves()] == [(DATA + BLOCK, 2)]
    guest.pre_fault(DATA, BLOCK)
    assert [leaf.level for leaf in guest.leaves()] == [3, 3, 3, 2]


def test_mprotect_makes_leaves_read_only_and_a_write_then_fails() -> None:
    guest = Guest()
    guest.pre_fault()
    guest.mm.mprotect(guest.hva, guest.hva + PAGE, readable=True, writable=False)
    guest.pre_fault()
    assert not guest.leaves()[0].writable
    assert guest.run(Write(DATA, 1))[-1] == Failed(errno.EFAULT)
    guest.mm.mprotect(guest.hva, guest.hva + PAGE, readable=True, writable=True)
    assert guest.run(Write(DATA, 1), Marker(1))[0] == port.AtMarker(1)


def test_unmapped_host_memory_is_efault_for_both() -> None:
    guest = Guest()
    guest.mm.munmap(guest.hva, guest.hva + PAGE)
    assert guest.pre_fault() == errno.EFAULT
    assert guest.run(Read(DATA))[-1] == Failed(errno.EFAULT)
    assert guest.pre_fault(DATA + PAGE) == 0


def test_poison_is_ehwpoison_without_a_signal_for_the_ioctl_and_a_signal_for_the_guest() -> None:
    guest = Guest()
    guest.mm.poison(guest.hva)
    assert guest.pre_fault() == EHWPOISON
    assert guest.pre_fault(DATA + PAGE) == 0
    assert guest.run(Read(DATA))[-1] == Interrupted()


def test_poisoned_guest_memfd_says_so() -> None:
    guest = Guest(Backing.GUEST_MEMFD)
    guest.mm.poison(guest.hva)
    assert guest.pre_fault() == EHWPOISON


def test_a_hole_punched_into_guest_memfd_unmaps() -> None:
    guest = Guest(Backing.GUEST_MEMFD)
    guest.pre_fault(DATA, 3 * PAGE)
    slot: Slot = next(slot for slot in guest.vm.kvm.slots if slot.gmem)
    unmap.kvm_gmem_punch_hole(guest.vm.kvm, 1, 1, slot.gmem)
    assert [leaf.ipa for leaf in guest.leaves()] == [DATA, DATA + 2 * PAGE]
    assert guest.pre_fault(DATA + PAGE) == 0


def test_userfaultfd_is_waited_for_and_can_be_interrupted() -> None:
    guest = Guest(resident=Resident.NOTHING)
    vma = guest.mm.vma_lookup(guest.hva)
    assert vma
    asked: list[tuple[int, bool]] = []

    def handler(hva: int, write: bool) -> bool:
        asked.append((hva, write))
        if len(asked) == 1:
            return False
        guest.mm.ptes[12][hva >> 12] = guest.mm.memory.allocate() << 1 | 1
        return True

    vma.missing = handler
    assert guest.pre_fault() == errno.EINTR
    assert guest.pre_fault() == 0
    assert asked == [(guest.hva, False)] * 2
    assert guest.leaves()[0].writable


def test_minor_faults_are_for_pages_that_the_file_has() -> None:
    guest = Guest(Backing.FILE_SHARED, Resident.NOTHING)
    vma = guest.mm.vma_lookup(guest.hva)
    assert vma
    assert vma.file
    asked: list[int] = []

    def handler(hva: int, write: bool) -> bool:
        asked.append(hva)
        assert vma
        assert vma.file
        guest.mm.ptes[12][hva >> 12] = vma.file.pages[0] << 1
        return True

    vma.minor = handler
    guest.mm.page_cache(vma.file, 0)
    assert guest.pre_fault(DATA, 2 * PAGE) == 0
    assert asked == [guest.hva]


def test_device_memory_is_mapped_without_pages() -> None:
    guest = Guest()
    hva = guest.mm.reserve(BLOCK, BLOCK)
    guest.mm.mmap(Vma(hva, hva + BLOCK, shared=True, pfn=0x9_0000))
    guest.vm.kvm.slots += (Slot(7, 2 * DATA, BLOCK, hva, 0),)
    assert guest.pre_fault(2 * DATA, 2 * PAGE) == 0
    assert guest.mm.pins == {}
    assert [(leaf.ipa, leaf.size, leaf.writable) for leaf in guest.leaves()] == [(2 * DATA, 2 * PAGE, True)]


def test_ageing_makes_leaves_old_and_pre_faulting_young() -> None:
    guest = Guest()
    guest.pre_fault()
    (notifier,) = guest.mm.notifiers
    assert notifier.clear_young(guest.hva, guest.hva + PAGE)
    assert not guest.leaves()[0].accessed
    assert not notifier.clear_young(guest.hva, guest.hva + PAGE)
    guest.pre_fault()
    assert guest.leaves()[0].accessed


def test_without_hardware_access_flags_the_guest_faults_to_make_a_leaf_young() -> None:
    guest = Guest()
    guest.pre_fault()
    (notifier,) = guest.mm.notifiers
    notifier.clear_young(guest.hva, guest.hva + PAGE)
    guest.vcpu.cpu.hafdbs = False
    with guest.vm.count_faults() as faults:
        guest.run(Read(DATA), Marker(1))
    assert faults.read == 1
    assert guest.leaves()[0].accessed


@pytest.mark.parametrize("backing", list(Backing))
def test_everything_is_given_back_in_the_end(backing: Backing) -> None:
    guest = Guest(backing)
    guest.run(Write(DATA, 1), Read(DATA + PAGE))
    guest.vm.close()
    assert guest.mm.pins == {}
    assert guest.kvm.host.memory.tables == {}
    assert not any(guest.mm.ptes.values())
