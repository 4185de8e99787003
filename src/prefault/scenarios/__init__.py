# SPDX-License-Identifier: Apache-2.0
"""What must hold, as short programs over machine.py. Importing this lists all of them."""

from prefault.scenarios import (
    lasting,
    memory,
    nested,
    ordinary,
    races,
    refusals,
    reset,
    shapes,
    tlbi,
    userfault,
)
from prefault.scenarios.scenario import SCENARIOS, Outcome, Scenario, Stage, perform

__all__ = [
    "SCENARIOS",
    "Outcome",
    "Scenario",
    "Stage",
    "lasting",
    "memory",
    "nested",
    "ordinary",
    "perform",
    "races",
    "refusals",
    "reset",
    "shapes",
    "tlbi",
    "userfault",
]
