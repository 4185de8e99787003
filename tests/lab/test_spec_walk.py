# SPDX-License-Identifier: Apache-2.0
"""The spec shows what the lab's kernel shows: walks and listed observations, in one boot."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from prefault.lab.job import Job, run_job
from prefault.lab.machine import MachineOptions
from prefault.scenarios.walk import walk
from prefault.scenarios.walk_result import WalkConfig, WalkRun
from prefault.spec import open_spec
from tests.spec import listed

pytestmark = pytest.mark.lab

MIB = 1 << 20
BACKINGS = ("private", "shared", "thp", "hugetlb", "file-private", "file-shared", "guest-memfd")
CONFIGS: list[Mapping[str, object]] = [
    *[{"size": 4 * MIB, "backing": backing, "resident": "nothing"} for backing in BACKINGS],
    *[{"size": 4 * MIB, "backing": backing, "resident": "write"} for backing in ("private", "thp", "shared")],
    {"size": 4 * MIB, "resident": "read", "when": "while-running", "prefault_permille": 750},
    {"size": 4 * MIB, "vcpus": 2},
    {"size": 4 * MIB, "nested": True},
    {"size": 4 * MIB, "nested": True, "resident": "nothing", "when": "while-running", "backing": "thp"},
    {"size": 4 * MIB, "nested": True, "resident": "nothing", "when": "while-running", "backing": "shared"},
]


@pytest.fixture(scope="module")
def real() -> list[object]:
    """One line of JSON for the listed observations, one for each walk."""
    files = {"/listed.py": Path(listed.__file__).read_bytes()}
    commands = ["python3 /listed.py"]
    for config in CONFIGS:
        commands.append(f"python3 -m prefault.scenarios.walk --json {shlex.quote(json.dumps(config))}")
    # On two CPUs, vCPUs that make one table at the same moment fault again, all but one of them.
    machine = MachineOptions(cpus=1)
    result = run_job(Job(argv=("sh", "-ec", "; ".join(commands)), files=files, timeout=600), machine)
    assert result.status == 0, result.stderr.decode()
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("name", list(listed.LISTED))
def test_listed_observations_are_equal(real: list[object], name: str) -> None:
    found = real[0]
    assert isinstance(found, dict)
    with open_spec() as kvm:
        assert found[name] == listed.observe(kvm)[name]


def seen(run: WalkRun) -> dict[str, object]:
    """What does not depend on time."""
    found = run.to_json()
    phases = [(one.name, one.exits, one.faults) for one in run.phases]
    return {"leaves": found["leaves"], "shadow": found["shadow_leaves"], "phases": phases}


@pytest.mark.parametrize("number", range(len(CONFIGS)), ids=[json.dumps(config) for config in CONFIGS])
def test_walks_are_equal(real: list[object], number: int) -> None:
    found = real[1 + number]
    assert isinstance(found, dict)
    assert "error" not in found
    with open_spec() as kvm:
        result = walk(kvm, WalkConfig.from_json(dict(CONFIGS[number])))
    for name, mine in (("without", result.without), ("with_prefault", result.with_prefault)):
        assert seen(WalkRun.from_json(found[name])) == seen(mine)
