# SPDX-License-Identifier: Apache-2.0
"""From an IPA of a memslot to a page of the host, faulted in and pinned.

Mirrors: virt/kvm/kvm_main.c (hva_to_pfn and what it calls), virt/kvm/guest_memfd.c
"""

from __future__ import annotations

import errno

from prefault.abi.constants import KVM_MEM_READONLY
from prefault.errors import EHWPOISON
from prefault.spec.mm import Mm
from prefault.spec.state import KvmState, Slot
from prefault.spec.steps import step

Pfn = tuple[int, bool, bool]
"""Frame, whether it may be mapped writable, whether it is pinned."""


def kvm_faultin_pfn(kvm: KvmState, slot: Slot, ipa: int, *, write: bool, interruptible: bool) -> Pfn | int:
    """Mirrors: __kvm_faultin_pfn()

    :returns: a negative errno if there is no page: EINTR, EHWPOISON or EFAULT
    """
    if write and slot.flags & KVM_MEM_READONLY:
        return -errno.EFAULT
    read_only = bool(slot.flags & KVM_MEM_READONLY) and not kvm.host.faults.readonly_ignored
    return hva_to_pfn(
        kvm.host.mm, slot.hva_of(ipa), write=write, read_only=read_only, interruptible=interruptible
    )


def hva_to_pfn(mm: Mm, hva: int, *, write: bool, read_only: bool, interruptible: bool) -> Pfn | int:
    """Mirrors: hva_to_pfn()"""
    if not read_only:
        fast = mm.get_user_page_fast_only(hva)
        if fast is not None:
            return fast, True, True
    pfn = mm.get_user_page(hva, write=write, interruptible=interruptible)
    if pfn >= 0:
        return _map_read_writable(mm, hva, pfn, write=write, read_only=read_only)
    if pfn in (-errno.EINTR, -EHWPOISON):
        return pfn
    return hva_to_pfn_remapped(mm, hva, write=write, read_only=read_only)


def _map_read_writable(mm: Mm, hva: int, pfn: int, *, write: bool, read_only: bool) -> Pfn:
    """Map a read fault as writable if that costs nothing. Mirrors: the end of hva_to_pfn_slow()"""
    if write or read_only:
        return pfn, write, True
    writable = mm.get_user_page_fast_only(hva)
    if writable is None:
        return pfn, False, True
    mm.unpin(pfn)
    return writable, True, True


def hva_to_pfn_remapped(mm: Mm, hva: int, *, write: bool, read_only: bool) -> Pfn | int:
    """Mirrors: hva_to_pfn_remapped()"""
    vma = mm.vma_lookup(hva)
    if vma is None or not vma.pfn or (write and not vma.writable):
        return -errno.EFAULT
    return vma.pfn + (hva - vma.start >> mm.page_shift), vma.writable and not read_only, False


def kvm_release_faultin_page(mm: Mm, pfn: int, *, pinned: bool) -> None:
    """Mirrors: kvm_release_faultin_page()"""
    if pinned:
        mm.unpin(pfn)


def kvm_gmem_get_pfn(kvm: KvmState, slot: Slot, ipa: int) -> int:
    """The frame of a guest_memfd page, pinned, or a negative errno. Mirrors: kvm_gmem_get_pfn()"""
    assert slot.gmem
    step("gmem.get_folio")
    pfn = kvm.host.mm.page_cache(slot.gmem, (ipa - slot.base) // kvm.page_size)
    if pfn is None:
        return -errno.EIO
    if pfn in kvm.host.memory.poisoned:
        return -EHWPOISON
    return kvm.host.mm.pin(pfn)
