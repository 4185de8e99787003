# SPDX-License-Identifier: Apache-2.0
"""Suites on both sides, one after the other, and the search for programs that show a difference."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefault.conform import in_lab, on_spec, peers
from prefault.conform.compare import BAD, Comparison, Verdict, compare_all, without_capability
from prefault.conform.shrink import shrink
from prefault.conform.suite import Suite
from prefault.lab.machine import MachineOptions
from prefault.lab.progress import Progress, Silent
from prefault.scenarios.program import VmmProgram

BATCH = 50
"""Random programs in one boot: a lost machine costs no more than that."""
MAX_FOUND = 3
"""Programs that differ until the search ends: more of them are mostly the same difference again."""
SHRINKABLE = (Verdict.DIFFERENT, Verdict.FAILED, Verdict.SPLAT)
"""A lost machine costs a boot each time, so that what loses it is shown as it is."""


@dataclass
class Session:
    """A kernel in the lab beside a specification of the same host.

    :ivar limit: seconds that one scenario may take on the kernel
    :ivar facts: what the kernel's host was found to be
    :ivar seconds: spent on each side
    """

    options: MachineOptions
    kernel: Path | None = None
    limit: float = in_lab.LIMIT_SECONDS
    progress: Progress = field(default_factory=Silent)
    facts: Mapping[str, object] = field(default_factory=dict)
    boots: int = 0
    folders: list[Path] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"kernel": 0.0, "specification": 0.0})

    def compare(self, suite: Suite, what: str = "scenarios") -> list[Comparison]:
        """Play a suite on both sides."""
        count, start = len(suite.order()), time.monotonic()
        self.progress.stage(f"{what} on the kernel", count)
        lab = in_lab.play(suite, self.options, self.kernel, self.limit, self.progress.step)
        middle = time.monotonic()
        self.facts = lab.facts or self.facts
        self.boots += lab.boots
        self.folders += lab.folders
        self.progress.stage(f"{what} on the specification", count)
        config = dataclasses.replace(on_spec.host_config(self.facts), mte=self.options.mte)
        spec = on_spec.play(suite, config, self.progress.step)
        self.seconds["kernel"] += middle - start
        self.seconds["specification"] += time.monotonic() - middle
        found = self._judged(compare_all(spec, lab.plays, tables=not self.options.arch.stock))
        return found if on_spec.can_pre_fault(self.facts) else [without_capability(one) for one in found]

    def _judged(self, found: list[Comparison]) -> list[Comparison]:
        """Comparisons, those that differ as is known of this architecture told from others."""
        arch = self.options.arch.name
        return [
            dataclasses.replace(one, verdict=Verdict.KNOWN) if peers.known(arch, one) else one
            for one in found
        ]

    def differing(self, programs: Mapping[str, VmmProgram]) -> set[str]:
        """The programs that show a difference."""
        found = self.compare(Suite(programs=programs), "smaller programs")
        return {one.name for one in found if one.verdict in SHRINKABLE}

    def search(self, programs: Mapping[str, VmmProgram]) -> Iterator[list[Comparison]]:
        """Play programs in batches, until all are played or enough of them differ."""
        names, found = list(programs), 0
        for start in range(0, len(names), BATCH):
            batch = names[start : start + BATCH]
            what = f"programs {start + 1} to {start + len(batch)} of {len(names)}"
            comparisons = self.compare(Suite(programs={name: programs[name] for name in batch}), what)
            yield comparisons
            found += sum(one.verdict in BAD for one in comparisons)
            if found >= MAX_FOUND:
                return

    def minimal(self, program: VmmProgram, comparison: Comparison) -> tuple[VmmProgram, Comparison]:
        """The smallest program found that shows a difference, and what it shows.

        What comes after the first difference has no part in it.
        """
        if comparison.difference:
            actions = program.actions[: comparison.difference.index + 1]
            program = dataclasses.replace(program, actions=actions)
        smallest = shrink(program, self.differing, lambda text: self.progress.stage(f"shrinking, {text}"))
        (last,) = self.compare(Suite(programs={comparison.name: smallest}), "the smallest program")
        return (smallest, last) if last.verdict in BAD else (program, comparison)
