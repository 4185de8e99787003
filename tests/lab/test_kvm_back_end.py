# SPDX-License-Identifier: Apache-2.0
"""Runs the checks of tests/lab/inside, a module to a boot, and shows each one as a test."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from prefault.lab.machine import MachineOptions
from tests.lab.inside_job import Outcomes, judge, names, outcomes

HUGE_PAGES = ("hugepagesz=32M", "hugepages=2", "hugepagesz=1G", "hugepages=1")
_NESTED = MachineOptions(memory_mib=3072, mode="nested", append=HUGE_PAGES)
MODULES = {
    "checks_kvm": _NESTED,
    "checks_nested": _NESTED,
    "checks_prefault": _NESTED,
    "checks_walk": _NESTED,
    "checks_mte": MachineOptions(memory_mib=1024, mode="nested", mte=True),
    "checks_pkvm": dataclasses.replace(_NESTED, mode="protected"),
}
"""And the machine that each is about."""

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]


@functools.cache
def _outcomes(module: str) -> Outcomes:
    return outcomes(module, MODULES[module])


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in MODULES for name in names(module)])
def test_inside(module: str, name: str) -> None:
    judge(_outcomes(module), name)
