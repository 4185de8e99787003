# SPDX-License-Identifier: Apache-2.0
"""Runs a module of checks inside the lab, in one boot."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from prefault.lab.job import Job, run_job
from prefault.lab.machine import MachineOptions

ROOT = Path(__file__).parents[2]
PACKAGE = "tests.lab.inside"
RUN = b"import runpy, sys\nrunpy.run_module(sys.argv[1], run_name='__main__')\n"

Outcomes = dict[str, tuple[str, str]]


def names(module: str) -> list[str]:
    """The checks of a module."""
    return list(importlib.import_module(f"{PACKAGE}.{module}").checks.by_name)


def _files() -> dict[str, bytes]:
    """The package, with its parents' markers, where Python finds it inside the lab."""
    folder = ROOT / PACKAGE.replace(".", "/")
    files = [*folder.glob("*.py"), ROOT / "tests/__init__.py", ROOT / "tests/lab/__init__.py"]
    return {f"/checks/{file.relative_to(ROOT)}": file.read_bytes() for file in files}


def outcomes(module: str, options: MachineOptions, files: Mapping[str, bytes] | None = None) -> Outcomes:
    """What the checks of a module said, each by name: (outcome, text)."""
    job = Job(
        ("python3", "/checks/run.py", f"{PACKAGE}.{module}"),
        {**_files(), "/checks/run.py": RUN, **(files or {})},
        timeout=500,
    )
    result = run_job(job, options)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    found = {str(line["name"]): (str(line["outcome"]), str(line["text"])) for line in lines}
    assert found, f"{module} reported nothing: {result.stderr.decode()}"
    return found


def judge(found: Outcomes, name: str) -> None:
    """Let a test end as a check did."""
    outcome, text = found.get(name, ("failed", "it was not reported: the run ended before"))
    if outcome == "skipped":
        pytest.skip(text)
    assert outcome == "passed", text
