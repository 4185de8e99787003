# SPDX-License-Identifier: Apache-2.0
"""Making a program that shows a difference as small as it goes.

Each round makes all smaller programs that are one step away and plays them in one boot; the smallest
that still differs goes into the next round. A boot costs more than playing some dozen short programs, so
that this is faster than to try one after the other, as Hypothesis's own shrinker would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

from prefault.guest.program import EnterL2, Read, Step, Walk
from prefault.machine import MemoryRegion, Resident, SlotFlags
from prefault.scenarios.program import (
    BLOCK,
    PAGE,
    Action,
    Advise,
    Age,
    Guest,
    PreFault,
    Protect,
    Resume,
    SetRegion,
    Unmap,
    VmmProgram,
    to_json,
)
from prefault.scenarios.scenario import DATA

MAX_ROUNDS = 16
MAX_ACTIONS = 300
"""Played in one round."""

Differs = Callable[[Mapping[str, VmmProgram]], set[str]]
"""Plays programs on both sides; the names of those that differ."""


def shrink(
    program: VmmProgram, differs: Differs, note: Callable[[str], None] = lambda text: None
) -> VmmProgram:
    """The smallest program found that ``differs`` as well.

    :param differs: plays programs by name, and names those that differ
    :param note: told of each round
    """
    tried = {repr(program)}
    bold: list[VmmProgram] = []
    for number in range(1, MAX_ROUNDS + 1):
        fresh = _fresh([*bold, *smaller(program)], tried)
        if not fresh:
            break
        note(f"round {number}: {len(program.actions)} actions, {len(fresh)} smaller programs")
        winners = [fresh[name] for name in differs(fresh)]
        bold = []
        if winners:
            bold = [_all_at_once(program, winners)]
            program = min(winners, key=weight)
    return program


def _fresh(candidates: Iterable[VmmProgram], tried: set[str]) -> dict[str, VmmProgram]:
    """Those that were not tried yet, as many as a round plays."""
    found: dict[str, VmmProgram] = {}
    actions = 0
    for one in candidates:
        if repr(one) in tried:
            continue
        tried.add(repr(one))
        found[f"candidate {len(found)}"] = one
        actions += len(one.actions)
        if actions > MAX_ACTIONS:
            break
    return found


def _all_at_once(program: VmmProgram, winners: list[VmmProgram]) -> VmmProgram:
    """A program with all that made it smaller, each by itself: often that differs, too."""
    shorter = [one for one in winners if len(one.actions) < len(program.actions)]
    simpler = [one.actions for one in winners if len(one.actions) == len(program.actions)]
    kept = []
    for index, action in enumerate(program.actions):
        if all(action in one.actions for one in shorter):
            other = [actions[index] for actions in simpler if actions[index] != action]
            kept.append(other[0] if other else action)
    vcpus = min((one.vcpus for one in winners), default=program.vcpus)
    el2, e2h0 = (all(getattr(one, name) for one in (program, *winners)) for name in ("el2", "e2h0"))
    actions = tuple(kept if vcpus > 1 else map(_on_first, kept))
    return dataclasses.replace(program, actions=actions, vcpus=vcpus, el2=el2, e2h0=e2h0 and el2)


def weight(program: VmmProgram) -> tuple[int, int]:
    """What is smaller is better: fewer things first, then shorter to write."""
    return program.length, len(repr(to_json(program)))


def smaller(program: VmmProgram) -> Iterator[VmmProgram]:
    """Programs one step smaller, those that promise most first."""
    actions = program.actions
    for keep in _cuts(len(actions)):
        yield dataclasses.replace(program, actions=tuple(actions[index] for index in keep))
    if program.vcpus > 1:
        one_vcpu = tuple(_on_first(action) for action in actions)
        yield dataclasses.replace(program, vcpus=1, actions=one_vcpu)
    if program.el2:
        nested = any(isinstance(one, Guest) and _enters(one.steps) for one in actions)
        if not nested:
            yield dataclasses.replace(program, el2=False, e2h0=False)
        if program.e2h0:
            yield dataclasses.replace(program, e2h0=False)
    for index, action in enumerate(actions):
        for other in _simpler(action):
            yield dataclasses.replace(program, actions=(*actions[:index], other, *actions[index + 1 :]))


def _cuts(count: int) -> Iterator[list[int]]:
    """What to keep: without a half, a quarter, … without each single action, the last one first."""
    size = count // 2
    while size > 1:
        for start in range(0, count, size):
            yield [index for index in range(count) if not start <= index < start + size]
        size //= 2
    for gone in reversed(range(count)):
        yield [index for index in range(count) if index != gone]


def _enters(steps: tuple[Step, ...]) -> bool:
    return any(isinstance(step, EnterL2) for step in steps)


def _on_first(action: Action) -> Action:
    if isinstance(action, Guest | Resume | PreFault):
        return dataclasses.replace(action, vcpu=0)
    return action


def _simpler(action: Action) -> Iterator[Action]:
    match action:
        case SetRegion(region):
            yield from (SetRegion(one) for one in _regions(region))
        case Guest(steps):
            yield from (dataclasses.replace(action, steps=one) for one in _programs(steps) if one)
            if action.early:
                yield dataclasses.replace(action, early=False)
            if action.events:
                yield dataclasses.replace(action, events=0)
        case Resume():
            if action.early or action.events:
                yield dataclasses.replace(action, early=False, events=0)
        case PreFault(gpa, size) | Advise(gpa, size) | Protect(gpa, size) | Unmap(gpa, size) | Age(gpa, size):
            yield from (dataclasses.replace(action, size=one) for one in (PAGE, BLOCK) if 0 < one < size)
            if gpa > DATA:
                yield dataclasses.replace(action, gpa=DATA)


def _regions(region: MemoryRegion) -> Iterator[MemoryRegion]:
    if not region.size:
        return
    plain = {"resident": Resident.NOTHING, "flags": SlotFlags.NONE, "hva_offset": 0, "page_size": 0}
    for name, value in plain.items():
        if getattr(region, name) != value:
            yield dataclasses.replace(region, **{name: value})  # type: ignore[arg-type]  # by name
    for size in (16 * PAGE, BLOCK):
        if size < region.size:
            yield dataclasses.replace(region, size=size)
    if region.gpa > DATA:
        yield dataclasses.replace(region, gpa=DATA)


def _programs(steps: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    """Guest programs without one step, or with one that is simpler."""
    for index, step in enumerate(steps):
        before, after = steps[:index], steps[index + 1 :]
        yield (*before, *after)
        if isinstance(step, EnterL2):
            yield (*before, *step.steps, *after)
            for inner in _programs(step.steps):
                yield (*before, dataclasses.replace(step, steps=inner), *after)
            if len(step.mappings) > 1:
                yield (*before, dataclasses.replace(step, mappings=step.mappings[:1]), *after)
        if isinstance(step, Walk):
            if not step.write_permille:
                yield (*before, Read(step.start), *after)
            if isinstance(step.size, int) and step.size > step.stride:
                yield (*before, dataclasses.replace(step, size=step.stride), *after)
