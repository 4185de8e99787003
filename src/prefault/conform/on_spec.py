# SPDX-License-Identifier: Apache-2.0
"""The side of the specification: a host like the one that the kernel has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping

from prefault.conform.suite import Play, Suite
from prefault.guest.tables import leaf_size
from prefault.scenarios import perform
from prefault.spec import HostConfig, open_spec

_LPA = 48
"""Bits of an address that need neither LPA2 nor pages of 64 KiB."""


def host_config(facts: Mapping[str, object]) -> HostConfig:
    """The host that ``prefault.kvm.probe`` found, for the specification.

    That it has FWB is taken for granted: nothing that is compared depends on it.
    """
    page_size, ipa_limit = _number(facts["page_size"]), _number(facts["ipa_limit"])
    dic = bool(facts["executable_at_once"])
    if not facts.get("guests", True):
        ipa_limit, dic = (
            _LPA,
            True,
        )  # another architecture's host, which has no such things: as ours usually is
    kinds, hugetlb = facts["vm_kinds"], facts["hugetlb"]
    assert isinstance(kinds, list)
    assert isinstance(hugetlb, dict)
    protected = any(kind["name"] == "protected" and kind["creatable"] for kind in kinds)
    default = leaf_size(page_size, 2)
    sizes = sorted((int(size) for size in hugetlb), key=lambda size: size != default)
    return HostConfig(
        page_size=page_size,
        ipa_limit=ipa_limit,
        lpa2=ipa_limit > _LPA and page_size != 0x1_0000,
        dic=dic,
        nested=bool(facts["nested"]),
        protected=protected,
        pkvm_pre_faults=protected and can_pre_fault(facts),
        mmio_sign_extends=bool(facts["mmio_sign_extends"]),
        hafdbs=bool(facts["access_flag_by_hardware"]),
        hugetlb=tuple(sizes),
    )


def can_pre_fault(facts: Mapping[str, object]) -> bool:
    """Whether the kernel claims to pre-fault any VM."""
    kinds = facts["vm_kinds"]
    assert isinstance(kinds, list)
    return bool(facts["pre_fault_memory"]) or any(kind.get("pre_fault_memory") for kind in kinds)


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value


def play(
    suite: Suite, config: HostConfig, done: Callable[[str], None] = lambda name: None
) -> dict[str, Play]:
    """Play all of a suite; ``done`` is told each name."""
    plays = {}
    for one in suite.scenarios():
        # Each on a host of its own, so that one that fails leaves nothing to the next.
        with open_spec(config) as kvm:
            outcome = perform(kvm, one)
        plays[one.name] = Play.from_json(json.loads(json.dumps(dataclasses.asdict(outcome))))
        done(one.name)
    return plays
