# SPDX-License-Identifier: Apache-2.0
"""Programs get as small as the difference allows, and no smaller."""

from __future__ import annotations

from collections.abc import Mapping

from prefault.conform.shrink import MAX_ACTIONS, shrink, smaller, weight
from prefault.conform.strategies import generate
from prefault.guest.program import EnterL2
from prefault.machine import Access, Backing, MemoryRegion, Resident, SlotFlags
from prefault.scenarios.program import (
    PAGE,
    Guest,
    HostRead,
    PreFault,
    Protect,
    SetRegion,
    VmmProgram,
)
from prefault.scenarios.scenario import DATA

REGION = MemoryRegion(1, DATA, 64 * PAGE, Backing.SHARED, Resident.WRITE, SlotFlags.LOG_DIRTY_PAGES)
NOISE = [HostRead(DATA + number * PAGE) for number in range(12)]
PROGRAM = VmmProgram(
    (SetRegion(REGION), *NOISE, Protect(DATA, PAGE, Access.READ), *NOISE, PreFault(DATA, 17 * PAGE, vcpu=1)),
    vcpus=2,
)


def breaks(program: VmmProgram) -> bool:
    """A bug that takes a protected page and then a pre-fault of more than a page."""
    kinds = [type(action) for action in program.actions]
    if SetRegion not in kinds or Protect not in kinds or PreFault not in kinds:
        return False
    last = program.actions[kinds.index(PreFault)]
    assert isinstance(last, PreFault)
    return kinds.index(Protect) < kinds.index(PreFault) and last.size > PAGE


def differs(programs: Mapping[str, VmmProgram]) -> set[str]:
    return {name for name, program in programs.items() if breaks(program)}


def test_only_what_the_difference_needs_is_left() -> None:
    found = shrink(PROGRAM, differs)
    assert breaks(found)
    assert [type(action) for action in found.actions] == [SetRegion, Protect, PreFault]
    assert found.vcpus == 1
    region = found.actions[0]
    assert isinstance(region, SetRegion)
    assert (region.region.resident, region.region.flags) == (Resident.NOTHING, SlotFlags.NONE)


def test_a_program_that_cannot_be_smaller_stays() -> None:
    program = VmmProgram((HostRead(DATA),))
    assert shrink(program, lambda programs: set()) == program


def test_a_round_has_no_more_than_a_boot_can_play() -> None:
    rounds: list[int] = []

    def count(programs: Mapping[str, VmmProgram]) -> set[str]:
        rounds.append(sum(len(one.actions) for one in programs.values()))
        return set()

    shrink(generate(1, 1, 40)[0], count)
    assert rounds
    assert max(rounds) <= MAX_ACTIONS + 41


def test_every_candidate_is_smaller_or_simpler() -> None:
    for program in generate(6, 5, 12):
        found = list(smaller(program))
        assert found
        for one in found:
            assert weight(one) <= weight(program) or one.length < program.length


def test_an_l2_is_among_what_is_made_simpler() -> None:
    nested = next(one for one in generate(40, 2, 20) if one.el2 and _enters(one))
    assert any(not _enters(one) for one in _closure(nested, 3))


def _enters(program: VmmProgram) -> bool:
    guests = (action for action in program.actions if isinstance(action, Guest))
    return any(isinstance(step, EnterL2) for one in guests for step in one.steps)


def _closure(program: VmmProgram, depth: int) -> list[VmmProgram]:
    """The program made simpler again and again by its first candidate that has fewer L2s."""
    found = [program]
    for _ in range(12 * depth):
        lighter = [one for one in smaller(found[-1]) if one.length < found[-1].length]
        if not lighter:
            break
        found.append(min(lighter, key=weight))
    return found
