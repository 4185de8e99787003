# SPDX-License-Identifier: Apache-2.0
"""What is read of a snapshot before there is a VM, and what is refused then."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from prefault.abi.arm64 import COUNTERS
from prefault.errors import BadSnapshot, UsageError
from prefault.kvm.vm import host_page_size
from prefault.machine import Backing
from prefault.vmm import saved
from prefault.vmm.saved import Saved
from prefault.vmm.snapshot import Snapshot

from .samples import PC, SAVED, VCPU, changed_states, whole_state, with_empty_memory, with_state, written


def changed_vcpu(**changes: object) -> dict[str, object]:
    return {**VCPU.to_json(), **changes}


OTHER_PAGES = 16384 if host_page_size() != 16384 else 4096


@pytest.fixture(scope="module")
def empty_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_empty_memory(tmp_path_factory.mktemp("snapshots") / "warm")


def read(folder: Path, changes: dict[str, object] | None = None) -> Saved:
    source = Snapshot(folder)
    try:
        found = Saved.from_snapshot(source, changes)
        saved.check_host(source, found)
        return found
    finally:
        source.close()


def test_a_machine_is_read_as_it_was_saved(tmp_path: Path) -> None:
    assert read(written(tmp_path / "warm")) == SAVED


def test_memory_may_be_on_another_backing(tmp_path: Path) -> None:
    found = read(written(tmp_path / "warm"), {"backing": "thp"})
    assert found.guest == dataclasses.replace(SAVED.guest, backing=Backing.THP)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"architecture": "x86_64"}, "another kind of machine: x86_64"),
        ({"ram_base": 0}, "another kind of machine"),
        ({"page_size": OTHER_PAGES}, f"made on a host with {OTHER_PAGES >> 10} KiB pages"),
        ({"page_size": 1 << 20}, "its page size is 1048576"),
        ({"vcpus": [VCPU.to_json()]}, "not those of its guest"),
        ({"guest": {**SAVED.guest.to_json(), "memory": 32 << 20}}, "not those of its guest"),
        ({"guest": {**SAVED.guest.to_json(), "wings": 2}}, "not what it should be"),
        ({"guest": {**SAVED.guest.to_json(), "backing": "cheese"}}, "not what it should be"),
        ({"vcpus": [{"registers": {}}] * 2}, "not what it should be"),
        ({"vcpus": [{**VCPU.to_json(), "registers": {"0x6030000000100040": "00"}}] * 2}, "has 1 bytes"),
        ({"page_size": 4096.0}, "not what it should be"),
        ({"architecture": ["x86"]}, "is no line of text"),
        ({"kernel": "7.3\x1b[2J"}, "is no line of text"),
        ({"kernel": "\ud800"}, "is no line of text"),
        ({"kernel": "7" * 65}, "is no line of text"),
        ({"guest": []}, "is no object"),
        ({"guest": {**SAVED.guest.to_json(), "huge_page_size": "x"}}, "'huge_page_size' .* is no int"),
        ({"guest": {**SAVED.guest.to_json(), "el2": "no"}}, "'el2' .* is no bool"),
        ({"guest": {**SAVED.guest.to_json(), "vcpus": 0}, "vcpus": []}, "a guest has 1 to 8"),
        ({"vcpus": 5}, "not what it should be"),
        ({"vcpus": [changed_vcpu(registers=[])] * 2}, "is no object"),
        ({"vcpus": [changed_vcpu(registers={"-0x1": "00"})] * 2}, "no hexadecimal number"),
        ({"vcpus": [changed_vcpu(registers={"0x1" + "0" * 16: "00"})] * 2}, "no number from 0 to"),
        ({"vcpus": [changed_vcpu(registers={"pc": "00" * 8})] * 2}, "no hexadecimal number"),
        ({"vcpus": [changed_vcpu(registers={f"{PC:#x}": 0})] * 2}, "no hexadecimal bytes"),
        ({"vcpus": [changed_vcpu(mp_state="0")] * 2}, "neither runnable nor stopped"),
        ({"vcpus": [changed_vcpu(mp_state=1 << 32)] * 2}, "neither runnable nor stopped"),
        ({"vcpus": [changed_vcpu(events="00" * 63)] * 2}, "have 63 bytes in place of 64"),
        ({"vcpus": [changed_vcpu(events="00" * 65)] * 2}, "have 65 bytes in place of 64"),
        ({"gic": [[1, 2]]}, "not what it should be"),
        ({"gic": {}}, "not that of its guest"),
        ({"gic": []}, "not that of its guest"),
        ({"gic": SAVED.gic[1:]}, "not that of its guest"),
        ({"gic": SAVED.gic[:-20]}, "not that of its guest"),
        ({"gic": SAVED.gic + SAVED.gic[-1:]}, "not that of its guest"),
        ({"gic": (*SAVED.gic, (0, 2, 0))}, "not that of its guest"),
        ({"gic": SAVED.gic[1::-1] + SAVED.gic[2:]}, "not that of its guest"),
        ({"gic": ((1, 0, 1 << 32), *SAVED.gic[1:])}, "no number from 0 to 0xffffffff"),
        ({"gic": ((1, 0, -1), *SAVED.gic[1:])}, "no number from 0 to"),
        ({"gic": ((1, 0, True), *SAVED.gic[1:])}, "no number from 0 to"),
        ({"gic_identity": []}, "identity"),
        ({"gic_identity": [[4, 0, 0]]}, "identity"),
        ({"counters": []}, "is no object"),
        ({"counters": {f"{COUNTERS[0]:#x}": 1 << 64}}, "no number from 0 to 0xffffffffffffffff"),
        ({"counters": {f"{PC:#x}": 1}}, "is no counter"),
        ({"uart": 5}, "not what it should be"),
        ({"uart": {**SAVED.uart, "line": 1}}, "neither high nor low"),
    ],
)
def test_what_cannot_be_restored_is_refused_with_a_reason(
    tmp_path: Path, changes: dict[str, object], why: str
) -> None:
    with pytest.raises(BadSnapshot, match=why):
        read(written(tmp_path / "warm", changes))


@pytest.mark.parametrize("changes", [{"backing": "cheese"}, {"huge_page_size": 3}, {"wings": 2}])
def test_changes_that_cannot_be_are_the_users_mistake_not_the_snapshots(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(UsageError):
        read(written(tmp_path / "warm"), changes)


@settings(max_examples=500, deadline=None)
@given(body=changed_states())
def test_whatever_is_in_a_state_whose_sum_is_right_it_is_read_or_refused(
    empty_memory: Path, body: dict[str, Any]
) -> None:
    try:
        found = read(with_state(empty_memory, body))
    except BadSnapshot:
        return
    again = found.to_json()
    assert {name: text_of(body[name]) for name in again} == {name: text_of(again[name]) for name in again}


def text_of(value: object) -> str:
    """In which 1, 1.0, True and "1" are four things."""
    return json.dumps(value, sort_keys=True)


def test_a_state_that_is_not_changed_is_read(empty_memory: Path) -> None:
    assert read(with_state(empty_memory, whole_state())) == SAVED
