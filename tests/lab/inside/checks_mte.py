# SPDX-License-Identifier: Apache-2.0
"""What must hold of the tags of memory that was pre-faulted for a guest with KVM_CAP_ARM_MTE.

A guest has tags only in memory that its own tables at stage 1 call Tagged, so that these guests have some:
three blocks of 1 GiB, each where it is. The host turns them on, through the registers.

The host does not clear the tags of a page that is given back to it. KVM clears them when it maps a page that
has none of its own.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from prefault.guest import a64, port
from prefault.guest.program import PORT
from prefault.kvm import host
from prefault.kvm.vcpu import Vcpu
from prefault.kvm.vm import Vm
from prefault.machine import Access, Advice, Backing, MemoryRegion, Resident, VmConfig
from tests.lab.inside.checks import Checks, main
from tests.lab.inside.guests import CODE, CODE_SIZE, DATA, MIB, PAGE, data_region, kvm, until_exit

checks = Checks()
PAGES = 64
GRANULE = 16
TAG = 0xA
TABLE = CODE + MIB
TRIES = 20

_AF, _INNER_SHAREABLE, _BLOCK = 1 << 10, 3 << 8, 1
_DEVICE, _NORMAL, _TAGGED = 0, 1, 2
_STAGE1 = {
    "mair_el1": 0x00 << 8 * _DEVICE | 0xFF << 8 * _NORMAL | 0xF0 << 8 * _TAGGED,
    # 39 bits of address in 4 KiB granules, walked through caches; nothing in the upper half; 40 bits out.
    "tcr_el1": 2 << 32 | 1 << 23 | 3 << 12 | 1 << 10 | 1 << 8 | 25,
    "ttbr0_el1": TABLE,
}
_SCTLR_ON = 1 << 43 | 1 << 12 | 1 << 2 | 1
"""ATA, I, C and M: access to tags, caches, stage 1."""
_PSTATE_EL1H_MASKED = 0x3C5


class Code(a64.Assembler):
    """What a guest with tags does."""

    def _each_granule(self, gpa: int, size: int, *body: int) -> None:
        """Have x0 go through a range."""
        again = self.fresh("granule")
        self.load_constant(0, gpa)
        self.load_constant(1, gpa + size)
        self.load_constant(2, GRANULE)
        self.label(again)
        self.emit(*body, a64.add(0, 0, 2), a64.cmp(0, 1))
        self.emit_to(again, partial(a64.branch_if, a64.Condition.LO))

    def set_tags(self, gpa: int, size: int, tag: int) -> None:
        """Give each granule of a range a tag."""
        self.load_constant(3, tag << 56)
        self._each_granule(gpa, size, a64.stg(3, 0))

    def report_tags(self, gpa: int, size: int) -> None:
        """Tell the sum of the tags of a range."""
        self.load_constant(4, 0)
        self.load_constant(5, 0)
        self._each_granule(gpa, size, a64.ldg(5, 0), a64.lsr(6, 5, 56), a64.add(4, 4, 6))
        self.tell(port.VALUE, 4)

    def report_word(self, gpa: int) -> None:
        """Tell what is in memory."""
        self.load_constant(0, gpa)
        self.emit(a64.load(4, 0))
        self.tell(port.VALUE, 4)

    def tell(self, what: int, register: int = a64.XZR) -> None:
        """Write to the port."""
        self.load_constant(9, PORT)
        self.emit(a64.store(register, 9, what))


@dataclass(frozen=True)
class Guest:
    """A VM with tags and its vCPU, which stands before ``code``."""

    vm: Vm
    vcpu: Vcpu
    size: int

    def frames(self) -> set[int]:
        """The frames of its data."""
        return set(host.frames(self.vm.hva_of(DATA), self.size, PAGE)) - {0}

    def event(self) -> object:
        """Run up to the next event, which must cost no stage-2 fault on memory."""
        with self.vm.count_faults() as counts:
            event = until_exit(self.vcpu)
        assert counts.total == 0, counts
        return event


@contextlib.contextmanager
def guest(region: MemoryRegion, write: Callable[[Code], None]) -> Iterator[Guest]:
    """A guest with tags that stands at its first marker, behind which is what ``write`` adds."""
    code = Code()
    code.tell(port.MARKER)
    write(code)
    code.tell(port.DONE)
    with kvm().create_vm(VmConfig(mte=True)) as vm:
        vm.set_user_memory_region(MemoryRegion(0, CODE, CODE_SIZE, resident=Resident.WRITE))
        vm.set_user_memory_region(region)
        vm.write_memory(CODE, code.finish())
        blocks = enumerate((_DEVICE, _NORMAL, _TAGGED))
        flags = _AF | _INNER_SHAREABLE | _BLOCK
        vm.write_memory(
            TABLE, b"".join(struct.pack("<Q", at << 30 | kind << 2 | flags) for at, kind in blocks)
        )
        vcpu = vm.create_vcpu()
        for name, value in _STAGE1.items():
            vcpu.set_register(name, value)
        vcpu.set_register("sctlr_el1", vcpu.get_register("sctlr_el1") | _SCTLR_ON)
        vcpu.set_register("pstate", _PSTATE_EL1H_MASKED)
        vcpu.set_register("pc", CODE)
        assert until_exit(vcpu) == port.AtMarker(0)
        yield Guest(vm, vcpu, region.size)


def _sum(size: int, tag: int = TAG) -> port.Reported:
    return port.Reported(size // GRANULE * tag)


def _sets_and_tells(code: Code, size: int) -> None:
    code.set_tags(DATA, size, TAG)
    code.tell(port.MARKER)
    code.report_tags(DATA, size)


def _size(backing: Backing) -> int:
    return 4 * MIB if backing in (Backing.THP, Backing.HUGETLB) else PAGES * PAGE


def _region(backing: Backing) -> MemoryRegion:
    return data_region(_size(backing), backing, resident=Resident.WRITE)


TAGGED = (Backing.PRIVATE, Backing.SHARED, Backing.FILE_SHARED, Backing.THP, Backing.HUGETLB)


def _drop(one: Guest, backing: Backing) -> None:
    """Give all pages back to the host, and take others."""
    advice = Advice.DONTNEED if backing in (Backing.PRIVATE, Backing.THP) else Advice.REMOVE
    one.vm.advise(DATA, one.size, advice)
    one.vm.advise(DATA, one.size, Advice.POPULATE_WRITE)


@checks.each(TAGGED)
def pages_that_somebody_else_had_tags_in_have_none(backing: Backing) -> None:
    size = _size(backing)
    for _ in range(TRIES):
        with guest(_region(backing), partial(_sets_and_tells, size=size)) as one:
            one.vcpu.pre_fault_memory(DATA, size)
            assert one.event() == port.AtMarker(0)
            before = one.frames()
            _drop(one, backing)
            same = before & one.frames()
            one.vcpu.pre_fault_memory(DATA, size)
            found = one.event()
            assert found == _sum(size, 0), f"{found}; {len(same)} frames had tags before"
        if same:
            return
    raise AssertionError("the host never gave a page back that it had taken")


@checks.each(TAGGED)
def tags_that_the_guest_has_set_survive_a_prefault_of_what_is_mapped(backing: Backing) -> None:
    size = _size(backing)
    with guest(_region(backing), partial(_sets_and_tells, size=size)) as one:
        one.vcpu.pre_fault_memory(DATA, size)
        assert one.event() == port.AtMarker(0)
        one.vcpu.pre_fault_memory(DATA, size)
        assert one.event() == _sum(size)


@checks.each(TAGGED)
def tags_that_the_guest_has_set_are_there_when_the_page_is_prefaulted_again(backing: Backing) -> None:
    size = _size(backing)
    with guest(_region(backing), partial(_sets_and_tells, size=size)) as one:
        one.vcpu.pre_fault_memory(DATA, size)
        assert one.event() == port.AtMarker(0)
        before = one.frames()
        one.vm.protect(DATA, size, Access.NONE)
        one.vm.protect(DATA, size, Access.WRITE)
        assert not [leaf for leaf in one.vm.stage2() if leaf.ipa >= DATA]
        one.vcpu.pre_fault_memory(DATA, size)
        assert one.frames() == before
        assert one.event() == _sum(size)


@checks
def a_tag_set_in_a_page_that_was_never_written_is_in_that_page_alone() -> None:
    size = PAGES * PAGE

    def write(code: Code) -> None:
        code.report_tags(DATA, size)
        code.set_tags(DATA + PAGE, GRANULE, TAG)
        code.report_tags(DATA, size)
        code.report_word(DATA + PAGE)

    with guest(data_region(size, resident=Resident.NOTHING), write) as one:
        one.vcpu.pre_fault_memory(DATA, size)
        assert not any(leaf.writable for leaf in one.vm.stage2() if leaf.ipa >= DATA)
        assert one.event() == _sum(size, 0)
        # This is a write to the zero page, which breaks copy on write.
        assert until_exit(one.vcpu) == port.Reported(TAG)
        assert one.event() == port.Reported(0)


if __name__ == "__main__":
    main(checks)
