# SPDX-License-Identifier: Apache-2.0
"""``python3 -m prefault.bench.once CASE CALL SPIN``: one call that is watched from outside.

Prints the kernel's symbols, then READY, and keeps busy in user space while whoever watches gets ready; then
makes the call, and keeps busy until it is ended from outside. SPIN is how many instructions come before the
call.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from prefault.bench.cases import Case
from prefault.bench.measure import Machine
from prefault.errors import UsageError
from prefault.kvm import open_kvm

READY = "ready"
CALLS = ("demand", "prefault", "again")
_FOREVER_NS = 1 << 60


def _spin(ns: int) -> None:
    """Do nothing that the kernel would notice."""
    until = time.monotonic_ns() + ns
    while time.monotonic_ns() < until:
        pass


def main() -> int:
    """Do as the arguments say."""
    case, call = Case.from_json(json.loads(sys.argv[1])), sys.argv[2]
    if call not in CALLS:
        raise UsageError(f"no call {call!r}: use one of {', '.join(CALLS)}")
    symbols = Path("/proc/kallsyms").read_text().splitlines()
    print("\n".join(line for line in symbols if line.split()[1] in "tTwW"))
    with open_kvm() as kvm, Machine(kvm, case) as machine:
        if call == "again":
            machine.pre_fault()
        if call == "demand":
            machine.to_walk()
        print(READY, flush=True)
        _spin(int(sys.argv[3]))
        if call == "demand":
            machine.walk()
        else:
            machine.pre_fault()
        _spin(_FOREVER_NS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
