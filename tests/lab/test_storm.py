# SPDX-License-Identifier: Apache-2.0
"""No stale mapping survives an invalidation that races with a pre-fault (M12)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefault.lab.job import Job, run_job
from prefault.lab.machine import MachineOptions

SCRIPT = Path(__file__).parent / "inside/storm.py"

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


def test_guest_and_host_agree_after_every_storm_of_madvise() -> None:
    # With the check for an invalidation taken out of the kernel, half of all rounds differ.
    job = Job(("python3", "/storm.py", "40", "0.3"), {"/storm.py": SCRIPT.read_bytes()}, timeout=240)
    result = run_job(job, MachineOptions())
    assert result.status == 0, result.stderr.decode()
    outcome = json.loads(result.stdout)
    assert outcome["differing"] == [], outcome
    assert outcome["pre-faults"] > 400, f"too few to mean anything: {outcome}"
    assert outcome["advice"] > 400, f"too few to mean anything: {outcome}"
