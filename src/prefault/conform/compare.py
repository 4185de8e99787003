# SPDX-License-Identifier: Apache-2.0
"""What a scenario showed on the specification and on a kernel, compared."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from prefault.conform.suite import Play
from prefault.lab import splat
from prefault.scenarios.program import COULD_NOT
from prefault.scenarios.scenario import LEAVES


class Verdict(enum.Enum):
    """How a scenario compares."""

    EQUAL = "equal"
    """The law holds on both sides, and both show the same."""
    KNOWN = "known"
    """They differ as the kernel of another architecture is known to: ``conform.peers`` says why."""
    DIFFERENT = "different"
    FAILED = "failed"
    """Both sides show the same, and the law does not hold."""
    SPLAT = "splat"
    """The kernel logged what a sound one never logs."""
    LOST = "lost"
    """The kernel was lost, or the scenario was not played because of that."""
    SKIPPED = "skipped"
    """One side, or both, lacks something; nothing was compared."""


BAD = (Verdict.DIFFERENT, Verdict.FAILED, Verdict.SPLAT, Verdict.LOST)


@dataclass(frozen=True)
class Difference:
    """The first observation that differs.

    :ivar index: its number, from 0
    :ivar what: its name
    :ivar part: of an observation with several parts, which one
    :ivar spec: its value there; None if there was none
    """

    index: int
    what: str
    part: str
    spec: object
    kernel: object


@dataclass(frozen=True)
class Comparison:
    """A scenario on both sides.

    :ivar compared: how many observations are equal
    :ivar cut: why the rest was not compared, if it was not
    :ivar splats: of the kernel's log, the lines that must not be there
    """

    name: str
    verdict: Verdict
    spec: Play
    kernel: Play
    difference: Difference | None = None
    compared: int = 0
    cut: str = ""
    splats: tuple[str, ...] = ()


def compare(spec: Play, kernel: Play, *, tables: bool = True) -> Comparison:
    """Compare what a scenario showed on both sides.

    :param tables: whether the kernel shows its stage-2 tables; if not, they are left out
    """
    if not tables:
        seen = tuple(one for one in spec.observations if one[0] != LEAVES)
        spec = dataclasses.replace(spec, observations=seen)
    splats = splat.find("\n".join(kernel.kernel_log))
    count, difference, cut = _first_difference(spec, kernel)
    verdict = _verdict(spec, kernel, difference, bool(cut))
    if splats and verdict in (Verdict.EQUAL, Verdict.SKIPPED):
        verdict = Verdict.SPLAT
    return Comparison(spec.name, verdict, spec, kernel, difference, count, cut, splats)


def compare_all(
    spec: Mapping[str, Play], kernel: Mapping[str, Play], *, tables: bool = True
) -> list[Comparison]:
    """Compare suites that were played whole."""
    return [compare(spec[name], play, tables=tables) for name, play in kernel.items()]


def without_capability(one: Comparison) -> Comparison:
    """A comparison with a kernel that does not claim to pre-fault: that it does not is no difference."""
    if one.verdict is not Verdict.DIFFERENT or _pre_faults(one.kernel):
        return one
    return dataclasses.replace(one, verdict=Verdict.SKIPPED)


def _pre_faults(kernel: Play) -> bool:
    """Whether the kernel pre-faulted anything in a scenario."""
    seen = (value for what, value in kernel.observations if what.startswith("pre-fault"))
    return any(isinstance(value, dict) and value.get("errno") == 0 for value in seen)


def _verdict(spec: Play, kernel: Play, difference: Difference | None, cut: bool) -> Verdict:
    if kernel.outcome == "lost":
        return Verdict.LOST
    if "skipped" in (spec.outcome, kernel.outcome):
        return Verdict.DIFFERENT if "failed" in (spec.outcome, kernel.outcome) else Verdict.SKIPPED
    if difference:
        return Verdict.DIFFERENT
    if spec.outcome != kernel.outcome and not cut:
        return Verdict.DIFFERENT
    return Verdict.FAILED if kernel.outcome == "failed" else Verdict.EQUAL


def _first_difference(spec: Play, kernel: Play) -> tuple[int, Difference | None, str]:
    """How many observations are equal, the first that is not, and why it does not count, if so."""
    for index, (mine, its) in enumerate(_pairs(spec.observations, kernel.observations)):
        if mine == its:
            continue
        if spec.outcome != kernel.outcome and not (mine and its):
            return index, None, ""  # one side ended here, and says why
        what = (its or mine or ("", None))[0]
        if mine and its and mine[0] != its[0]:
            return index, Difference(index, what, "name", mine[0], its[0]), ""
        for part, left, right in _parts(mine and mine[1], its and its[1]):
            if left != right:
                # Huge pages can run out, and the kernel may decline to collapse: no spec can know that.
                cut = f"the kernel {right}" if _declined(left, right) else ""
                return index, None if cut else Difference(index, what, part, left, right), cut
    return len(kernel.observations), None, ""


def _declined(spec: object, kernel: object) -> bool:
    """Whether only the kernel could not do something. Why it does not collapse is for nobody to know."""
    if not str(kernel).startswith(COULD_NOT):
        return False
    return not str(spec).startswith(COULD_NOT) or "MADV_COLLAPSE" in str(kernel)


_Observed = tuple[str, object]


def _pairs(
    mine: tuple[_Observed, ...], its: tuple[_Observed, ...]
) -> Iterator[tuple[_Observed | None, _Observed | None]]:
    """Observations side by side; None where one side has no more."""
    for index in range(max(len(mine), len(its))):
        yield (mine[index] if index < len(mine) else None, its[index] if index < len(its) else None)


def _parts(mine: object, its: object) -> Iterator[tuple[str, object, object]]:
    """The parts of two observations side by side."""
    if not (isinstance(mine, dict) and isinstance(its, dict) and "kind" not in its):
        yield "", mine, its
        return
    left, right = cast(dict[str, object], mine), cast(dict[str, object], its)
    for name in left | right:
        yield name, left.get(name), right.get(name)
