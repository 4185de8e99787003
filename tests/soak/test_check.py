# SPDX-License-Identifier: Apache-2.0
"""Whatever byte is not what was written is told, with its page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.machine import Backing, MemoryRegion, Resident, SlotFlags, Vm
from prefault.soak import check
from prefault.soak.ground import DATA, HOLE, Ground, Patch, lay_out
from prefault.spec import open_spec

PAGE = 4096
KEPT = Patch(MemoryRegion(1, DATA, 4 * PAGE, Backing.PRIVATE))
LOSING = Patch(MemoryRegion(2, DATA + HOLE, 4 * PAGE, Backing.PRIVATE), volatile=True)
READ_ONLY = Patch(MemoryRegion(3, DATA + 2 * HOLE, 4 * PAGE, Backing.SHARED, flags=SlotFlags.READONLY))


@pytest.fixture(scope="module")
def vm() -> Iterator[Vm]:
    with open_spec() as kvm, kvm.create_vm() as vm:
        for patch in (KEPT, LOSING, READ_ONLY):
            vm.set_user_memory_region(patch.region)
        yield vm


def stamped(vm: Vm) -> Ground:
    ground = Ground(cast(Any, vm), PAGE, [KEPT, LOSING, READ_ONLY])
    ground.stamp()
    return ground


def test_memory_that_was_only_stamped_is_as_it_must_be(vm: Vm) -> None:
    assert list(check.contents(stamped(vm))) == []


@given(st.sampled_from([KEPT, LOSING, READ_ONLY]), st.integers(0, 4 * PAGE - 1), st.integers(1, 255))
def test_any_changed_byte_is_told_with_its_page(vm: Vm, patch: Patch, offset: int, change: int) -> None:
    ground = stamped(vm)
    gpa = patch.region.gpa + offset
    vm.write_memory(gpa, bytes([vm.read_memory(gpa, 1)[0] ^ change]))
    (line,) = check.contents(ground)
    assert f"gpa {gpa & -PAGE:#x}" in line


def test_a_guest_may_write_its_address_but_not_into_read_only_memory(vm: Vm) -> None:
    ground = stamped(vm)
    for patch in (KEPT, LOSING, READ_ONLY):
        vm.write_memory(patch.region.gpa, patch.region.gpa.to_bytes(8, "little"))
    (line,) = check.contents(ground)
    assert "slot 3" in line


def test_only_what_may_be_lost_is_allowed_to_be(vm: Vm) -> None:
    ground = stamped(vm)
    for patch in (KEPT, LOSING, READ_ONLY):
        vm.write_memory(patch.region.gpa, bytes(PAGE))
    assert ["slot 1" in line or "slot 3" in line for line in check.contents(ground)] == [True, True]


def test_what_the_guest_wrote_for_certain_must_be_there(vm: Vm) -> None:
    ground = stamped(vm)
    ground.written.add(DATA + PAGE)
    (line,) = check.contents(ground)
    assert f"gpa {DATA + PAGE:#x}" in line


def test_a_guest_reads_what_the_host_has(vm: Vm) -> None:
    with open_spec() as kvm, kvm.create_vm() as fresh:
        ground = Ground(cast(Any, fresh), PAGE, [KEPT, LOSING, READ_ONLY])
        ground.set_up()
        ground.stamp()
        reader, vcpu = check.Reader(ground), cast(Any, fresh.create_vcpu())
        assert list(reader.reads(vcpu)) == []
        assert list(reader.writes(vcpu)) == []
        assert list(check.contents(ground)) == []


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_slots_neither_meet_nor_begin_within_a_page(page: int) -> None:
    patches = lay_out(page, guest_memfd=True)
    ends = [one.region.gpa + one.region.size for one in patches]
    assert all(after.region.gpa >= end + HOLE for end, after in zip(ends, patches[1:], strict=False))
    assert all(one.region.gpa % page == one.region.size % page == 0 for one in patches)
    assert Resident.NOTHING is patches[0].region.resident


def test_without_guest_memfd_there_is_none() -> None:
    assert any(one.region.backing is Backing.GUEST_MEMFD for one in lay_out(PAGE, guest_memfd=True))
    assert all(one.region.backing is not Backing.GUEST_MEMFD for one in lay_out(PAGE, guest_memfd=False))


@pytest.mark.parametrize("of_all", [False, True])
def test_a_page_of_ksm_is_shared_unless_the_kernel_says_so_of_all(
    monkeypatch: pytest.MonkeyPatch, of_all: bool
) -> None:
    hva, pfn = 0x7000_0000, 5

    def pread(fd: str, size: int, offset: int) -> bytes:
        if fd == "/proc/self/pagemap":
            return (1 << 63 | 1 << 56 | (pfn if offset == hva // PAGE * 8 else 6)).to_bytes(8, "little")
        return (1 << 21 if of_all or offset == pfn * 8 else 0).to_bytes(8, "little")

    monkeypatch.setattr(os, "open", lambda path, flags: path)
    monkeypatch.setattr(os, "pread", pread)
    page = check._Pagemap(PAGE).of(hva)
    assert page and page.shared is not of_all
