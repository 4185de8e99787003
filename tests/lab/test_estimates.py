# SPDX-License-Identifier: Apache-2.0
"""The figures that estimates are made of are those of this kernel."""

from __future__ import annotations

import json

import pytest

from prefault.lab.job import Job, run_job
from prefault.lab.machine import MachineOptions
from prefault.machine import Backing, Resident
from prefault.report.estimate import estimate, load_figures
from prefault.scenarios.walk import walk
from prefault.scenarios.walk_result import WalkConfig, WalkResult
from prefault.spec import open_spec

pytestmark = pytest.mark.lab

WALKS = (
    WalkConfig(size=8 << 20, prefault_permille=500),
    WalkConfig(size=8 << 20, resident=Resident.NOTHING, prefault_permille=500),
    WalkConfig(size=8 << 20, resident=Resident.READ, write_permille=250),
    WalkConfig(size=8 << 20, backing=Backing.SHARED, resident=Resident.NOTHING, write_permille=0),
    WalkConfig(size=16 << 20, backing=Backing.THP),
    WalkConfig(size=4 << 20, nested=True, prefault_permille=500),
)
NEAR = 0.15
"""Parts of a whole by which an estimate may be off: the mixtures are not what was measured."""


@pytest.mark.timeout(600)
def test_what_the_spec_estimates_is_near_what_the_lab_counts() -> None:
    argv = ("python3", "-m", "prefault.scenarios.walk", "--json")
    job = Job((*argv, *(json.dumps(one.to_json()) for one in WALKS)), timeout=400)
    done = run_job(job, MachineOptions(icount=True))
    for config, line in zip(WALKS, done.stdout.splitlines(), strict=True):
        real = WalkResult.from_json(json.loads(line))
        with open_spec() as kvm:
            spec = walk(kvm, config)
        assert spec.without.faults == real.without.faults
        assert spec.with_prefault.faults == real.with_prefault.faults
        found = estimate(spec, load_figures())
        for ours, theirs in (
            (found.without.walk_ns, real.without.walk_ns),
            (found.with_prefault.walk_ns, real.with_prefault.walk_ns),
            (found.with_prefault.prefault_ns, real.with_prefault.prefault_ns),
        ):
            assert ours == pytest.approx(theirs, rel=NEAR), config
