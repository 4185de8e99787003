# SPDX-License-Identifier: Apache-2.0
"""Dirty rings, in a file that plays the vCPU."""

from __future__ import annotations

import ctypes
import os

import pytest

from prefault.abi import structures
from prefault.errors import CapabilityMissing, UsageError
from prefault.kvm.dirty_ring import DirtyRing
from prefault.kvm.vm import Vm
from prefault.machine import VmConfig

PAGE = os.sysconf("SC_PAGE_SIZE")
ENTRIES = PAGE // ctypes.sizeof(structures.kvm_dirty_gfn)
START = 64 * PAGE
DIRTY, RESET = 1, 2


def test_a_ring_is_harvested_in_order_and_round_and_round() -> None:
    fd = os.memfd_create("vcpu")
    os.ftruncate(fd, START + PAGE)
    with DirtyRing(fd, ENTRIES, PAGE) as ring:
        assert ring.harvest() == []
        for first in range(0, 3 * ENTRIES, ENTRIES // 4 * 3):
            new = range(first, first + ENTRIES // 4 * 3)
            for number in new:
                entry = structures.kvm_dirty_gfn(DIRTY, 5, number)
                os.pwrite(fd, bytes(entry), START + number % ENTRIES * len(bytes(entry)))
            assert ring.harvest() == [(5, number) for number in new]
            assert ring.harvest() == []
            at = START + first % ENTRIES * ctypes.sizeof(structures.kvm_dirty_gfn)
            assert structures.kvm_dirty_gfn.from_buffer_copy(os.pread(fd, 16, at)).flags == RESET
    os.close(fd)


class NoRings(Vm):
    """Has no capability."""

    def try_ioctl(self, name: str, argument: int | ctypes.Structure = 0) -> tuple[int, int]:
        return 0, 0


def test_a_kernel_without_rings_is_said_to_have_none() -> None:
    fd = os.memfd_create("vm")
    with pytest.raises(CapabilityMissing, match="KVM_CAP_DIRTY_LOG_RING_ACQ_REL"):
        NoRings(fd, VmConfig(gic=False, dirty_ring=ENTRIES), PAGE, PAGE)
    with NoRings(fd, VmConfig(gic=False), PAGE, PAGE) as vm, pytest.raises(UsageError, match="dirty_ring="):
        vm.harvest_dirty_rings()
