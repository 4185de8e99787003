# SPDX-License-Identifier: Apache-2.0
"""All listed scenarios on a kernel and on the specification: what does not hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefault.conform import in_lab, on_spec
from prefault.conform.compare import BAD, Comparison, Verdict, compare_all
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


def judge(kernel: Path, mode: str, limit: float, progress: Progress) -> Judgement:
    """Play everything.

    :param mode: of KVM
    :param limit: seconds that one scenario may take
    """
    suite = Suite(choose(()))
    progress.stage("scenarios", len(suite.order()))
    options = MachineOptions(mode=mode, append=in_lab.HUGE_PAGES)
    lab = in_lab.play(suite, options, kernel, limit, progress.step)
    spec = on_spec.play(suite, on_spec.host_config(lab.facts))
    return Judgement(bool(lab.facts.get("pre_fault_memory")), tuple(compare_all(spec, lab.plays)))


def said(one: Comparison) -> str:
    """In a line, what is wrong with it."""
    lines = [*one.splats, *one.kernel.text.strip().splitlines()[-1:]]
    if one.difference is not None:
        lines.append(f"differs in {one.difference.what}")
    return lines[0] if lines else one.verdict.value
