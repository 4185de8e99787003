# SPDX-License-Identifier: Apache-2.0
"""The walk that ``prefault run`` does: what it counts is what happened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from prefault.errors import UsageError
from prefault.machine import Backing, Resident
from prefault.scenarios.walk import WalkConfig, WalkRun, When, walk
from tests.lab.inside.checks import Checks, main
from tests.lab.inside.guests import MIB, PAGE, kvm

checks = Checks()
SIZE = 4 * MIB
PAGES = SIZE // PAGE


def phase_faults(run: WalkRun) -> list[int]:
    return [phase.faults.total for phase in run.phases]


@checks.each((Backing.PRIVATE, Backing.SHARED, Backing.FILE_SHARED, Backing.GUEST_MEMFD))
def small_pages_cost_a_fault_each_or_none(backing: Backing) -> None:
    result = walk(kvm(), WalkConfig(SIZE, backing))
    assert phase_faults(result.without) == [PAGES // 2, PAGES // 2]
    assert phase_faults(result.with_prefault) == [0, 0]
    assert result.without.leaves == result.with_prefault.leaves == {"3": PAGES}
    assert result.without.prefault_ns == 0 < result.with_prefault.prefault_ns


@checks
def blocks_cost_a_fault_each_or_none() -> None:
    result = walk(kvm(), WalkConfig(8 * MIB, Backing.THP))
    assert phase_faults(result.without) == [2, 2]
    assert phase_faults(result.with_prefault) == [0, 0]
    assert result.with_prefault.leaves == {"2": 4}


@checks
def half_pre_faulted_spares_half_the_faults() -> None:
    result = walk(kvm(), WalkConfig(SIZE, prefault_permille=500))
    assert phase_faults(result.with_prefault) == [0, PAGES // 2]
    assert result.with_prefault.prefaulted_bytes == SIZE // 2


@checks
def pre_faulting_a_stopped_guest_spares_what_comes_after() -> None:
    result = walk(kvm(), WalkConfig(SIZE, when=When.WHILE_RUNNING))
    assert phase_faults(result.with_prefault) == [PAGES // 2, 0]


@checks
def memory_never_written_faults_again_on_the_first_write() -> None:
    result = walk(kvm(), WalkConfig(SIZE, resident=Resident.READ, write_permille=250))
    faults = result.with_prefault.faults
    assert faults.read == 0 and faults.permission == PAGES // 4, faults


@checks.each((When.BEFORE, When.WHILE_RUNNING))
def a_nested_guest_keeps_its_shadow_faults_and_spares_l1_its_own(when: When) -> None:
    result = walk(kvm(), WalkConfig(SIZE, nested=True, when=when))
    half = PAGES // 2
    assert phase_faults(result.without) == [half, half, PAGES]
    assert phase_faults(result.with_prefault) == [half, half, 0]
    assert result.with_prefault.leaves == result.with_prefault.shadow_leaves == {"3": PAGES}


@contextmanager
def _on_one_cpu() -> Iterator[None]:
    """Let threads take turns: of vCPUs that make one table at the same moment, all but one fault again."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)


@checks.each((False, True))
def several_vcpus_walk_their_parts(nested: bool) -> None:
    with _on_one_cpu():
        result = walk(kvm(), WalkConfig(SIZE, vcpus=4, nested=nested))
    assert result.without.faults.total == PAGES * (2 if nested else 1)
    assert result.with_prefault.faults.total == (PAGES if nested else 0)
    assert result.with_prefault.leaves == {"3": PAGES}


@checks
def every_word_is_compared() -> None:
    result = walk(kvm(), WalkConfig(SIZE, stride=512))
    assert result.without.bytes_checked == SIZE // 512 * 8


@checks
def a_size_that_cannot_be_cut_is_refused() -> None:
    try:
        walk(kvm(), WalkConfig(3 * PAGE))
    except UsageError as error:
        assert "0x2000" in str(error)
        return
    raise AssertionError("accepted")


if __name__ == "__main__":
    main(checks)
