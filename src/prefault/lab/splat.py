# SPDX-License-Identifier: Apache-2.0
"""Finding in a kernel log what must never be there: WARN, BUG, oops, sanitizer reports, stalls."""

from __future__ import annotations

import re

_SIGNS = (
    r"WARNING: ",
    r"\bBUG: ",
    r"\bBUG at ",
    r"kernel BUG at ",
    r"KASAN: ",
    r"KCSAN: ",
    r"UBSAN: ",
    r"KMSAN: ",
    r"KFENCE: ",
    r"possible circular locking dependency detected",
    r"possible recursive locking detected",
    r"inconsistent lock state",
    r"possible irq lock inversion dependency detected",
    r"suspicious RCU usage",
    r"bad unlock balance detected",
    r"held lock freed",
    r"rcu: INFO: rcu_\w+ (?:self-)?detected (?:expedited )?stalls?",
    r"blocked for more than \d+ seconds",
    r"soft lockup",
    r"hard LOCKUP",
    r"Unable to handle kernel ",
    r"Internal error: ",
    r"\bOops\b",
    r"Kernel panic - not syncing",
    r"scheduling while atomic",
    r"sleeping function called from invalid context",
    r"bad: scheduling from the idle thread",
    r"list_(?:add|del) corruption",
    r"refcount_t: ",
    r"Bad page state in process",
    r"Call trace:",
    r"nVHE hyp (?:panic|BUG)",
    r"hyp panic",
)
_SPLAT = re.compile("|".join(_SIGNS))
_STAMP = re.compile(r"^(?:<\d+>)?\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ?")


def find(log: str) -> tuple[str, ...]:
    """Lines of a kernel log, stamps taken off, that only a misbehaving kernel writes."""
    lines = (_STAMP.sub("", line) for line in log.splitlines())
    return tuple(line for line in lines if _SPLAT.search(line))
