# SPDX-License-Identifier: Apache-2.0
"""All listed scenarios on a kernel and on the specification: what does not hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefault.conform import in_lab, on_spec
from prefault.conform.compare import BAD, Comparison, Verdict, compare_all
from prefault.conform.in_lab import LabPlays
from prefault.conform.suite import Suite, choose
from prefault.lab.machine import MachineOptions
from prefault.lab.progress import Progress


@dataclass(frozen=True)
class Judgement:
    """What came of it.

    :ivar capability: whether the kernel claims to pre-fault
    """

    capability: bool
    comparisons: tuple[Comparison, ...]

    @property
    def bad(self) -> tuple[Comparison, ...]:
        """What does not hold."""
        return tuple(one for one in self.comparisons if one.verdict in BAD)

    @property
    def equal(self) -> int:
        """How many hold."""
        return sum(one.verdict is Verdict.EQUAL for one in self.comparisons)


def judge(
    kernel: Path, options: MachineOptions, limit: float, progress: Progress, *, all_of_them: bool = True
) -> Judgement:
    """Play everything.

    :param limit: seconds that one scenario may take
    :param all_of_them: go on after the first scenario that does not hold
    """
    suite = Suite(choose(()))
    progress.stage("scenarios", len(suite.order()))

    def enough(lab: LabPlays) -> bool:
        return not all_of_them and _compared(lab, list(lab.plays)[-1:])[0].verdict in BAD

    lab = in_lab.play(suite, options, kernel, limit, progress.step, enough)
    return Judgement(on_spec.can_pre_fault(lab.facts), tuple(_compared(lab, list(lab.plays))))


def _compared(lab: LabPlays, names: list[str]) -> list[Comparison]:
    """Some of what the kernel played, beside what the specification shows."""
    spec = on_spec.play(Suite(tuple(names)), on_spec.host_config(lab.facts))
    return compare_all(spec, {name: lab.plays[name] for name in names})


def said(one: Comparison) -> str:
    """In a line, what is wrong with it."""
    lines = [*one.splats, *one.kernel.text.strip().splitlines()[-1:]]
    if one.difference is not None:
        lines.append(f"differs in {one.difference.what}")
    return lines[0] if lines else one.verdict.value
