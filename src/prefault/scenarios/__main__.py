# SPDX-License-Identifier: Apache-2.0
"""``python3 -m prefault.scenarios [NAME…]``: play scenarios on this host's KVM, a JSON line for each."""

from __future__ import annotations

import dataclasses
import json
import sys

from prefault.kvm import open_kvm
from prefault.scenarios import SCENARIOS, perform


def main() -> int:
    """Play the named scenarios, or all; 1 if one failed."""
    names = sys.argv[1:] or list(SCENARIOS)
    failed = 0
    with open_kvm() as kvm:
        for name in names:
            outcome = perform(kvm, SCENARIOS[name])
            failed += outcome.outcome == "failed"
            print(json.dumps(dataclasses.asdict(outcome)), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
