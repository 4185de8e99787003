# SPDX-License-Identifier: Apache-2.0
"""What the host does to memory of its own accord. KSM and idle page tracking are for the scenarios."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefault.errors import CapabilityMissing, PrefaultError
from prefault.kvm import devmem, host, memory
from prefault.kvm.memory import Memory
from prefault.machine import Backing, MemoryRegion

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def four_pages() -> Iterator[Memory]:
    made = memory.create(MemoryRegion(0, 0, 4 * PAGE, Backing.PRIVATE), PAGE)
    yield made
    made.close()


def test_a_child_keeps_memory_as_it_was(four_pages: Memory) -> None:
    four_pages.write(PAGE, b"before")
    with host.Child(lambda gpa: four_pages.hva + gpa) as child:
        four_pages.write(PAGE, b"after!")
        assert child.read_memory(PAGE, 6) == b"before"
        assert child.read_memory(0, 4 * PAGE)[PAGE : PAGE + 6] == b"before"
    assert four_pages.read(PAGE, 6) == b"after!"


def test_a_child_can_be_closed_twice_and_is_gone_then(four_pages: Memory) -> None:
    child = host.Child(lambda gpa: four_pages.hva + gpa)
    child.close()
    child.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_child_that_dies_is_an_error(four_pages: Memory) -> None:
    with host.Child(lambda gpa: four_pages.hva + gpa) as child:
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(PrefaultError, match="the forked child is gone"):
            child.read_memory(0, 8)


def test_frames_are_those_of_pages_that_are_there(four_pages: Memory) -> None:
    four_pages.write(0, b"x")
    four_pages.write(2 * PAGE, b"x")
    try:
        found = host.frames(four_pages.hva, 4 * PAGE, PAGE)
    except CapabilityMissing as missing:
        pytest.skip(str(missing))
    assert found[1] == found[3] == 0
    assert 0 not in (found[0], found[2])
    assert found[0] != found[2]


def test_flash_is_where_the_device_tree_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devmem, "_NODES", tmp_path)
    (tmp_path / "flash@0").mkdir()
    (tmp_path / "flash@0/reg").write_bytes(struct.pack(">QQQQ", 0, 64 << 20, 64 << 20, 64 << 20))
    assert devmem.flash(1 << 20) == 64 << 20
    with pytest.raises(CapabilityMissing, match="no flash of 0x8000000 bytes"):
        devmem.flash(128 << 20)


def test_a_machine_without_flash_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devmem, "_NODES", tmp_path)
    with pytest.raises(CapabilityMissing, match="use another backing"):
        devmem.flash(PAGE)
