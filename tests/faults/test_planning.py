# SPDX-License-Identifier: Apache-2.0
"""Plans: what is covered, in which order, what that saves, and what is said of it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import UsageError
from prefault.faults.costs import CALL, Given, figures
from prefault.faults.plan import Plan
from prefault.faults.planning import PIECE, PlanConfig, coalesce, make_plan, needed_runs
from prefault.faults.recording import Recording
from prefault.faults.syndrome import Access, Kind
from prefault.faults.working_set import DEVICE_FAULTS, Memslot, working_set
from prefault.report.plan import verdict
from tests.faults.recordings import PAGE, RECORDINGS, Fault, recording_of

GRANULES = st.sampled_from([4 << 10, 64 << 10, 2 << 20])
SEVERAL = st.lists(RECORDINGS, min_size=1, max_size=3)


def plan_of(*recordings: Recording, **config: object) -> Plan:
    return make_plan(recordings, PlanConfig(**config)).plan  # type: ignore[arg-type]


def granules_of(plan: Plan) -> set[int]:
    """The granules that a plan covers."""
    return {
        number
        for one in plan.ranges
        for number in range(one.ipa // plan.granule, (one.ipa + one.size) // plan.granule)
    }


def needed(recording: Recording, granule: int) -> dict[int, int]:
    """Granule → when a run first needed it, the slow way. Translation faults on memory, and none of an L2."""
    found: dict[int, int] = {}
    faults = recording.faults
    told = Kind.MMIO in faults.kind.tolist()
    start = int(faults.time_ns[0]) if len(faults) else 0
    counts = dict(zip(*(one.tolist() for one in np.unique(faults.ipa, return_counts=True)), strict=True))
    for index in range(len(faults)):
        ipa = int(faults.ipa[index])
        if faults.kind[index] != Kind.TRANSLATION or faults.nested[index] == 1:
            continue
        assert told or counts[ipa] < DEVICE_FAULTS, "this test has no devices"
        when = int(faults.time_ns[index]) - start
        found[ipa // granule] = min(when, found.get(ipa // granule, when))
    return found


@given(SEVERAL, GRANULES)
def test_a_union_covers_exactly_what_any_run_needed(runs: Sequence[Recording], granule: int) -> None:
    plan = plan_of(*runs, granule=granule)
    assert granules_of(plan) == set().union(*(needed(one, granule) for one in runs))
    assert plan.size == len(granules_of(plan)) * granule  # nothing twice


@given(SEVERAL, GRANULES)
def test_an_intersection_covers_exactly_what_all_runs_needed(runs: Sequence[Recording], granule: int) -> None:
    plan = plan_of(*runs, granule=granule, over="intersection")
    assert granules_of(plan) == set.intersection(*(set(needed(one, granule)) for one in runs))


@given(SEVERAL, GRANULES)
def test_n_of_m_lies_between_union_and_intersection(runs: Sequence[Recording], granule: int) -> None:
    forms = [f"{number}-of-{len(runs)}" for number in range(1, len(runs) + 1)]
    covered = [granules_of(plan_of(*runs, granule=granule, over=form)) for form in forms]
    assert covered[0] == granules_of(plan_of(*runs, granule=granule, over="union"))
    assert covered[-1] == granules_of(plan_of(*runs, granule=granule, over="intersection"))
    assert all(more >= fewer for more, fewer in itertools.pairwise(covered))


@given(RECORDINGS, GRANULES)
def test_the_same_run_twice_is_that_run(run: Recording, granule: int) -> None:
    for over in ("union", "intersection"):
        assert plan_of(run, run, granule=granule, over=over).ranges == plan_of(run, granule=granule).ranges


@given(SEVERAL)
def test_the_order_of_the_runs_does_not_matter(runs: Sequence[Recording]) -> None:
    assert plan_of(*runs).ranges == plan_of(*reversed(runs)).ranges


@given(SEVERAL, GRANULES)
def test_ranges_come_in_order_of_first_need(runs: Sequence[Recording], granule: int) -> None:
    plan = plan_of(*runs, granule=granule)
    whens = [needed(one, granule) for one in runs]
    for one in plan.ranges:
        inside = range(one.ipa // granule, (one.ipa + one.size) // granule)
        assert one.first_need_ns == min(when[number] for when in whens for number in inside if number in when)
    order = [one.first_need_ns for one in plan.ranges]
    assert order == sorted(order)


@given(SEVERAL, GRANULES, st.integers(1, 8))
def test_a_cap_keeps_what_is_needed_first(runs: Sequence[Recording], granule: int, most: int) -> None:
    whole, capped = plan_of(*runs, granule=granule), plan_of(*runs, granule=granule, cap=most * granule)
    assert capped.size <= most * granule
    assert capped.size == min(whole.size, most * granule)
    when: dict[int, int] = {}
    for one in runs:
        for number, at in needed(one, granule).items():
            when[number] = min(at, when.get(number, at))
    kept = granules_of(capped)
    left = set(when) - kept
    if kept and left:
        assert max(when[number] for number in kept) <= min(when[number] for number in left)


def test_a_cap_prefers_need_to_address() -> None:
    run = recording_of([Fault(900, 0), Fault(5, 10), Fault(400, 20)])
    assert [one.ipa // PAGE for one in plan_of(run, granule=PAGE, cap=2 * PAGE).ranges] == [900, 5]


@given(st.sets(st.integers(0, 3000), max_size=60), GRANULES)
def test_ranges_are_as_long_as_they_can_be(numbers: set[int], granule: int) -> None:
    ordered = np.array(sorted(numbers), np.uint64)
    found = coalesce(ordered, np.arange(len(ordered)), granule)
    covered = [ipa // granule + at for ipa, size, _ in found for at in range(size // granule)]
    assert sorted(covered) == sorted(numbers)
    for ipa, size, _ in found:
        assert ipa // PIECE == (ipa + size - 1) // PIECE
        end = ipa + size
        assert end % PIECE == 0 or end // granule not in numbers


@given(RECORDINGS, st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=3))
def test_nothing_outside_of_the_memslots_is_planned(run: Recording, parts: list[tuple[int, int]]) -> None:
    slots = [Memslot(number * 64 * PAGE, pages * PAGE) for number, pages in dict(parts).items()]
    if not slots:
        return
    plan = plan_of(run, granule=64 << 10, memslots=tuple(slots))
    for one in plan.ranges:
        assert any(slot.ipa <= one.ipa and one.ipa + one.size <= slot.ipa + slot.size for slot in slots)
    touched = {
        int(ipa)
        for ipa, kind, nested in zip(run.faults.ipa, run.faults.kind, run.faults.nested, strict=True)
        if kind == Kind.TRANSLATION
        and nested != 1
        and any(0 <= int(ipa) - slot.ipa < slot.size for slot in slots)
    }
    assert all(any(one.ipa <= ipa < one.ipa + one.size for one in plan.ranges) for ipa in touched)
    assert sum(one.pages for one in plan.ranges) == len(touched)


@given(SEVERAL, GRANULES)
def test_no_more_faults_are_saved_than_were_taken(runs: Sequence[Recording], granule: int) -> None:
    told = plan_of(*runs, granule=granule).prediction
    assert 0 <= told.faults_saved <= told.faults


# What is spared.


def saved(*faults: Fault) -> int:
    return int(working_set(recording_of(faults)).faults.sum())


def test_each_page_is_spared_its_first_fault() -> None:
    assert saved(Fault(1, 0), Fault(2, 10), Fault(3, 20)) == 3


def test_a_fault_after_the_host_took_the_page_away_is_not_spared() -> None:
    assert saved(Fault(1, 0), Fault(2, 10), Fault(1, 1000)) == 2


def test_repetitions_and_faults_of_other_vcpus_meanwhile_are_spared() -> None:
    assert saved(Fault(1, 0), Fault(1, 10), Fault(1, 20)) == 3
    assert saved(Fault(1, 0, duration=50, tid=1), Fault(1, 40, tid=2)) == 2
    assert saved(Fault(1, 0, duration=50, tid=1), Fault(1, 60, tid=2)) == 1


def test_the_fault_behind_a_broken_copy_on_write_is_not_spared() -> None:
    write = Fault(1, 10, kind=Kind.PERMISSION, access=Access.WRITE)
    assert saved(Fault(1, 0), write, Fault(1, 20, access=Access.WRITE)) == 1


def test_devices_permission_faults_and_l2_faults_are_not_spared() -> None:
    assert saved(Fault(1, kind=Kind.MMIO), Fault(2, kind=Kind.PERMISSION), Fault(3, nested=1)) == 0


def test_what_faults_again_and_again_is_a_device() -> None:
    polled = [Fault(9, 10 * time) for time in range(DEVICE_FAULTS)]
    found = working_set(recording_of([*polled, Fault(1, 5)]))
    assert (found.page.tolist(), found.devices) == ([1], 1)


@pytest.mark.parametrize(
    "why",
    [
        Fault(9, 1, kind=Kind.PERMISSION),
        Fault(9, 1, access=Access.EXECUTE),
        Fault(8, 1, kind=Kind.MMIO),
    ],
    ids=["was mapped", "was executed", "the trace tells devices"],
)
def test_but_not_if_something_speaks_for_memory(why: Fault) -> None:
    found = working_set(recording_of([why, *(Fault(9, 10 * time) for time in range(DEVICE_FAULTS))]))
    assert (found.page.tolist(), found.devices) == ([9], 0)


# Costs and verdicts.


def test_all_faults_cost_what_was_recorded_and_those_without_a_duration_the_average() -> None:
    faults = [Fault(1, 0, 100), Fault(2, 10, 300), Fault(1, 1000, 1000), Fault(2, 2000)]
    told = plan_of(recording_of(faults), granule=PAGE).prediction
    assert (told.faults, told.faults_saved, told.fault_ns) == (4, 2, 200)
    assert (told.faults_ns, told.time_saved_ns) == (100 + 300 + 1000 + 200, 400)


def guest(pages: int, *, access: Access = Access.READ, duration: int = 5000, spread: int = 100) -> Recording:
    return recording_of(
        [Fault(spread * page, 10_000 * page, duration, access=access) for page in range(pages)]
    )


def test_time_saved_is_what_the_recorded_faults_took() -> None:
    told = plan_of(guest(1000), granule=PAGE).prediction
    assert (told.faults, told.faults_saved, told.fault_ns) == (1000, 1000, 5000)
    assert (told.time_saved_ns, told.costs) == (5_000_000, "recording")
    one = figures("aarch64", "private/write")
    assert told.prefault_page_ns == pytest.approx(5000 * one.prefault / one.read)


def test_costs_that_are_given_count() -> None:
    plan = plan_of(guest(1000), granule=PAGE, given=Given(fault=100, prefault=10_000))
    assert (plan.prediction.time_saved_ns, plan.prediction.prefault_ns) == (100_000, 10_000_000)
    assert not plan.pays


def test_without_durations_costs_are_estimated_and_said_to_be() -> None:
    told = plan_of(guest(1000, duration=-1), granule=PAGE).prediction
    assert (told.costs, told.fault_ns) == ("estimate", figures("aarch64", "private/write").read)


def advice(plan: Plan) -> set[str]:
    return {one.kind for one in plan.advice}


def test_a_resident_guest_pays() -> None:
    plan = plan_of(guest(1000), granule=PAGE)
    assert plan.pays
    assert advice(plan) == set()


def test_writes_to_memory_that_is_not_populated_do_not_pay_and_populating_is_advised() -> None:
    plan = plan_of(guest(1000, access=Access.WRITE), granule=PAGE, given=Given("private/nothing"))
    assert not plan.pays
    assert plan.prediction.permission_ns > plan.prediction.time_saved_ns
    assert "populate-for-writing" in advice(plan)


def test_x86_saves_a_fifth_and_no_more() -> None:
    faults = [Fault(page, 10_000 * page, 5000) for page in range(1000)]
    plan = plan_of(recording_of(faults, "x86_64"), granule=PAGE)
    assert plan.pays
    assert plan.prediction.net_ns / plan.prediction.time_saved_ns == pytest.approx(1 - 2407 / 3059, rel=0.01)


def test_each_range_costs_a_call() -> None:
    together = plan_of(recording_of([Fault(page, page, 5000) for page in range(1000)]), granule=PAGE)
    apart = plan_of(recording_of([Fault(2 * page, page, 5000) for page in range(1000)]), granule=PAGE)
    assert (len(together.ranges), len(apart.ranges)) == (1, 1000)
    assert together.prediction.prefault_page_ns == apart.prediction.prefault_page_ns
    more = apart.prediction.prefault_ns - together.prediction.prefault_ns
    assert more == pytest.approx(999 * CALL * 5000 / figures("aarch64", "private/write").read)


def test_a_page_by_page_plan_is_named_where_only_that_pays() -> None:
    faults = [Fault(16 * page, 10_000 * page, 5000) for page in range(1000)]
    plan = plan_of(recording_of(faults, "x86_64"), given=Given(prefault=4000))
    assert not plan.pays
    assert plan.advice[0].kind == "smaller-granule-pays"


def test_one_fault_of_half_a_minute_is_not_what_is_saved() -> None:
    usual = [Fault(page, 10_000 * page, 5000) for page in range(1000)]
    plan = plan_of(recording_of([*usual, Fault(1000, 10_000_000, 30_000_000_000)]))
    assert plan.prediction.time_saved_ns < 2 * 1000 * 5000
    assert "long-faults" in advice(plan)


def test_that_unpopulated_memory_would_not_pay_is_said() -> None:
    faults = [Fault(page, 10_000 * page, 5000, access=Access.WRITE) for page in range(1000)]
    assert "if-not-populated" in advice(plan_of(recording_of(faults)))
    assert "if-not-populated" not in advice(plan_of(recording_of(faults), given=Given("private/nothing")))


def test_slow_faults_are_said_to_have_waited() -> None:
    assert "slow-faults" in advice(plan_of(recording_of([Fault(page, page, 200_000) for page in range(99)])))


def test_memory_that_many_vcpus_need_at_once_is_no_device() -> None:
    stampede = [Fault(1, vcpu, 5000, tid=vcpu) for vcpu in range(2 * DEVICE_FAULTS)]
    assert working_set(recording_of(stampede)).devices == 0
    polled = [Fault(1, when, 5000, tid=when % 4) for when in range(2 * DEVICE_FAULTS)]
    assert working_set(recording_of(polled)).devices == 1


def test_where_nothing_is_in_all_runs_costs_are_as_recorded_and_the_reason_is_told() -> None:
    runs = [
        recording_of([Fault(page, page, 5000) for page in pages]) for pages in (range(9), range(100, 109))
    ]
    plan = plan_of(*runs, over="intersection")
    assert (plan.prediction.costs, plan.prediction.fault_ns) == ("recording", 5000)
    assert "runs" in plan.advice[-1].text


def test_a_plan_of_several_vms_does_not_say_that_it_pays() -> None:
    one = recording_of([Fault(page, page, 5000, tid=page % 2) for page in range(1000)])
    one.faults.pid = np.array([1 + page % 2 for page in range(1000)], np.int32)
    plan = plan_of(one)
    assert not plan.pays
    assert "no use" in verdict(plan, plan.prediction)


def test_a_granule_that_maps_far_too_much_is_told() -> None:
    plan = plan_of(guest(1000, spread=5000), granule=2 << 20)
    assert "smaller-granule" in advice(plan)
    assert plan.prediction.prefault_ns > 10 * plan_of(guest(1000), granule=PAGE).prediction.prefault_ns


def test_dense_memory_should_have_huge_pages() -> None:
    assert "huge-pages" in advice(plan_of(guest(1000, spread=1), granule=PAGE))


def test_a_handful_of_faults_is_left_alone() -> None:
    plan = plan_of(guest(5), granule=PAGE)
    assert not plan.pays
    assert advice(plan) == {"nothing"}


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ([], "no fault was recorded"),
        ([Fault(1, kind=Kind.MMIO)], "devices"),
        ([Fault(1, kind=Kind.PERMISSION)], "MADV_POPULATE_WRITE"),
        ([Fault(1, kind=Kind.ACCESS_FLAG)], "idle"),
    ],
)
def test_where_nothing_can_be_spared_it_is_said_why(faults: list[Fault], says: str) -> None:
    plan = plan_of(recording_of(faults))
    assert (plan.ranges, plan.pays) == ((), False)
    (one,) = plan.advice
    assert says in one.text


def test_what_makes_a_plan_doubtful_is_told() -> None:
    one = recording_of([Fault(page, page, 9000) for page in range(900)], lost_events=7)
    other = recording_of([Fault(page, page, 9000, nested=page % 2) for page in range(800, 2000)])
    assert {"lost-events", "nested-guests", "runs-differ"} <= advice(plan_of(one, other))


def test_who_has_nested_guests_is_told_to_populate_for_writing() -> None:
    rows = [*(Fault(page, page, 1_000_000) for page in range(100)), Fault(200, 300, nested=1)]
    (told,) = [one.text for one in plan_of(recording_of(rows)).advice if "nested" in one.kind]
    assert "1 fault of nested guests" in told
    assert "MADV_POPULATE_WRITE" in told


@pytest.mark.parametrize("slot", [Memslot(0x1000, 0x10000), Memslot(0, 0x11000)])
def test_a_memslot_is_of_whole_pages_of_the_host(slot: Memslot) -> None:
    with pytest.raises(UsageError, match="whole pages of the host, 65536"):
        plan_of(recording_of([Fault(1)], page_size=0x10000), granule=0x10000, memslots=(slot,))


@given(RECORDINGS, st.integers(1, 60), GRANULES)
def test_each_part_of_memory_that_slots_divide_comes_when_it_is_needed(
    recording: Recording, boundary: int, granule: int
) -> None:
    """Adjacent slots, as QEMU has them: a range that goes on in the next slot may be needed later there."""
    slots = (Memslot(0, boundary * PAGE), Memslot(boundary * PAGE, (1 << 40) - boundary * PAGE))
    pages = needed(recording, PAGE)
    ranges = plan_of(recording, granule=granule, memslots=slots).ranges
    assert [one.first_need_ns for one in ranges] == sorted(one.first_need_ns for one in ranges)
    for one in ranges:
        inside = range(one.ipa // PAGE, (one.ipa + one.size) // PAGE)
        assert one.ipa >= boundary * PAGE or one.ipa + one.size <= boundary * PAGE
        if one.pages:
            assert one.first_need_ns == min(when for page, when in pages.items() if page in inside)


def of_pids(*pids: int) -> Recording:
    """A fault of each process, by one thread each, all of them vCPU 0."""
    one = recording_of([Fault(page, page, tid=4 * page + 4) for page in range(len(pids))])
    one.faults.pid = np.array(pids, np.int32)
    return one


@pytest.mark.parametrize(
    ("pids", "says"),
    [
        ((1, 2, 2), "faults of 2 processes .2 of 2, 1 of 1."),
        ((-1, 7), "2 vCPU threads for 1 vCPU number"),
        ((-1, 7, 7, 8), "faults of 2 processes .2 of 7, 1 of unknown, 1 of 8."),
        ((-1, -1), "2 vCPU threads for 1 vCPU number"),
        ((7, 7), None),  # threads of one process come and go
        ((-1,), None),
    ],
)
def test_that_vms_are_thrown_together_is_told(pids: tuple[int, ...], says: str | None) -> None:
    found = [one.text for one in plan_of(of_pids(*pids)).advice if one.kind == "several-vms"]
    assert len(found) == (says is not None)
    assert all(re.search(says, text) for text in found if says)


def test_a_plan_that_costs_nothing_and_saves_nothing_costs_no_negative_time() -> None:
    plan = plan_of(recording_of([Fault(1)], "x86_64"), given=Given(fault=0.0, prefault=0.0))
    assert plan.prediction.net_ns == 0
    assert "costs 0 ns" in verdict(plan, plan.prediction)


def test_addresses_that_no_guest_has_are_left_out_and_told() -> None:
    """Without nested paging, KVM's faults have the guest's virtual addresses."""
    kernel = Fault(0xFFFF_FFFF_8100_0000 // 4096, 5)
    plan = plan_of(recording_of([Fault(16), kernel], "x86_64"))
    assert [one.ipa for one in plan.ranges] == [65536]
    assert "no-guest-memory" in advice(plan)
    last = plan_of(recording_of([Fault((1 << 52) // 4096 - 1)]), granule=12288)
    assert [one.ipa + one.size for one in last.ranges] == [1 << 52]


# What cannot be asked for.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"granule": 6000}, "no multiple of the page size"),
        ({"granule": 1 << 80}, "largest block"),
        ({"cap": 4096}, "less than one granule"),
        ({"over": "most"}, "none of union"),
        ({"over": "2-of-2"}, "2 runs, but 1 recording given"),
        ({"over": "2"}, "1 to 1"),
        ({"over": "\u0661"}, "none of union"),
        ({"given": Given("floppy/write")}, "there are figures for"),
    ],
)
def test_what_cannot_be_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_of(guest(10), **config)


def test_recordings_of_different_hosts_do_not_mix() -> None:
    with pytest.raises(UsageError, match="architecture aarch64 and x86_64"):
        plan_of(guest(1), recording_of([Fault(1)], "x86_64"))


def test_n_of_m_without_m_means_all_that_are_there() -> None:
    assert needed_runs("2", 3) == 2
