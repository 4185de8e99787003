# SPDX-License-Identifier: Apache-2.0
"""Makes plans of recordings: which memory, in which order, what it saves, and whether that pays."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from prefault.errors import UsageError
from prefault.faults.costs import BLOCK, POPULATED, UNTOUCHED, Costs, Given, costs
from prefault.faults.plan import END, Advice, Plan, Prediction, Range
from prefault.faults.recording import Recording
from prefault.faults.syndrome import Kind
from prefault.faults.working_set import LONG, Memslot, WorkingSet, working_set
from prefault.report.units import format_duration, plural, round_size

FEW_BLOCKS = 32
"""Of so many blocks and more, one fault each is no accident."""

PIECE = 32 << 20
"""No range crosses a multiple of this, so that the order of need is kept where memory is touched all over."""

MOST_GRANULE = 1 << 30
"""Larger ones would only map more."""

SLOW_NS = 50e3
"""What fills a table on hardware takes less: KVM was waiting for something."""

USELESS = ("no-guest-memory", "several-vms")
"""Advice with which a plan is of no use, whatever it predicts."""

WORTH_NS = 1e6
"""Less than this is not worth anybody's time."""

Granules = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlanConfig:
    """What is asked for.

    :ivar granule: unit of the ranges in bytes, a multiple of the page size
    :ivar over: ``union``, ``intersection`` or ``N-of-M`` of the runs
    :ivar cap: the most bytes
    :ivar memslots: of the guest; nothing outside of them is planned
    """

    granule: int = 64 << 10
    over: str = "union"
    cap: int | None = None
    memslots: tuple[Memslot, ...] = ()
    given: Given = field(default_factory=Given)

    @property
    def cap_granules(self) -> int | None:
        """The cap in whole granules."""
        return None if self.cap is None else self.cap // self.granule


@dataclass(frozen=True)
class Made:
    """A plan, and what it was made from."""

    plan: Plan
    sets: tuple[WorkingSet, ...]


def needed_runs(over: str, runs: int) -> int:
    """In how many runs memory must be needed to be planned.

    :raises UsageError: ``over`` is none of the forms, or names more runs than there are
    """
    if over in ("union", "intersection"):
        return 1 if over == "union" else runs
    match = re.fullmatch(r"([0-9]+)(?:-of-([0-9]+))?", over)
    if not match:
        raise UsageError(f"--over {over}: is none of union, intersection, N-of-M (2-of-3)")
    least, of = int(match[1]), int(match[2] or runs)
    if of != runs:
        raise UsageError(f"--over {over}: {plural(of, 'run')}, but {plural(runs, 'recording')} given")
    if not 1 <= least <= runs:
        raise UsageError(f"--over {over}: of {plural(runs, 'recording')}, 1 to {runs} can be asked for")
    return least


def make_plan(recordings: Sequence[Recording], config: PlanConfig) -> Made:
    """Make a plan.

    :raises UsageError: the recordings do not fit together, or the config does not fit them
    """
    about = [one.metadata for one in recordings]
    for what in ("architecture", "page_size"):
        values = sorted({str(getattr(one, what)) for one in about})
        if len(values) > 1:
            raise UsageError(f"the recordings are of different hosts: {what} {' and '.join(values)}")
    page_size = about[0].page_size
    if config.granule > MOST_GRANULE:
        raise UsageError(f"--granule {config.granule}: is more than {MOST_GRANULE} (1G), the largest block")
    if config.granule % page_size:
        raise UsageError(f"--granule {config.granule}: is no multiple of the page size, {page_size}")
    if config.cap is not None and config.cap < config.granule:
        raise UsageError(f"--cap {config.cap}: is less than one granule, {config.granule}")
    for slot in config.memslots:
        if slot.ipa % page_size or slot.size % page_size:
            raise UsageError(
                f"--memslot {slot.ipa:#x}:{slot.size}: is not of whole pages of the host, {page_size}"
            )
    least = needed_runs(config.over, len(recordings))
    sets = tuple(working_set(one, config.memslots) for one in recordings)
    plan = _planned(recordings, sets, config, least)
    if plan.ranges and not plan.pays and config.granule > page_size:
        smaller = _planned(recordings, sets, replace(config, granule=page_size), least)
        if smaller.pays:
            plan = replace(plan, advice=(_smaller_pays(smaller), *plan.advice))
    return Made(plan, sets)


def _planned(
    recordings: Sequence[Recording], sets: Sequence[WorkingSet], config: PlanConfig, least: int
) -> Plan:
    granules, need = select([_granules(one, config.granule) for one in sets], least, config.cap_granules)
    return _judged(recordings, sets, tuple(_ranges(granules, need, sets, config)), config)


