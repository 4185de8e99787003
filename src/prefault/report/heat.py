# SPDX-License-Identifier: Apache-2.0
"""A recording in bins: faults over time and IPA, by vCPU and kind; small however many faults there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prefault.faults.plan import END, Plan, Range
from prefault.faults.planning import covered
from prefault.faults.recording import Recording
from prefault.faults.syndrome import Kind
from prefault.faults.working_set import WorkingSet

COLUMNS, ROWS = 200, 160
MOST_CELLS = 30_000
"""Of a grid; one with more is made coarser."""
MOST_VCPUS = 16
"""Those with the most faults; all others are one."""

KIND_GROUPS = ("not mapped", "write to read-only", "device", "other")
_GROUP_OF = np.array([0, 1, 3, 2, 3])
"""Of each ``Kind``, unless the plan knows better."""
_DEVICE, _OTHER = 2, 3

LEAST_NS = 1000
"""Of the time axis: a trace's clock often tells no less, and a single fault has no length."""

_CUT_SHARE = 0.99
"""Where so many of the faults come in the first quarter of the time, the axis ends there."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Grid:
    """Faults by time and memory.

    :ivar columns: of the time axis
    :ivar row_bytes: of guest memory in a row
    :ivar rows: IPA of each row, ascending; memory without a fault has none
    :ivar in_plan: of each row, how much the plan covers, 0 to 1
    :ivar cells: column, row, vCPU, kind group, faults, and µs of known duration, of each cell that has faults
    """

    columns: int
    row_bytes: int
    rows: list[int]
    in_plan: list[float]
    cells: tuple[list[int], list[int], list[int], list[int], list[int], list[int]]


@dataclass(frozen=True)
class Heat:
    """One recording.

    :ivar name: of the recording
    :ivar end_ns: what the time axis goes to, from the first fault
    :ivar last_ns: when the last fault came; the last column has those beyond the axis
    :ivar vcpus: their names
    :ivar all: all vCPUs together, as number 0
    :ivar by_vcpu: each by itself; it may be coarser
    :ivar working_set: pages that were needed by the end of each of COLUMNS columns
    :ivar planned: those of them that are in the plan
    """

    name: str
    end_ns: int
    last_ns: int
    page_bytes: int
    vcpus: list[str]
    all: Grid
    by_vcpu: Grid
    working_set: list[int]
    planned: list[int]


def heat(recording: Recording, needed: WorkingSet, plan: Plan, name: str) -> Heat | None:
    """Put a recording into bins; None if it has no fault."""
    if not len(recording):
        return None
    faults = recording.faults
    since = faults.time_ns - faults.time_ns[0]
    end = _end(since)
    names, vcpu = _vcpus(recording)
    column = np.minimum(since * COLUMNS // end, COLUMNS - 1)
    dense = _dense(recording, column, vcpu, len(names), groups(recording, needed))
    first = np.minimum(needed.first_ns * COLUMNS // end, COLUMNS - 1)
    in_plan = covered(needed.page, needed.page_size, plan.ranges)
    return Heat(
        name=name,
        end_ns=int(end),
        last_ns=int(since[-1]),
        page_bytes=needed.page_size,
        vcpus=names,
        all=_grid(dense.summed(), plan),
        by_vcpu=_grid(dense, plan),
        working_set=np.cumsum(np.bincount(first, minlength=COLUMNS)).tolist(),
        planned=np.cumsum(np.bincount(first[in_plan], minlength=COLUMNS)).tolist(),
    )


@dataclass(frozen=True)
class _Dense:
    """All cells, those without faults as well: by column, row, vCPU and kind group.

    :ivar rows: IPA of each row, shifted right by ``shift``
    """

    count: Int64
    wait: npt.NDArray[np.float64]
    rows: npt.NDArray[np.uint64]
    shift: int

    def summed(self) -> _Dense:
        """All vCPUs as one."""
        count, wait = (one.sum(axis=2, keepdims=True) for one in (self.count, self.wait))
        return _Dense(count, wait, self.rows, self.shift)

    def coarser(self) -> _Dense:
        """Half as many columns and rows, or about that."""
        rows, first = np.unique(self.rows >> np.uint64(1), return_index=True)
        pairs = np.arange(0, self.count.shape[0], 2)
        count, wait = (
            np.add.reduceat(np.add.reduceat(one, pairs, axis=0), first, axis=1)
            for one in (self.count, self.wait)
        )
        return _Dense(count, wait, rows, self.shift + 1)


def groups(recording: Recording, needed: WorkingSet) -> Int64:
    """Of each fault the number in KIND_GROUPS; "not mapped" are those that the plan counts, and no others."""
    faults = recording.faults
    found: Int64 = _GROUP_OF[faults.kind]
    apart = (faults.kind == Kind.TRANSLATION) & ~_on_memory(recording, needed)
    ours = (faults.nested != 1) & (faults.ipa < np.uint64(END))
    found[apart] = np.where(ours[apart], _DEVICE, _OTHER)
    return found


def _on_memory(recording: Recording, needed: WorkingSet) -> npt.NDArray[np.bool_]:
    """Whether each fault is a translation fault on what the plan takes for memory."""
    faults = recording.faults
    found = np.isin(faults.ipa // np.uint64(needed.page_size), needed.page)
    found &= (faults.kind == Kind.TRANSLATION) & (faults.nested != 1)
    return found


def _dense(recording: Recording, column: Int64, vcpu: Int64, vcpus: int, group: Int64) -> _Dense:
    faults = recording.faults
    rows, shift = _rows(faults.ipa, recording.metadata.page_size)
    row = np.searchsorted(rows, faults.ipa >> np.uint64(shift))
    shape = (COLUMNS, len(rows), vcpus, len(KIND_GROUPS))
    key = np.ravel_multi_index((column, row, vcpu, group), shape)
    size = int(np.prod(shape))
    count = np.bincount(key, minlength=size).reshape(shape)
    known = np.maximum(faults.duration_ns, 0)
    wait = np.bincount(key, known, minlength=size).reshape(shape).astype(np.float64)
    return _Dense(count, wait, rows, shift)


def _grid(dense: _Dense, plan: Plan) -> Grid:
    while np.count_nonzero(dense.count) > MOST_CELLS and dense.count.shape[:2] != (1, 1):
        dense = dense.coarser()
    at = np.nonzero(dense.count)
    column, row, vcpu, group = (one.tolist() for one in at)
    wait = np.rint(dense.wait[at] / 1000).astype(np.int64).tolist()
    return Grid(
        columns=dense.count.shape[0],
        row_bytes=1 << dense.shift,
        rows=[int(one) << dense.shift for one in dense.rows],
        in_plan=_shares(dense.rows, dense.shift, plan.ranges),
        cells=(column, row, vcpu, group, dense.count[at].tolist(), wait),
    )


def _end(since: Int64) -> int:
    """Where the time axis ends."""
    last = int(since[-1])
    most = int(since[int(len(since) * _CUT_SHARE)])
    return max(LEAST_NS, (most * 11 // 10 if most * 4 < last else last) + 1)


def _rows(ipa: npt.NDArray[np.uint64], page_size: int) -> tuple[npt.NDArray[np.uint64], int]:
    """The rows that have faults, no more than ROWS, and the bits of an address within a row."""
    shift = page_size.bit_length() - 1
    rows = np.unique(ipa >> np.uint64(shift))
    while len(rows) > ROWS:
        rows = np.unique(rows >> np.uint64(1))
        shift += 1
    return rows, shift


def _vcpus(recording: Recording) -> tuple[list[str], Int64]:
    """Names, and the number in them of each fault's vCPU."""
    of_fault = recording.vcpu_labels()
    labels = np.unique(of_fault)
    index = np.searchsorted(labels, of_fault)
    names = names_of(labels, recording)
    if len(labels) <= MOST_VCPUS:
        return names, index
    count = np.bincount(index)
    kept = np.sort(np.argsort(-count, kind="stable")[: MOST_VCPUS - 1])
    renumbered = np.full(len(labels), len(kept))
    renumbered[kept] = np.arange(len(kept))
    return [*(names[one] for one in kept), f"{len(labels) - len(kept)} others"], renumbered[index]


