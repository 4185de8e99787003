# SPDX-License-Identifier: Apache-2.0
"""What is to be played on both sides, and what came of it on one."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

from prefault.errors import UsageError
from prefault.scenarios import SCENARIOS, Scenario
from prefault.scenarios.program import VmmProgram, scenario, to_json


@dataclass(frozen=True)
class Suite:
    """Listed scenarios by name, and programs under names of their own, in the order of play."""

    names: tuple[str, ...] = ()
    programs: Mapping[str, VmmProgram] = field(default_factory=dict)

    def scenarios(self) -> list[Scenario]:
        """All of it as scenarios."""
        listed = [SCENARIOS[name] for name in self.names]
        return listed + [scenario(name, program) for name, program in self.programs.items()]

    def order(self) -> list[str]:
        """Names in the order of play."""
        return [*self.names, *self.programs]

    def only(self, names: Iterable[str]) -> Self:
        """A part of it."""
        kept = set(names)
        programs = {name: one for name, one in self.programs.items() if name in kept}
        return type(self)(tuple(name for name in self.names if name in kept), programs)

    def programs_json(self) -> bytes:
        """The programs as a file."""
        return json.dumps({name: to_json(one) for name, one in self.programs.items()}).encode()


def choose(patterns: Iterable[str], requirements: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of listed scenarios that match a pattern and are about a requirement; none given means all.

    A pattern is a name, a name without its case in brackets, or has * and ? in it.

    :raises UsageError: a pattern matches nothing, or nothing is left
    """
    patterns, wanted = list(patterns), {one.upper() for one in requirements}
    chosen = set() if patterns else set(SCENARIOS)
    for pattern in patterns:
        found = [name for name in SCENARIOS if matches(name, pattern)]
        if not found:
            raise UsageError(f"no scenario matches {pattern!r}; `prefault conform --list` has them all")
        chosen.update(found)
    names = [name for name in SCENARIOS if name in chosen]
    if wanted:
        names = [name for name in names if wanted & set(SCENARIOS[name].requirements)]
    if not names:
        listed = ", ".join(sorted(wanted, key=lambda one: (len(one), one)))
        raise UsageError(f"no scenario of these is about {listed}; `prefault conform --list` has them all")
    return tuple(names)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means a scenario."""
    if pattern in (name, name.partition("[")[0]):
        return True
    # Brackets are the case of a scenario here, not a set of characters.
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))


@dataclass(frozen=True)
class Play:
    """How a scenario ended on one side.

    :ivar outcome: ``passed``, ``failed``, ``skipped``, or ``lost`` with the machine that it was played on
    :ivar kernel_log: what the kernel had to say meanwhile
    """

    name: str
    outcome: str
    text: str = ""
    seconds: float = 0
    observations: tuple[tuple[str, object], ...] = ()
    kernel_log: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> Self:
        """Read a line of ``python3 -m prefault.scenarios``."""
        observations = raw["observations"]
        log = raw.get("kernel_log", [])
        assert isinstance(observations, list)
        assert isinstance(log, list)
        return cls(
            str(raw["name"]),
            str(raw["outcome"]),
            str(raw["text"]),
            float(str(raw["seconds"])),
            tuple((str(what), value) for what, value in observations),
            tuple(log),
        )