def _smaller_pays(smaller: Plan) -> Advice:
    told = smaller.prediction
    return Advice(
        "smaller-granule-pays",
        f"with --granule {smaller.granule} it pays: {round_size(smaller.size)} in "
        f"{plural(len(smaller.ranges), 'range')} save {format_duration(told.net_ns)}",
    )


def _granules(one: WorkingSet, granule: int) -> tuple[Granules, Int64]:
    """The granules that a run needs, in order of address, and when first."""
    number = one.page * np.uint64(one.page_size) // np.uint64(granule)
    found, index = np.unique(number, return_inverse=True)
    first = np.full(len(found), np.iinfo(np.int64).max)
    np.minimum.at(first, index, one.first_ns)
    return found, first


def select(
    runs: Sequence[tuple[Granules, Int64]], least: int, most: int | None = None
) -> tuple[Granules, Int64]:
    """Granules that at least ``least`` runs need, the ``most`` earliest of them, in order of address.

    :param runs: of each run, its granules without repetition and when they were first needed
    :returns: granules, and the earliest time at which any run needed them
    """
    everything = np.concatenate([granules for granules, _ in runs])
    times = np.concatenate([need for _, need in runs])
    found, index, count = np.unique(everything, return_inverse=True, return_counts=True)
    need = np.full(len(found), np.iinfo(np.int64).max)
    np.minimum.at(need, index, times)
    keep = count >= least
    found, need = found[keep], need[keep]
    if most is not None and len(found) > most:
        earliest = np.sort(np.lexsort((found, need))[:most])
        found, need = found[earliest], need[earliest]
    return found, need


