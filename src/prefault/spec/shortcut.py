# SPDX-License-Identifier: Apache-2.0
"""Pre-faulting of many pages in a row, with the outcome of doing them one by one.

There is no such code in the kernel. Where nobody else runs, what user_mem_abort() does for a page
whose neighbour was just mapped is to put one more descriptor into the same table; a test holds
this loop to the outcome of the long way. It is not taken while orders are explored, and it stops
at the first page for which there is anything to decide.
"""

from __future__ import annotations

from array import array

from prefault.abi.constants import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from prefault.spec.descriptors import AF, LAST_LEVEL, TABLE, VALID, Prot
from prefault.spec.mm import PFN_SHIFT, WRITABLE
from prefault.spec.state import INVALID, KvmState, Slot


def prefault_resident(kvm: KvmState, ipa: int, end: int) -> int:
    """Map resident pages from ``ipa`` on that share one level-3 table; where that ended."""
    slot = kvm.slot_at(ipa)
    if slot is None or slot.gmem or slot.flags & INVALID or kvm.mmu_invalidate_in_progress:
        return ipa
    vma = kvm.host.mm.vma_lookup(slot.hva_of(ipa))
    if vma is None or vma.pfn or vma.secret or vma.hugetlb or vma.thp or not vma.readable:
        return ipa
    table, index, level = kvm.mmu.pgt.find(ipa)
    if level != LAST_LEVEL:
        return ipa
    pages = min(end, slot.base + slot.size, ipa + vma.end - slot.hva_of(ipa)) - ipa >> kvm.granule.page_shift
    made = _descriptors(kvm, slot, ipa, table.entries[index : index + pages])
    table.refs += sum(1 for old in table.entries[index : index + len(made)] if not old)
    table.entries[index : index + len(made)] = made
    return ipa + (len(made) << kvm.granule.page_shift)


def _descriptors(kvm: KvmState, slot: Slot, ipa: int, old: array[int]) -> array[int]:
    """What ``old`` becomes, up to the first page that is not as simple as that."""
    memory, shift = kvm.host.memory, kvm.granule.page_shift
    entries, poisoned = kvm.host.mm.ptes[shift], memory.poisoned
    prot = Prot.R | Prot.X if kvm.dic else Prot.R
    locked = slot.flags & (KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY)
    attr = kvm.mmu.pgt.attributes(prot) | VALID | TABLE
    attr_of = (attr, attr if locked else kvm.mmu.pgt.attributes(prot | Prot.W) | VALID | TABLE)
    to_pte, young = kvm.granule.to_pte, VALID | AF
    made = array("Q")
    page = slot.hva_of(ipa) >> shift
    for number, pte in enumerate(old, page):
        if not pte:
            entry = entries.get(number)
            if entry is None or entry >> PFN_SHIFT in poisoned:
                break
            pte = to_pte(entry >> PFN_SHIFT << shift) | attr_of[entry & WRITABLE]
        elif pte & young != young:
            break
        made.append(pte)
    return made
