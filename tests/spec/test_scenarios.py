# SPDX-License-Identifier: Apache-2.0
"""Every listed scenario holds on the spec, with every page size, and leaves its tables sound."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from prefault.guest.program import Write
from prefault.machine import Backing, MemoryRegion, SlotFlags
from prefault.scenarios import SCENARIOS, perform
from prefault.scenarios.program import PAGE, Age, Guest, PreFault, SetRegion, VmmProgram, scenario
from prefault.scenarios.scenario import DATA
from prefault.spec import HostConfig, open_spec

HOSTS = {
    "4K": HostConfig(),
    "16K": HostConfig(page_size=0x4000, hugetlb=(32 << 20, 2 << 20, 1 << 30)),
    "64K": HostConfig(page_size=0x1_0000, hugetlb=(512 << 20, 2 << 20)),
}


LARGE = {
    "4K": HostConfig(ipa_limit=52, lpa2=True),
    "16K": HostConfig(page_size=0x4000, ipa_limit=52, lpa2=True),
    "64K": HostConfig(page_size=0x1_0000, ipa_limit=52),
}
"""Hosts with 52-bit addresses, of which most scenarios take no notice."""
TAGS = {name: replace(host, mte=True) for name, host in HOSTS.items()}
WITHOUT_FWB = {name: replace(host, fwb=False) for name, host in HOSTS.items()}
NOT_HERE = re.compile("no [a-z-]+ of a bearable size|IPA spaces have up to 48 bits|cannot have memory tags")


def _plays(name: str, host: HostConfig) -> None:
    with open_spec(host) as kvm:
        outcome = perform(kvm, SCENARIOS[name])
    if outcome.outcome == "skipped" and NOT_HERE.search(outcome.text):
        pytest.skip(outcome.text)
    assert outcome.outcome == "passed", outcome.text
    assert not kvm.host.memory.tables
    assert not kvm.host.mm.pins


@pytest.mark.parametrize("pages", list(HOSTS))
@pytest.mark.parametrize("name", list(SCENARIOS))
def test_a_listed_scenario_holds(name: str, pages: str) -> None:
    _plays(name, HOSTS[pages])


@pytest.mark.parametrize("pages", list(LARGE))
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("the_top_of_the_ipa_space")])
def test_a_listed_scenario_holds_with_large_addresses(name: str, pages: str) -> None:
    _plays(name, LARGE[pages])


@pytest.mark.parametrize("pages", list(TAGS))
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("guests_with_tags")])
def test_a_listed_scenario_holds_with_memory_tags(name: str, pages: str) -> None:
    _plays(name, TAGS[pages])


@pytest.mark.parametrize("pages", list(WITHOUT_FWB))
@pytest.mark.parametrize("name", [name for name in SCENARIOS if "reset" in name])
def test_a_listed_scenario_holds_without_fwb(name: str, pages: str) -> None:
    _plays(name, WITHOUT_FWB[pages])


@pytest.mark.parametrize("fwb", [True, False])
def test_a_reset_takes_memory_that_was_prefaulted_where_caches_must_be_cleaned(fwb: bool) -> None:
    with open_spec(HostConfig(fwb=fwb)) as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(MemoryRegion(1, DATA, PAGE))
        vcpu, never_ran = vm.create_vcpu(), vm.create_vcpu()
        vcpu.run(immediate_exit=True)
        vcpu.pre_fault_memory(DATA, PAGE)
        never_ran.reset()
        assert len(vm.stage2()) == 1
        vcpu.reset()
        assert len(vm.stage2()) == fwb


@pytest.mark.parametrize(("hafdbs", "faults"), [(True, 1), (False, 2)])
def test_a_write_to_an_old_read_only_leaf_faults_once_or_twice(hafdbs: bool, faults: int) -> None:
    region = MemoryRegion(1, DATA, PAGE, Backing.SHARED, flags=SlotFlags.LOG_DIRTY_PAGES)
    actions = (SetRegion(region), PreFault(DATA, PAGE), Age(DATA, PAGE), Guest((Write(DATA, 1),)))
    with open_spec(HostConfig(hafdbs=hafdbs)) as kvm:
        outcome = perform(kvm, scenario("old and read-only", VmmProgram(actions)))
    seen = outcome.observations[-1][1]
    assert isinstance(seen, dict)
    assert (seen["faults"]["write"], seen["faults"]["permission"]) == (faults, 1)


@pytest.mark.parametrize("extends", [True, False])
def test_a_device_read_has_its_sign_only_where_kvm_extends_it(extends: bool) -> None:
    with open_spec(HostConfig(mmio_sign_extends=extends)) as kvm:
        outcome = perform(kvm, SCENARIOS["pending_device_read_survives[2-True-64]"])
    assert outcome.outcome == "passed", outcome.text
    expected = 0xFFFF_FFFF_FFFF_9788 if extends else 0x9788
    assert outcome.observations[-1][1] == [{"kind": "Reported", "value": expected}, {"kind": "Done"}]
