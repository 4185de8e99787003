# SPDX-License-Identifier: Apache-2.0
"""Every listed scenario holds on the spec, with every page size, and leaves its tables sound."""

from __future__ import annotations

import pytest

from prefault.scenarios import SCENARIOS, perform
from prefault.spec import HostConfig, open_spec

HOSTS = {
    "4K": HostConfig(),
    "16K": HostConfig(page_size=0x4000, hugetlb=(32 << 20,)),
    "64K": HostConfig(page_size=0x1_0000, hugetlb=(512 << 20, 2 << 20)),
}


@pytest.mark.parametrize("pages", list(HOSTS))
@pytest.mark.parametrize("name", list(SCENARIOS))
def test_a_listed_scenario_holds(name: str, pages: str) -> None:
    with open_spec(HOSTS[pages]) as kvm:
        outcome = perform(kvm, SCENARIOS[name])
    assert outcome.outcome == "passed", outcome.text
    assert not kvm.host.memory.tables
    assert not kvm.host.mm.pins
