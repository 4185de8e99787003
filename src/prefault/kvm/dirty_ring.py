# SPDX-License-Identifier: Apache-2.0
"""The dirty ring of a vCPU: which pages it has written, in order, in memory that it shares with its VMM.

Source: Documentation/virt/kvm/api.rst, KVM_CAP_DIRTY_LOG_RING_ACQ_REL
"""

from __future__ import annotations

import ctypes

from prefault.abi import constants, structures
from prefault.closing import Closing
from prefault.kvm import mapping


class DirtyRing(Closing):
    """A ring of so many entries. Harvest it while its vCPU does not run."""

    def __init__(self, vcpu_fd: int, entries: int, page_size: int) -> None:
        self._entries = entries
        self._next = 0
        self._size = entries * ctypes.sizeof(structures.kvm_dirty_gfn)
        offset = constants.KVM_DIRTY_LOG_PAGE_OFFSET * page_size
        self._address = mapping.map_shared(vcpu_fd, self._size, offset)

    def harvest(self) -> list[tuple[int, int]]:
        """(slot, page) of what is new; KVM_RESET_DIRTY_RINGS takes it from there."""
        gfns = (structures.kvm_dirty_gfn * self._entries).from_address(self._address)
        found = []
        while (gfn := gfns[self._next % self._entries]).flags & constants.KVM_DIRTY_GFN_F_DIRTY:
            found.append((gfn.slot, gfn.offset))
            gfn.flags = constants.KVM_DIRTY_GFN_F_RESET
            self._next += 1
        return found

    def close(self) -> None:
        """Unmap it. Safe to call again."""
        address, self._address = self._address, 0
        if address:
            mapping.unmap(address, self._size)