def coalesce(granules: Granules, need: Int64, granule: int, piece: int = PIECE) -> list[tuple[int, int, int]]:
    """(IPA, size, first need) of runs of adjacent granules, in order of first need.

    :param granules: numbers in order, without repetition
    """
    if not len(granules):
        return []
    per_piece = max(1, piece // granule)
    starts = np.ones(len(granules), np.bool_)
    starts[1:] = (np.diff(granules) != 1) | (granules[1:] % np.uint64(per_piece) == 0)
    begin = np.flatnonzero(starts)
    count = np.diff(np.append(begin, len(granules)))
    first = np.minimum.reduceat(need, begin)
    found = [
        (int(granules[at]) * granule, int(number) * granule, int(when))
        for at, number, when in zip(begin, count, first, strict=True)
    ]
    return sorted(found, key=lambda one: (one[2], one[0]))


def _ranges(granules: Granules, need: Int64, sets: Sequence[WorkingSet], config: PlanConfig) -> list[Range]:
    """In order of first need, which a memslot's boundary may change, each within one memslot."""
    size = sets[0].page_size
    page = np.unique(np.concatenate([one.page for one in sets]))
    written, first = np.zeros(len(page), np.bool_), np.full(len(page), np.iinfo(np.int64).max)
    for one in sets:
        at = np.searchsorted(page, one.page)
        written[at[one.written]] = True
        first[at] = np.minimum(first[at], one.first_ns)
    sums = np.concatenate(([0], np.cumsum(written)))
    found = []
    for ipa, length, needed in coalesce(granules, need, config.granule):
        for start, end in _clipped(ipa, ipa + length, config.memslots):
            low, high = np.searchsorted(page, np.array([start // size, end // size], np.uint64))
            # Of a part of a granule that no run touched, nobody needs anything before the rest of it.
            when = int(first[low:high].min()) if low < high else needed
            found.append(Range(start, end - start, when, int(high - low), int(sums[high] - sums[low])))
    return sorted(found, key=lambda one: (one.first_need_ns, one.ipa))


def _clipped(start: int, end: int, memslots: Sequence[Memslot]) -> Iterator[tuple[int, int]]:
    """The parts of a range that are in memslots; if none are known, all that a guest can have."""
    for slot in sorted(memslots or (Memslot(0, END),), key=lambda slot: slot.ipa):
        low, high = max(start, slot.ipa), min(end, slot.ipa + slot.size)
        if low < high:
            yield low, high


# What it saves.


@dataclass(frozen=True)
class _Saved:
    """What a run would be spared."""

    faults: int
    wait_ns: int
    timed: int
    reads: int
    writes: int


def _judged(
    recordings: Sequence[Recording], sets: Sequence[WorkingSet], ranges: tuple[Range, ...], config: PlanConfig
) -> Plan:
    architecture = recordings[0].metadata.architecture
    saved = [_saved(one, ranges) for one in sets]
    cost = _costs(architecture, config.given, sets, saved)
    prediction = _predicted(sets, saved, ranges, cost)
    plan = Plan(
        architecture=architecture,
        page_size=sets[0].page_size,
        granule=config.granule,
        over=config.over,
        runs=len(recordings),
        ranges=ranges,
        prediction=prediction,
        pays=_worth(prediction),
        cap=config.cap,
        sources=tuple(one.metadata.source for one in recordings),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    untouched = replace(config.given, memory=UNTOUCHED)
    otherwise = _predicted(sets, saved, ranges, _costs(architecture, untouched, sets, saved))
    advice = tuple(_advice(plan, recordings, sets, cost, otherwise))
    useless = any(one.kind in USELESS for one in advice)
    return replace(plan, advice=advice, pays=plan.pays and not useless)


def _worth(told: Prediction) -> bool:
    return told.net_ns > 0 and told.time_saved_ns >= WORTH_NS


def _costs(architecture: str, given: Given, sets: Sequence[WorkingSet], saved: Sequence[_Saved]) -> Costs:
    """By the durations of what would be saved; if nothing would be, of all."""
    timed, wait = sum(one.timed for one in saved), sum(one.wait_ns for one in saved)
    if not timed:
        timed, wait = sum(one.memory_timed for one in sets), sum(one.memory_wait_ns for one in sets)
    reads, writes = sum(one.reads for one in saved), sum(one.writes for one in saved)
    return costs(architecture, given, reads, writes, wait / timed if timed else None)


def _predicted(
    sets: Sequence[WorkingSet], saved: Sequence[_Saved], ranges: Sequence[Range], cost: Costs
) -> Prediction:
    """What a run comes to, on average."""
    runs = len(sets)
    faults_saved = sum(one.faults for one in saved) / runs
    leaves = _leaves(ranges, cost, sets[0].page_size)
    return Prediction(
        faults=sum(one.memory_faults for one in sets) / runs,
        faults_ns=_cost_of_all(sets, cost) / runs,
        faults_saved=faults_saved,
        fault_ns=cost.fault,
        time_saved_ns=faults_saved * cost.fault,
        prefault_page_ns=cost.prefault,
        prefault_ns=leaves * cost.prefault + len(ranges) * cost.call,
        permission_ns=sum(one.writes for one in saved) / runs * cost.permission,
        costs=cost.source,
        memory=cost.memory,
    )


def _cost_of_all(sets: Sequence[WorkingSet], cost: Costs) -> float:
    """As recorded; what has no duration, or if costs are given, at the cost of one."""
    faults, timed = sum(one.memory_faults for one in sets), sum(one.memory_timed for one in sets)
    if cost.source != "recording":
        return faults * cost.fault
    return sum(one.memory_wait_ns for one in sets) + (faults - timed) * cost.fault


def covered(page: npt.NDArray[np.uint64], size: int, ranges: Sequence[Range]) -> npt.NDArray[np.bool_]:
    """Whether each page is in one of the ranges, which do not overlap."""
    ordered = sorted((one.ipa // size, (one.ipa + one.size) // size) for one in ranges)
    if not ordered:
        return np.zeros(len(page), np.bool_)
    begin, end = (np.array(column, np.uint64) for column in zip(*ordered, strict=True))
    index = np.searchsorted(begin, page, side="right") - 1
    found: npt.NDArray[np.bool_] = (index >= 0) & (page < end[np.maximum(index, 0)])
    return found


def _saved(one: WorkingSet, ranges: Sequence[Range]) -> _Saved:
    in_plan = covered(one.page, one.page_size, ranges)
    writes = int(np.count_nonzero(one.written & in_plan))
    return _Saved(
        faults=int(one.faults[in_plan].sum()),
        wait_ns=int(one.wait_ns[in_plan].sum()),
        timed=int(one.timed[in_plan].sum()),
        reads=int(np.count_nonzero(in_plan)) - writes,
        writes=writes,
    )


def _leaves(ranges: Sequence[Range], cost: Costs, page_size: int) -> int:
    """Pages to map, or blocks of huge pages."""
    if not cost.block:
        return sum(one.size for one in ranges) // page_size
    blocks: set[int] = set()
    for one in ranges:
        blocks.update(range(one.ipa // BLOCK, -(-(one.ipa + one.size) // BLOCK)))
    return len(blocks)


# What to make of it.


def _advice(
    plan: Plan,
    recordings: Sequence[Recording],
    sets: Sequence[WorkingSet],
    cost: Costs,
    otherwise: Prediction,
) -> Iterator[Advice]:
    """What would pay, and what should be known.

    :param otherwise: what it comes to if nobody has touched the memory before
    """
    kinds = np.bincount(np.concatenate([one.faults.kind for one in recordings]), minlength=5)
    total, saved = int(kinds.sum()), plan.prediction
    yield from _about_the_recordings(recordings, sets)
    yield from _about_durations(sets, plan)
    if not plan.ranges:
        yield from _why_nothing(plan, sets, kinds, total)
        return
    if plan.pays and cost.memory == POPULATED and not _worth(otherwise):
        yield Advice(
            "if-not-populated",
            "all of this is for memory that was populated for writing before. If nobody has touched it yet "
            f"(--memory {UNTOUCHED}), pre-faulting alone does not pay: have it populated for writing first "
            "(MADV_POPULATE_WRITE)",
        )
    written = sum(one.written for one in plan.ranges)
    if written and cost.permission:
        yield Advice(
            "populate-for-writing",
            "populate the memory for writing before pre-faulting it (MADV_POPULATE_WRITE): "
            f"{plural(written, 'page')} "
            "of the plan were written first, and what the host has not populated is mapped read-only, so "
            "that each "
            f"of these writes faults again, which costs {format_duration(saved.permission_ns)} in all",
        )
    elif kinds[Kind.PERMISSION] > kinds[Kind.TRANSLATION] // 4:
        yield Advice(
            "populate-for-writing",
            f"{int(kinds[Kind.PERMISSION]):,} permission faults were recorded, which no pre-fault spares: "
            "writes to "
            "memory that was mapped read-only, most often the zero page or a private file. If the memory is "
            "not "
            "shared, populate it for writing (MADV_POPULATE_WRITE) before the guest runs",
        )
    yield from _huge_pages(sets, plan, cost)
    touched = sum(one.pages for one in plan.ranges) * plan.page_size
    if plan.size > 4 * touched and plan.granule > plan.page_size and not cost.block:
        yield Advice(
            "smaller-granule",
            f"the plan maps {round_size(plan.size)} for {round_size(touched)} that were touched; a smaller "
            "--granule "
            "maps less, in more calls",
        )
    if saved.time_saved_ns < WORTH_NS:
        yield Advice(
            "nothing",
            f"leave it: all that pre-faulting could save is {format_duration(saved.time_saved_ns)} of vCPU "
            "time",
        )
    elif not plan.pays and not written:
        yield Advice("nothing", "leave it: pre-faulting costs more than the faults do")


def _about_the_recordings(recordings: Sequence[Recording], sets: Sequence[WorkingSet]) -> Iterator[Advice]:
    lost = sum(one.metadata.lost_events for one in recordings)
    if lost:
        yield Advice(
            "lost-events", f"{plural(lost, 'event')} of the recordings were lost: the guest took more faults"
        )
    yield from _several_vms(recordings)
    beyond = sum(int(np.count_nonzero(one.faults.ipa >= END)) for one in recordings)
    if beyond:
        yield Advice(
            "no-guest-memory",
            f"{plural(beyond, 'fault')} at 2^52 and above, where no guest has memory, are left out: the host "
            "seems to run without nested paging (ept=0, npt=0), so that all addresses are the guest's "
            "virtual ones, and this plan is of no use",
        )
    nested = sum(int(np.count_nonzero(one.faults.nested == 1)) for one in recordings)
    if nested:
        yield Advice(
            "nested-guests",
            f"{plural(nested, 'fault')} of nested guests are left out: KVM fills a nested guest's tables "
            "when it runs, and pre-faulting fills the guest's own. A write to what was mapped read-only, as "
            "the zero page is, makes KVM drop all of the nested ones: have the memory populated for writing "
            "(MADV_POPULATE_WRITE) before pre-faulting it",
        )
    devices = sum(one.devices for one in sets)
    if devices:
        yield Advice(
            "devices",
            f"{plural(devices, 'page')} were taken for devices because they faulted again and again; record "
            "kvm:kvm_mmio, or name the guest's memory with --memslot, to be sure",
        )
    if len(sets) > 1:
        share = _shared(sets)
        if share < 0.5:
            yield Advice(
                "runs-differ",
                f"only {share:.0%} of the pages that any run needed are needed by all of them: what one run "
                "needed tells little about the next",
            )


def _several_vms(recordings: Sequence[Recording]) -> Iterator[Advice]:
    """Addresses of two VMs have nothing to do with each other."""
    for number, one in enumerate(recordings, 1):
        which = f"recording {number}" if len(recordings) > 1 else "the recording"
        pids, count = np.unique(one.faults.pid, return_counts=True)
        processes = int(np.count_nonzero(pids >= 0))
        if processes > 1:
            most = np.argsort(-count, kind="stable")[:5]
            shares = ", ".join(f"{count[at]:,} of {pids[at] if pids[at] >= 0 else 'unknown'}" for at in most)
            yield Advice(
                "several-vms",
                f"{which} has faults of {processes} processes ({shares}), each with memory of its own, which "
                "this plan throws together: plan for one of them with --pid",
            )
        if processes == len(pids) or processes > 1:
            continue
        known = one.faults.vcpu >= 0
        vcpu, tid = one.faults.vcpu[known].astype(np.int64), one.faults.tid[known].astype(np.int64)
        threads = len(np.unique(vcpu << 32 | tid))
        if threads > len(np.unique(vcpu)):
            yield Advice(
                "several-vms",
                f"{which} has {threads} vCPU threads for {plural(len(np.unique(vcpu)), 'vCPU number')}: it "
                "seems to be of several VMs, which this plan throws together; record the threads of one "
                "(prefault record --pid, trace-cmd record -P, perf record -p)",
            )


def _shared(sets: Sequence[WorkingSet]) -> float:
    everything, count = np.unique(np.concatenate([one.page for one in sets]), return_counts=True)
    return float(np.count_nonzero(count == len(sets)) / len(everything)) if len(everything) else 1.0


def _about_durations(sets: Sequence[WorkingSet], plan: Plan) -> Iterator[Advice]:
    """Faults that waited for something else than a table."""
    long = sum(one.long for one in sets)
    if long:
        yield Advice(
            "long-faults",
            f"{plural(long, 'fault')} took more than {LONG} times what most took, and "
            f"{'counts' if long == 1 else 'count'} as no more: a vCPU was stopped meanwhile, or the host "
            "waited",
        )
    slow = max((one.median_ns for one in sets), default=0.0)
    if slow > SLOW_NS and plan.ranges:
        yield Advice(
            "slow-faults",
            f"a fault took {format_duration(slow)}, much more than filling a table does: if the host was "
            "bringing the memory (from a disk, over the network, by a userfaultfd handler), pre-faulting "
            "waits for that, too, and costs more than is said here",
        )


def _why_nothing(
    plan: Plan, sets: Sequence[WorkingSet], kinds: npt.NDArray[np.int64], total: int
) -> Iterator[Advice]:
    if not total:
        yield Advice("nothing", "leave it: no fault was recorded. Record while the guest starts or resumes")
        return
    if any(len(one.page) for one in sets):
        yield Advice(
            "nothing", f"leave it: no memory was needed in as many of the runs as asked for ({plan.over})"
        )
        return
    most = Kind(int(np.argmax(kinds)))
    if most == Kind.PERMISSION:
        yield Advice(
            "populate-for-writing",
            f"no fault of {total:,} could be spared by pre-faulting; most are permission faults: memory was "
            "mapped, but the host wanted to see the first write. Populate it for writing "
            "(MADV_POPULATE_WRITE), and leave dirty logging off until it is needed",
        )
        return
    what = {
        Kind.MMIO: "accesses to devices, which are never mapped",
        Kind.ACCESS_FLAG: "access-flag faults: the host was looking for idle memory",
    }.get(most, "on what was taken for devices, or of nested guests")
    yield Advice("nothing", f"leave it: no fault of {total:,} could be spared; most are {what}")


def _huge_pages(sets: Sequence[WorkingSet], plan: Plan, cost: Costs) -> Iterator[Advice]:
    """Blocks that are touched densely would be one fault each."""
    page = np.unique(np.concatenate([one.page for one in sets]))
    per_block = BLOCK // plan.page_size
    if per_block < 8:
        return
    _, count = np.unique(page // np.uint64(per_block), return_counts=True)
    if len(count) >= FEW_BLOCKS and np.count_nonzero(count == 1) > 0.9 * len(count) and not cost.block:
        yield Advice(
            "may-be-huge",
            f"of {plural(len(count), 'block')} of 2 MiB, nearly each was touched once: if the guest's memory "
            "is of huge pages, give --memory thp/write (or hugetlb/write) and --granule 2M",
        )
    dense = count >= per_block // 2
    inside, blocks = int(count[dense].sum()), int(np.count_nonzero(dense))
    if inside * 2 > len(page):
        yield Advice(
            "huge-pages",
            f"{inside:,} of {len(page):,} touched pages lie in {plural(blocks, 'block')} of 2 MiB that are "
            "touched at "
            f"least by half: with huge pages (hugetlb, or THP) these would be {plural(blocks, 'fault')} in "
            "place of "
            f"{inside:,}, with or without pre-faulting",
        )
