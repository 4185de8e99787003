# SPDX-License-Identifier: Apache-2.0
"""What is read of a snapshot before there is a VM, and what is refused then."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from prefault.errors import BadSnapshot
from prefault.machine import Backing
from prefault.vmm import saved
from prefault.vmm.saved import Saved
from prefault.vmm.snapshot import Snapshot

from .samples import SAVED, VCPU, written


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
        ({"page_size": 1 << 20}, "made on a host with 1024 KiB pages"),
        ({"vcpus": [VCPU.to_json()]}, "not those of its guest"),
        ({"guest": {**SAVED.guest.to_json(), "memory": 32 << 20}}, "not those of its guest"),
        ({"guest": {**SAVED.guest.to_json(), "wings": 2}}, "not what it should be"),
        ({"guest": {**SAVED.guest.to_json(), "backing": "cheese"}}, "not what it should be"),
        ({"vcpus": [{"registers": {}}] * 2}, "not what it should be"),
        ({"vcpus": [{**VCPU.to_json(), "registers": {"0x6030000000100040": "00"}}] * 2}, "has 1 bytes"),
        ({"gic": [[1, 2]]}, "not what it should be"),
        ({"counters": []}, "not what it should be"),
    ],
)
def test_what_cannot_be_restored_is_refused_with_a_reason(
    tmp_path: Path, changes: dict[str, object], why: str
) -> None:
    with pytest.raises(BadSnapshot, match=why):
        read(written(tmp_path / "warm", changes))
