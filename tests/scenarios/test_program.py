# SPDX-License-Identifier: Apache-2.0
"""Programs of a VMM: as JSON, for people, on other page sizes, and played."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings

from prefault.conform.strategies import programs
from prefault.errors import UsageError
from prefault.guest.program import DeviceRead, EnterL2, Execute, L2Mapping, Marker, Read, Report, Write
from prefault.machine import Access, Backing, MemoryRegion, Resident, SlotFlags
from prefault.scenarios import perform
from prefault.scenarios.program import (
    ANSWER,
    BLOCK,
    PAGE,
    Action,
    Guest,
    HostWrite,
    PreFault,
    Protect,
    Resume,
    SetRegion,
    VmmProgram,
    from_json,
    scale,
    scaled,
    scenario,
    to_json,
)
from prefault.scenarios.scenario import DATA, DEVICE
from prefault.spec import HostConfig, open_spec

SLOT = SetRegion(MemoryRegion(1, DATA, BLOCK, Backing.PRIVATE, Resident.WRITE))
READ_DEVICE = Guest((DeviceRead(DEVICE), Report()), events=1)


def shown(*actions: Action, page_size: int = 0x1000, el2: bool = False) -> list[dict[str, object]]:
    """What each action shows on the specification."""
    hugetlb = {0x1000: (2 << 20,), 0x1_0000: (512 << 20, 2 << 20)}[page_size]
    with open_spec(HostConfig(page_size=page_size, hugetlb=hugetlb)) as kvm:
        outcome = perform(kvm, scenario("program", VmmProgram(actions, el2=el2)))
    assert outcome.outcome == "passed", outcome.text
    return [value for _, value in outcome.observations if isinstance(value, dict)]


@given(programs(8))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_program_survives_json_and_has_a_line_for_each_action(program: VmmProgram) -> None:
    assert from_json(json.loads(json.dumps(to_json(program)))) == program
    assert len(program.text()) == 1 + len(program.actions)


@given(programs(8))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_programs_for_another_page_size_are_aligned_as_they_were(program: VmmProgram) -> None:
    assert scaled(program, PAGE, BLOCK) is program
    page, block = 0x1_0000, 512 << 20
    for mine, its in zip(program.actions, scaled(program, page, block).actions, strict=True):
        assert type(mine) is type(its)
        if isinstance(mine, SetRegion):
            assert isinstance(its, SetRegion)
            assert its.region.size % page == its.region.gpa % page == 0
            assert (mine.region.gpa % BLOCK == 0) == (its.region.gpa % block == 0)


@pytest.mark.parametrize(
    ("number", "other"),
    [
        (DATA, DATA),
        (DATA + PAGE, DATA + 0x1_0000),
        (DATA + 3 * BLOCK - PAGE, DATA + 3 * (512 << 20) - 0x1_0000),
        (DATA - PAGE // 16, DATA - 0x1_0000 + 0xF00),
        (17 * PAGE, 17 * 0x1_0000),
        (BLOCK + 5 * PAGE, (512 << 20) + 5 * 0x1_0000),
    ],
)
def test_blocks_become_blocks_and_the_rest_pages(number: int, other: int) -> None:
    assert scale(number, 0x1_0000, 512 << 20) == other


@pytest.mark.parametrize(
    "raw",
    [
        [],
        {"version": 2, "actions": []},
        {"version": 1},
        {"version": 1, "actions": [{"do": "Guest", "steps": [{"do": "system"}]}]},
        {"version": 1, "actions": [{"do": "PreFault", "gpa": "0", "size": 1}]},
        {"version": 1, "actions": [{"do": "PreFault", "gpa": 0, "size": 1, "more": 1}]},
        {"version": 1, "actions": [{"do": "Protect", "gpa": 0, "size": 1, "access": "execute"}]},
        {"version": 1, "actions": [{"do": "Guest", "steps": [{"do": "Read", "gpa": 1}]}]},
    ],
)
def test_what_is_no_program_is_refused(raw: object) -> None:
    with pytest.raises(UsageError):
        from_json(raw)


def test_a_guest_left_standing_goes_on_with_the_answer_to_its_read() -> None:
    found = shown(SLOT, READ_DEVICE, PreFault(DATA, PAGE), Resume())
    assert found[1]["result"] == [f"MmioExit(gpa={DEVICE}, width=8, is_write=False, data=0)"]
    assert found[2]["result"] == [0, DATA + PAGE, 0]
    assert found[3]["result"] == [f"Reported(value={ANSWER})", "Done()"]


def test_a_guest_at_its_end_stands_nowhere() -> None:
    found = shown(SLOT, Guest((Marker(1),)), Resume())
    assert found[1]["result"] == ["AtMarker(number=1)", "Done()"]
    assert found[2]["result"] == "stands nowhere"


def test_what_the_vmm_may_not_touch_it_leaves_alone() -> None:
    found = shown(SLOT, Protect(DATA, PAGE, Access.NONE), HostWrite(DATA + 8), HostWrite(DATA + PAGE))
    assert [one["result"] for one in found[2:]] == ["not for the VMM", "done"]
    found = shown(SLOT, Protect(DATA, PAGE, Access.READ), Guest((Execute(DATA + 0x800),)))
    assert found[2]["result"] == "nothing to execute"


def test_a_function_is_put_where_l2_sees_it() -> None:
    enter = EnterL2((Execute(2 * DATA + 0x800), Marker(4)), (L2Mapping(2 * DATA, DATA, BLOCK, 2),))
    found = shown(SLOT, Guest((enter,)), el2=True)
    assert found[1]["result"] == ["AtMarker(number=4)", "Done()"]
    shadows = found[1]["shadows"]
    assert isinstance(shadows, list)
    assert len(shadows) == 1


def test_errors_are_shown_by_number() -> None:
    overlap = SetRegion(MemoryRegion(2, DATA, BLOCK))
    found = shown(SLOT, overlap, PreFault(DATA + 1, PAGE), PreFault(DATA, PAGE, vcpu=3))
    assert [one["result"] for one in found[1:]] == ["KvmError 17", [22, DATA + 1, PAGE], "UsageError"]


def test_the_dirty_log_and_the_faults_are_shown() -> None:
    logged = SetRegion(
        MemoryRegion(1, DATA, BLOCK, Backing.PRIVATE, Resident.WRITE, SlotFlags.LOG_DIRTY_PAGES)
    )
    found = shown(logged, Guest((Write(DATA + 3 * PAGE, 1), Read(DATA), Report())))
    assert found[1]["faults"] == {
        "read": 1,
        "write": 1,
        "execute": 1,
        "mmio": 2,
        "ipas": [0x4000_0000, DATA + 3 * PAGE, DATA],
    }


def test_the_same_program_plays_on_pages_of_64_kib() -> None:
    found = shown(SLOT, PreFault(DATA, 3 * PAGE), page_size=0x1_0000)
    assert found[1]["leaves"] == [f"{DATA:#x} size 0x30000 level 3 page rwxuA"]
