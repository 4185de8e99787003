# SPDX-License-Identifier: Apache-2.0
"""Random programs: the same for the same seed, various, and sound on the specification."""

from __future__ import annotations

from collections import Counter

from prefault.conform.strategies import generate, programs
from prefault.guest.program import EnterL2, Execute
from prefault.machine import GUEST_MEMORY, Advice
from prefault.scenarios import perform
from prefault.scenarios.program import Action, Advise, Guest, SetRegion, scenario
from prefault.spec import open_spec

_KINDS = ((False, False), (True, False), (True, True))


def test_a_seed_says_which_programs() -> None:
    assert generate(4, 3, 8) == generate(4, 3, 8)
    assert generate(4, 3, 8)[:2] == generate(2, 3, 8)
    assert generate(2, 3, 8) != generate(2, 4, 8)


def test_programs_are_not_alike() -> None:
    found = generate(30, 1, 15)
    assert len({repr(one) for one in found}) == len(found)


def test_every_kind_of_action_and_every_backing_comes_up() -> None:
    found = [action for program in generate(80, 2, 25) for action in program.actions]
    kinds = Counter(type(action) for action in found)
    assert set(kinds) == set(Action.__subclasses__())
    regions = [action.region for action in found if isinstance(action, SetRegion)]
    assert {region.backing for region in regions} == set(GUEST_MEMORY)
    advised = {action.advice for action in found if isinstance(action, Advise)}
    assert advised == set(Advice) - {Advice.HWPOISON, Advice.MERGEABLE}
    steps = [step for action in found if isinstance(action, Guest) for step in action.steps]
    assert any(isinstance(step, EnterL2) for step in steps)
    assert any(isinstance(step, Execute) for step in steps)


def test_vcpus_with_and_without_el2_come_up() -> None:
    found = Counter((program.el2, program.e2h0, program.vcpus) for program in generate(60, 5, 1))
    assert set(found) == {(el2, e2h0, vcpus) for el2, e2h0 in _KINDS for vcpus in (1, 2)}


def test_without_nested_no_vcpu_has_el2() -> None:
    assert not any(program.el2 for program in generate(20, 4, 5, nested=False))


def test_programs_end_on_the_specification_and_leave_nothing_behind() -> None:
    for number, program in enumerate(generate(12, 6, 15)):
        with open_spec() as kvm:
            outcome = perform(kvm, scenario(f"program {number}", program))
        assert outcome.outcome == "passed", outcome.text
        assert len(outcome.observations) == len(program.actions)
        assert not kvm.host.memory.tables
        assert not kvm.host.mm.pins


def test_the_strategy_can_be_used_by_itself() -> None:
    programs(3).validate()
