# SPDX-License-Identifier: Apache-2.0
"""Runs the checks of tests/lab/inside, a module to a boot, and shows each one as a test."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path

import pytest

from prefault.lab.job import Job, run_job
from prefault.lab.machine import MachineOptions

ROOT = Path(__file__).parents[2]
PACKAGE = "tests.lab.inside"
MODULES = ("checks_kvm", "checks_nested", "checks_prefault", "checks_walk")
RUN = b"import runpy, sys\nrunpy.run_module(sys.argv[1], run_name='__main__')\n"
HUGE_PAGES = ("hugepagesz=32M", "hugepages=2", "hugepagesz=1G", "hugepages=1")

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]


def _names() -> list[tuple[str, str]]:
    modules = {name: importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES}
    return [(name, check) for name, module in modules.items() for check in module.checks.by_name]


def _files() -> dict[str, bytes]:
    """The package, with its parents' markers, where Python finds it inside the lab."""
    folder = ROOT / PACKAGE.replace(".", "/")
    files = [*folder.glob("*.py"), ROOT / "tests/__init__.py", ROOT / "tests/lab/__init__.py"]
    return {f"/checks/{file.relative_to(ROOT)}": file.read_bytes() for file in files}


@functools.cache
def _outcomes(module: str) -> dict[str, tuple[str, str]]:
    """What the checks of a module said, each by name: (outcome, text)."""
    job = Job(
        ("python3", "/checks/run.py", f"{PACKAGE}.{module}"),
        {**_files(), "/checks/run.py": RUN},
        timeout=300,
    )
    result = run_job(job, MachineOptions(memory_mib=3072, append=HUGE_PAGES))
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    found = {str(line["name"]): (str(line["outcome"]), str(line["text"])) for line in lines}
    assert found, f"{module} reported nothing: {result.stderr.decode()}"
    return found


@pytest.mark.parametrize(("module", "name"), _names())
def test_inside(module: str, name: str) -> None:
    outcome, text = _outcomes(module).get(name, ("failed", "it was not reported: the run ended before"))
    if outcome == "skipped":
        pytest.skip(text)
    assert outcome == "passed", text
