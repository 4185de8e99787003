# SPDX-License-Identifier: Apache-2.0
"""Where the ioctl of another architecture is known to answer otherwise than ours, and why ours does not.

Each entry says which scenarios show it, and what they say then: any other difference is news. What is known
was seen on Debian's kernel, as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefault.conform.compare import Comparison, Verdict
from prefault.conform.suite import matches


@dataclass(frozen=True)
class Known:
    """A difference.

    :ivar scenarios: patterns, as `prefault conform` takes them
    :ivar said: what the scenario says on the peer, or a part of it
    :ivar peer: what the peer does
    :ivar reason: why ours does not
    :ivar hangs: the scenario may not come to an end there; who comes first is chance
    """

    scenarios: tuple[str, ...]
    said: str
    peer: str
    reason: str
    hangs: bool = False

    def explains(self, one: Comparison) -> bool:
        """Whether this is what a comparison shows: in the scenario's last step, and not before."""
        named = any(matches(one.name, pattern) for pattern in self.scenarios)
        last = one.difference is None or one.difference.index == len(one.kernel.observations) - 1
        return named and last and self.said in one.kernel.text


X86_64 = (
    Known(
        (
            "prefaulting_makes_nothing_dirty",
            "prefaulting_puts_nothing_into_a_dirty_ring",
            "logging_that_starts_while_a_prefault_waits_sees_every_write",
            "what_the_handler_serves_to_a_logged_slot_is_mapped_read_only",
            "what_the_handler_serves_is_in_a_dirty_ring_once_it_is_written",
        ),
        "pre-faulting made pages dirty",
        "with dirty logging on, every page that is pre-faulted becomes dirty and writable",
        "M7: a migration would send all of them again, though nobody has written to one",
    ),
    Known(
        ("poisoned_page_is_ehwpoison_without_a_signal", "a_page_that_the_handler_has_lost_is_ehwpoison"),
        "errno=4)",
        "a poisoned page sends SIGBUS to the VMM, and the call ends with EINTR",
        "M10: who asks ahead of the guest gets an error that it can act on, EHWPOISON, and no signal",
    ),
    Known(
        ("pending_device_read_survives_a_failed_prefault",),
        "the read did not deliver",
        "a pre-fault that fails writes its memory fault over the value of a read that waits in kvm_run",
        "M3: pre-faulting leaves no trace in the vCPU",
    ),
    Known(
        ("slots_can_move_meanwhile", "slots_can_come_and_go_meanwhile"),
        "not done after",
        "a pre-fault can stay in the kernel until a signal comes while a memslot is moved or deleted: it "
        "tries again and again, each time in vain (is_page_fault_stale), and who changes the slot waits for "
        "it (__synchronize_srcu)",
        "M10, M12: EAGAIN, and no wait that can deadlock with the change",
        hangs=True,
    ),
)
"""Seen on Linux 7.3.4, SVM with nested paging."""

KNOWN = {"x86_64": X86_64}
"""By architecture of the lab's machine."""


def in_order(arch: str, names: Sequence[str]) -> tuple[str, ...]:
    """Names of scenarios, those that may not come to an end there last: what follows one is not played."""
    hanging = [pattern for entry in KNOWN.get(arch, ()) if entry.hangs for pattern in entry.scenarios]
    return tuple(sorted(names, key=lambda name: any(matches(name, pattern) for pattern in hanging)))


def known(arch: str, one: Comparison) -> Known | None:
    """The entry that a comparison shows, if it shows a difference, told to be known or not yet."""
    if one.verdict not in (Verdict.DIFFERENT, Verdict.LOST, Verdict.KNOWN):
        return None
    return next((entry for entry in KNOWN.get(arch, ()) if entry.explains(one)), None)


def gone(arch: str, comparisons: Sequence[Comparison]) -> list[Known]:
    """Entries whose scenarios were all played and show nothing of it, not by chance: the peer has changed."""
    found = []
    for entry in (one for one in KNOWN.get(arch, ()) if not one.hangs):
        about = [one for one in comparisons if any(matches(one.name, name) for name in entry.scenarios)]
        if about and all(one.verdict is Verdict.EQUAL for one in about):
            found.append(entry)
    return found