def names_of(labels: Int64, recording: Recording) -> list[str]:
    """Names of vCPUs; the same number in several VMs is one."""
    names = [label_of(int(one), recording) for one in labels]
    if len(np.unique(recording.faults.pid)) > 1:
        names = [name if name.startswith("thread") else f"{name}, all VMs" for name in names]
    return names


def label_of(label: int, recording: Recording) -> str:
    """A vCPU's name; ``label`` is of ``Recording.vcpu_labels``."""
    if label >= 0:
        return f"vCPU {label}"
    _, name = recording.metadata.threads.get(-label, (0, ""))
    return f"thread {-label}" + (f" ({name})" if name else "")


def _shares(numbers: npt.NDArray[np.uint64], shift: int, ranges: Sequence[Range]) -> list[float]:
    """How much of each row is in the ranges."""
    size = 1 << shift
    shares = dict.fromkeys((int(one) for one in numbers), 0)
    for one in ranges:
        for number in range(one.ipa >> shift, -(-(one.ipa + one.size) // size)):
            if number in shares:
                low, high = max(one.ipa, number * size), min(one.ipa + one.size, (number + 1) * size)
                shares[number] += high - low
    return [round(shares[int(one)] / size, 3) for one in numbers]


@dataclass(frozen=True)
class Region:
    """Part of guest memory, with what it cost."""

    ipa: int
    size: int
    faults: int
    wait_ns: int
    pages: int
    planned: int


REGION = 2 << 20


def regions(recording: Recording, needed: WorkingSet, plan: Plan, most: int = 12) -> list[Region]:
    """The parts of 2 MiB with the most translation faults on memory, which is what the plan takes for it."""
    faults, size = recording.faults, recording.metadata.page_size
    memory = faults.take(_on_memory(recording, needed))
    of_fault = memory.ipa // np.uint64(REGION)
    number = np.unique(of_fault)
    index = np.searchsorted(number, of_fault)
    count = np.bincount(index, minlength=len(number))
    wait = np.bincount(index, np.maximum(memory.duration_ns, 0), minlength=len(number))
    page = np.unique(memory.ipa // np.uint64(size))
    of_page = page * np.uint64(size) // np.uint64(REGION)
    in_plan = covered(page, size, plan.ranges)
    pages = np.bincount(np.searchsorted(number, of_page), minlength=len(number))
    planned = np.bincount(np.searchsorted(number, of_page[in_plan]), minlength=len(number))
    order = np.argsort(-count, kind="stable")[:most]
    return [
        Region(
            int(number[one]) * REGION,
            REGION,
            int(count[one]),
            int(wait[one]),
            int(pages[one]),
            int(planned[one]),
        )
        for one in order
    ]
