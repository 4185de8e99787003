# SPDX-License-Identifier: Apache-2.0
"""The races that are explored, and the bugs that they must find when those are switched on."""

from __future__ import annotations

from collections.abc import Callable

from prefault.machine import Backing, Resident, SlotFlags
from prefault.spec.state import Faults
from prefault.spec.world import Race, RaceWorld

_LOG, _READONLY = SlotFlags.LOG_DIRTY_PAGES, SlotFlags.READONLY
_NOTHING, _READ = Resident.NOTHING, Resident.READ

RACES: dict[str, Race] = {
    "prefault-madvise": Race("MADV_DONTNEED takes the page", ("pre_fault", "madvise")),
    "prefault-mprotect": Race("mprotect(PROT_READ)", ("pre_fault", "mprotect")),
    "prefault-fork": Race("the VMM forks", ("pre_fault", "fork")),
    "prefault-cow": Race("the VMM writes, which breaks CoW", ("pre_fault", "host_write"), _READ),
    "prefault-ksm": Race("KSM merges two pages", ("pre_fault", "ksm"), pages=2),
    "prefault-age": Race("the host clears the access flag", ("pre_fault", "age")),
    "prefault-delete": Race("the memslot is deleted", ("pre_fault", "delete")),
    "prefault-move": Race("the memslot is moved", ("pre_fault", "move")),
    "prefault-start-log": Race("dirty logging is switched on", ("pre_fault", "start_log")),
    "prefault-stop-log": Race("dirty logging is switched off", ("pre_fault", "stop_log"), flags=_LOG),
    "prefault-get-log": Race("the dirty log is taken", ("pre_fault", "get_log"), flags=_LOG),
    "prefault-readonly": Race("a read-only memslot", ("pre_fault", "madvise"), flags=_READONLY),
    "prefault-prefault": Race("two vCPUs pre-fault one page", ("pre_fault", "pre_fault_again")),
    "prefault-read": Race("a guest reads the page", ("pre_fault", "guest_read"), _NOTHING),
    "prefault-write": Race("a guest writes to the page", ("pre_fault", "guest_write"), _NOTHING),
    "prefault-read-log": Race(
        "a guest reads a page of a logged memslot", ("pre_fault", "guest_read"), flags=_LOG
    ),
    "write-cow": Race("a guest and the VMM write, which breaks CoW", ("guest_write", "host_write"), _READ),
    "write-ksm": Race("a guest writes while KSM merges the page", ("guest_write", "ksm"), pages=2),
    "prefault-write-fork": Race("a guest writes while the VMM forks", ("pre_fault", "guest_write", "fork")),
    "prefault-write-madvise": Race(
        "a guest writes while the page is taken", ("pre_fault", "guest_write", "madvise"), _READ
    ),
    "prefault-write-start-log": Race(
        "a guest writes while logging is switched on", ("pre_fault", "guest_write", "start_log")
    ),
    "prefault-write-get-log": Race(
        "a guest writes while the log is taken", ("pre_fault", "guest_write", "get_log"), flags=_LOG
    ),
    "prefault-prefault-madvise": Race(
        "two vCPUs pre-fault while the page is taken", ("pre_fault", "pre_fault_again", "madvise")
    ),
    "prefault-delete-madvise": Race(
        "the memslot is deleted while its page is taken", ("pre_fault", "delete", "madvise")
    ),
    "prefault-thp-madvise": Race(
        "a page is taken out of a THP", ("pre_fault", "madvise"), backing=Backing.THP, pages=512
    ),
    "prefault-thp-fork": Race("the VMM forks", ("pre_fault", "fork"), backing=Backing.THP, pages=512),
    "prefault-userfault": Race("a userfaultfd handler has the page", ("pre_fault", "handler"), _NOTHING),
    "prefault-read-userfault": Race(
        "a guest and a pre-fault wait for one page", ("pre_fault", "guest_read", "handler"), _NOTHING
    ),
    "prefault-userfault-madvise": Race(
        "the page is taken again", ("pre_fault", "handler", "madvise"), _NOTHING
    ),
    "prefault-two-pages": Race("the first of two pages is taken", ("pre_fault_slot", "madvise"), pages=2),
    "prefault-in-l2-madvise": Race(
        "on a vCPU in L2, while the page is taken", ("pre_fault_in_l2", "madvise")
    ),
    "prefault-in-l2-tlbi": Race("on a vCPU in L2, while L1 drops its TLB", ("pre_fault_in_l2", "tlbi")),
    "prefault-in-l2-remap": Race(
        "on a vCPU in L2, while L1 gives its L2 another page", ("pre_fault_in_l2", "remap"), pages=2
    ),
    "l2-write-start-log": Race("an L2 writes while logging is switched on", ("l2_write", "start_log")),
    "l2-write-get-log": Race("an L2 writes while the log is taken", ("l2_write", "get_log"), flags=_LOG),
    "prefault-in-l2-move": Race("on a vCPU in L2, while the memslot is moved", ("pre_fault_in_l2", "move")),
    "prefault-l2-tlbi": Race(
        "an L2 reads while L1 drops its TLB", ("pre_fault", "l2_read", "tlbi"), _NOTHING
    ),
    "prefault-l2-madvise": Race("an L2 reads while the page is taken", ("pre_fault", "l2_read", "madvise")),
    "l2-remap": Race(
        "an L2 reads while L1 gives it another page",
        ("l2_read", "remap"),
        pages=2,
        known="an L2's fault that has walked L1's table is not tried again after L1's TLB invalidation, "
        "neither here nor in Linux 7.3 (handle_vmalls12e1is(), kvm_handle_guest_abort())",
    ),
}
"""By name: who races with the pre-fault, small ones first."""


def world(name: str, faults: Faults) -> Callable[[], RaceWorld]:
    """Makes the world of a race, as often as it is called."""
    race = RACES[name]
    return lambda: RaceWorld(race, faults)


FAULTS: dict[str, str] = {
    "no_sequence_check": "prefault-madvise",
    "sequence_after_pin": "prefault-madvise",
    "no_sequence_bump": "prefault-madvise",
    "lock_dropped": "prefault-madvise",
    "no_mmu_lock": "prefault-madvise",
    "no_srcu_wait": "prefault-delete",
    "wait_under_srcu": "prefault-delete",
    "invalid_slot_used": "prefault-delete",
    "slots_during_invalidation": "prefault-delete-madvise",
    "log_without_protecting": "prefault-start-log",
    "log_ignored": "prefault-get-log",
    "dirty_marked": "prefault-get-log",
    "write_fault": "prefault-read",
    "readonly_ignored": "prefault-readonly",
    "page_leaked": "prefault-madvise",
    "wrong_mmu": "prefault-in-l2-tlbi",
    "past_range": "prefault-thp-madvise",
    "mapped_again": "prefault-prefault",
    "shadow_kept": "prefault-in-l2-madvise",
    "tlb_kept": "prefault-write-madvise",
}
"""Field of ``Faults`` → the first race that finds it."""
