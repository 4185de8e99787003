# SPDX-License-Identifier: Apache-2.0
"""A TLB: what the hardware may still use after a descriptor has changed.

It keeps every translation until it is told to forget it, so that a missing invalidation shows.
One for each stage-2 MMU, shared by its vCPUs: KVM's invalidations are broadcast.
"""

from __future__ import annotations


class Tlb:
    """Translations of one VMID, by page.

    :ivar pages: number of the page in IPA space → physical address of the page | permissions
    :ivar generation: changes when something is forgotten
    :ivar broken: if True, nothing is forgotten; a fault that the explorer must find
    """

    __slots__ = ("_shift", "broken", "generation", "pages")

    READ, WRITE, EXECUTE = 1, 2, 4

    def __init__(self, page_shift: int) -> None:
        self.pages: dict[int, int] = {}
        self.generation = 0
        self.broken = False
        self._shift = page_shift

    def flush_range(self, ipa: int, size: int) -> None:
        """Forget a range. Mirrors: kvm_tlb_flush_vmid_range()"""
        self.generation += 1
        if not self.pages or self.broken:
            return
        first, last = ipa >> self._shift, (ipa + size - 1) >> self._shift
        if last - first < len(self.pages):
            for page in range(first, last + 1):
                self.pages.pop(page, None)
        else:
            self.pages = {page: to for page, to in self.pages.items() if not first <= page <= last}
