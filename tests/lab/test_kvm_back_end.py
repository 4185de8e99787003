# SPDX-License-Identifier: Apache-2.0
"""Runs the checks of tests/lab/inside, a module to a boot, and shows each one as a test."""

from __future__ import annotations

import functools

import pytest

from prefault.lab.machine import MachineOptions
from tests.lab.inside_job import Outcomes, judge, names, outcomes

MODULES = {
    "checks_kvm": "nested",
    "checks_nested": "nested",
    "checks_prefault": "nested",
    "checks_walk": "nested",
    "checks_pkvm": "protected",
}
"""And KVM's mode that each is about."""
HUGE_PAGES = ("hugepagesz=32M", "hugepages=2", "hugepagesz=1G", "hugepages=1")

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]


@functools.cache
def _outcomes(module: str) -> Outcomes:
    return outcomes(module, MachineOptions(memory_mib=3072, mode=MODULES[module], append=HUGE_PAGES))


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in MODULES for name in names(module)])
def test_inside(module: str, name: str) -> None:
    judge(_outcomes(module), name)
