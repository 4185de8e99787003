# SPDX-License-Identifier: Apache-2.0
"""What is known of a call whose every instruction was seen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

MMU_LOCK = "hold of the mmu_lock"
INTERRUPTS = "stretch with interrupts off"
SPINNING = "stretch that cannot be preempted for a lock"
LONGEST = (MMU_LOCK, INTERRUPTS, SPINNING)


@dataclass(frozen=True)
class Profile:
    """What a call took.

    :ivar counts: instructions by function
    :ivar longest: the longest stretches, by what they are: LONGEST
    """

    counts: Counter[str] = field(default_factory=Counter)
    longest: Counter[str] = field(default_factory=Counter)
