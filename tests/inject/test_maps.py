# SPDX-License-Identifier: Apache-2.0
"""What a process has mapped: one mapping asked for alone is as a line of its file says."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefault.inject import maps
from prefault.inject.maps import Mapping, mapping_at, mappings


@pytest.fixture
def pid() -> Iterator[int]:
    """A process that maps nothing any more: it waits for more to copy."""
    with subprocess.Popen(("cat",), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write(b"x")
        assert child.stdout.read(1) == b"x"
        yield child.pid


def outside(all_: list[Mapping]) -> list[int]:
    """Addresses between mappings."""
    return [one.end for one, after in itertools.pairwise(all_) if one.end < after.start]


def refuse(error: int) -> object:
    def ioctl(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    return ioctl


@pytest.mark.parametrize("has_query", [True, False])
def test_a_mapping_is_what_its_line_says(pid: int, has_query: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_query:  # before Linux 6.11
        monkeypatch.setattr(fcntl, "ioctl", refuse(errno.ENOTTY))
    every = [one for one in mappings(pid) if one.name != "[vsyscall]"]
    assert every
    for one in every[:: 1 if has_query else 20]:
        assert mapping_at(pid, one.start) == mapping_at(pid, one.end - 1) == one
    for address in [0, *outside(every)[:5]]:
        assert mapping_at(pid, address) is None


def test_a_process_that_is_gone_has_no_mapping() -> None:
    child = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(child, 0)
    assert mapping_at(child, 4096) is None


def test_a_stack_is_found_without_reading_what_else_is_mapped(
    pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = next(one for one in mappings(pid) if one.name == "[stack]")
    monkeypatch.setattr(maps, "mappings", lambda pid: pytest.fail("all mappings were read"))
    try:
        with Path(f"/proc/{pid}/maps").open() as file:
            fcntl.ioctl(file, maps._PROCMAP_QUERY, maps._Query(size=104, query_addr=stack.start))
    except OSError as error:
        pytest.skip(f"this kernel has no PROCMAP_QUERY: {error}")
    assert maps.stack_at(pid, stack.start) == (stack.start, "")
