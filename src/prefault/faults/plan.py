# SPDX-License-Identifier: Apache-2.0
"""A plan: what to pre-fault, in which order, and what that is predicted to save.

Its file is JSON; docs/plan.md documents it and ``plan.schema.json`` beside this file is its JSON Schema. This
module needs only the standard library, so that a VMM can take it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefault.errors import UsageError
from prefault.faults.foreign import check_page_size, known, loads

FORMAT = "prefault-plan"
VERSION = 1
"""Raised when a field changes its meaning or goes away, not when one is added."""

MOST_BYTES = 64 << 20
"""Of a plan's file, hundreds of thousands of ranges: /dev/zero and the like have no end."""

END = 1 << 52
"""No guest has memory from here on: arm64 has no more bits of IPA, x86 none of physical address."""


@dataclass(frozen=True)
class Range:
    """One piece of guest memory.

    :ivar ipa: first byte, a multiple of the plan's granule or the start of a memslot
    :ivar size: in bytes
    :ivar first_need_ns: when the guest first needed some of it, from the recording's start
    :ivar pages: pages of it that the guest touched
    :ivar written: those that it wrote first
    """

    ipa: int
    size: int
    first_need_ns: int
    pages: int
    written: int


@dataclass(frozen=True)
class Prediction:
    """For one run like those recorded; times are vCPU time, in ns.

    :ivar faults: translation faults on memory that a run takes
    :ivar faults_ns: what they cost
    :ivar faults_saved: those that it will not take
    :ivar fault_ns: what one of these costs, on average
    :ivar time_saved_ns: what all of them cost
    :ivar prefault_page_ns: what pre-faulting a page (a block, of huge pages) costs
    :ivar prefault_ns: what all of it costs
    :ivar permission_ns: what writes cost that fault again because memory was not populated for writing
    :ivar costs: where they are from: ``recording``, ``given`` or ``estimate``
    :ivar memory: backing and state that the costs are for, ``private/write``
    """

    faults: float
    faults_ns: float
    faults_saved: float
    fault_ns: float
    time_saved_ns: float
    prefault_page_ns: float
    prefault_ns: float
    permission_ns: float
    costs: str
    memory: str

    @property
    def net_ns(self) -> float:
        """What is left of the time saved."""
        return self.time_saved_ns - self.prefault_ns - self.permission_ns


@dataclass(frozen=True)
class Advice:
    """Something to do, or to know.

    :ivar kind: one word, for programs
    :ivar text: for people
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Plan:
    """What to pre-fault.

    :ivar granule: unit of the ranges, in bytes
    :ivar over: which memory was taken: ``union``, ``intersection``, or ``2-of-3`` runs
    :ivar cap: the most bytes that were asked for; None for all
    :ivar ranges: in order of first need; none overlaps another
    :ivar pays: whether pre-faulting it is predicted to save time
    """

    architecture: str
    page_size: int
    granule: int
    over: str
    runs: int
    ranges: tuple[Range, ...]
    prediction: Prediction
    pays: bool
    cap: int | None = None
    advice: tuple[Advice, ...] = ()
    sources: tuple[str, ...] = ()
    made: str = ""

    @property
    def size(self) -> int:
        """Bytes of all ranges."""
        return sum(one.size for one in self.ranges)

    def to_json(self) -> dict[str, Any]:
        """As JSON types, in the documented form."""
        values = asdict(self)
        values["prediction"]["net_ns"] = self.prediction.net_ns
        return {"format": FORMAT, "version": VERSION, **values, "bytes": self.size}


def dumps(plan: Plan) -> str:
    """The text of a plan's file: a line for each range.

    :raises UsageError: nobody could load() it, being so large
    """
    values = plan.to_json()
    ranges = values.pop("ranges")
    head = json.dumps(values, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(one)}" for one in ranges)
    text = f'{head},\n "ranges": [\n{lines}\n ]\n}}\n' if ranges else f'{head},\n "ranges": []\n}}\n'
    if len(text) > MOST_BYTES:
        raise UsageError(
            f"a plan of {len(ranges)} ranges is larger than the {MOST_BYTES >> 20} MiB that are read of one; "
            "with a larger --granule it is smaller"
        )
    return text


def load(path: Path) -> Plan:
    """Read a plan.

    :raises UsageError: it cannot be read, or is none
    """
    try:
        with path.open("rb") as file:  # perhaps a pipe, whose size nobody knows
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise UsageError(
                f"{path}: no plan: it has more than {MOST_BYTES >> 20} MiB; "
                "with a larger --granule a plan is smaller"
            )
        values = loads(text)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no plan: {error}") from error
    return from_json(values, str(path))


def from_json(values: object, name: str = "the plan") -> Plan:
    """A plan from JSON types; fields that are not known are passed over.

    :raises UsageError: it is no plan, or its ranges cannot be
    """
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UsageError(f"{name}: no plan: its 'format' is not {FORMAT!r}; `prefault plan` makes plans")
    if not isinstance(values.get("version"), int) or not 1 <= values["version"] <= VERSION:
        raise UsageError(f"{name}: of version {values.get('version')}; this prefault reads {VERSION}")
    try:
        plan = Plan(
            **{
                **known(Plan, values),
                "ranges": tuple(Range(**known(Range, one)) for one in _list(values, "ranges")),
                "prediction": Prediction(**known(Prediction, values["prediction"])),
                "advice": tuple(Advice(**known(Advice, one)) for one in _list(values, "advice")),
                "sources": tuple(str(one) for one in _list(values, "sources")),
            }
        )
    except TypeError as error:
        raise UsageError(f"{name}: no whole plan: {error}") from error
    _check(plan, name)
    return plan


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    found = values.get(name, [])
    if not isinstance(found, list):
        raise TypeError(f"{name!r} is no list")
    return found


def _check(plan: Plan, name: str) -> None:
    page = plan.page_size
    try:
        check_page_size(page)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    end = -1
    for one in sorted(plan.ranges, key=lambda one: one.ipa):
        where = f"{name}: the range at {one.ipa:#x} of {one.size:#x} bytes"
        if one.ipa < 0 or one.size <= 0 or one.ipa % page or one.size % page:
            raise UsageError(f"{where} is not of whole pages of {page}")
        if one.ipa + one.size > END:
            raise UsageError(f"{where} ends beyond 2^52, where no guest has memory")
        if one.ipa < end:
            raise UsageError(f"{where} overlaps another")
        end = one.ipa + one.size
