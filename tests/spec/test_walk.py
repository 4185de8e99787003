# SPDX-License-Identifier: Apache-2.0
"""Walks on the spec equal walks.json, which was recorded on Linux 7.3.4 with the series, in the lab.

A phase is [read, write, execute, permission, mmio, exits].
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from prefault.scenarios.walk import walk
from prefault.scenarios.walk_result import Phase, WalkConfig, WalkRun
from prefault.spec import open_spec

RECORDED = json.loads((Path(__file__).parent / "walks.json").read_text())


def phase(one: Phase) -> list[int]:
    counts = dataclasses.asdict(one.faults)
    return [*(counts[kind] for kind in ("read", "write", "execute", "permission", "mmio")), one.exits]


def brief(run: WalkRun) -> dict[str, object]:
    return {"phases": [phase(one) for one in run.phases], "leaves": run.leaves, "shadow": run.shadow_leaves}


@pytest.mark.parametrize("recorded", RECORDED, ids=[json.dumps(one["config"]) for one in RECORDED])
def test_a_walk_is_what_the_kernel_made_of_it(recorded: dict[str, dict[str, object]]) -> None:
    with open_spec() as kvm:
        result = walk(kvm, WalkConfig.from_json(recorded["config"]))
    assert brief(result.without) == recorded["without"]
    assert brief(result.with_prefault) == recorded["with"]
