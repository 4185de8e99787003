# SPDX-License-Identifier: Apache-2.0
"""What counts as equal, and what is said of what is not."""

from __future__ import annotations

from prefault.conform.compare import Comparison, Verdict, compare, without_capability
from prefault.conform.suite import Play

SEEN: tuple[tuple[str, object], ...] = (("exit", {"kind": "AtMarker", "number": 1}), ("leaves", []))
PASSED = Play("law", "passed", observations=SEEN)


def on_kernel(
    outcome: str = "passed", *, text: str = "", seen: object = SEEN, log: object = ()
) -> Comparison:
    return compare(PASSED, Play("law", outcome, text, 0, seen, log))  # type: ignore[arg-type]


def test_the_same_on_both_sides_is_equal() -> None:
    found = on_kernel()
    assert (found.verdict, found.compared) == (Verdict.EQUAL, 2)


def test_the_first_observation_that_differs_is_named() -> None:
    found = on_kernel(seen=(SEEN[0], ("leaves", ["a"]), ("more", 1)))
    assert found.verdict is Verdict.DIFFERENT
    assert found.difference
    assert (found.difference.index, found.difference.what) == (1, "leaves")
    assert (found.difference.spec, found.difference.kernel) == ([], ["a"])


def test_of_an_observation_with_parts_the_part_is_named() -> None:
    mine, its = {"result": 0, "leaves": ["a"]}, {"result": 0, "leaves": ["b"]}
    found = compare(
        Play("law", "passed", observations=(("1.", mine),)),
        Play("law", "passed", observations=(("1.", its),)),
    )
    assert found.difference
    assert found.difference.part == "leaves"


def test_a_law_that_holds_on_one_side_only_is_a_difference() -> None:
    assert on_kernel("failed", text="no").verdict is Verdict.DIFFERENT


def test_a_law_that_holds_on_no_side_has_failed_although_both_are_alike() -> None:
    failed = Play("law", "failed", "no", observations=SEEN)
    assert compare(failed, failed).verdict is Verdict.FAILED


def test_what_one_side_lacks_is_not_compared() -> None:
    assert on_kernel("skipped", seen=()).verdict is Verdict.SKIPPED


def test_a_law_that_fails_where_the_other_side_lacks_something_is_not_hidden() -> None:
    failed = Play("law", "failed", "no")
    assert compare(failed, Play("law", "skipped")).verdict is Verdict.DIFFERENT


def test_a_splat_is_no_success_and_its_lines_are_kept() -> None:
    found = on_kernel(log=("kvm [54]: fine", "WARNING: CPU: 0 PID: 54 at arch/arm64/kvm/mmu.c:1"))
    assert found.verdict is Verdict.SPLAT
    assert found.splats == ("WARNING: CPU: 0 PID: 54 at arch/arm64/kvm/mmu.c:1",)


def test_a_lost_machine_is_no_difference_of_its_own() -> None:
    assert on_kernel("lost", seen=()).verdict is Verdict.LOST


def test_what_the_kernel_could_not_do_ends_the_comparison_without_a_difference() -> None:
    mine = (("1.", {"result": "done"}), ("2.", {"result": "done"}), ("3.", {"result": 3}))
    its = (("1.", {"result": "done"}), ("2.", {"result": "could not: madvise failed"}), ("3.", {"result": 4}))
    found = compare(Play("p", "passed", observations=mine), Play("p", "passed", observations=its))
    assert (found.verdict, found.compared, found.difference) == (Verdict.EQUAL, 1, None)
    assert "could not: madvise failed" in found.cut


def test_two_reasons_not_to_do_something_are_a_difference_but_for_collapsing() -> None:
    for what, verdict in (("MADV_POPULATE_READ", Verdict.DIFFERENT), ("MADV_COLLAPSE", Verdict.EQUAL)):
        plays = [
            Play(
                "p", "passed", observations=(("1.", {"result": f"could not: madvise({what}) failed: {why}"}),)
            )
            for why in ("EINVAL", "EAGAIN")
        ]
        assert compare(plays[0], plays[1]).verdict is verdict


def test_what_the_specification_alone_cannot_do_is_a_difference() -> None:
    mine, its = (("1.", {"result": "could not: madvise failed"}),), (("1.", {"result": "done"}),)
    found = compare(Play("p", "passed", observations=mine), Play("p", "passed", observations=its))
    assert found.verdict is Verdict.DIFFERENT


def test_a_kernel_that_does_not_claim_to_pre_fault_may_answer_otherwise_but_not_do_it() -> None:
    mine = (("capability", 1), ("pre-fault 0x0 0x1000", {"errno": 0}))
    for errno, verdict in ((25, Verdict.SKIPPED), (0, Verdict.DIFFERENT)):
        its = (("capability", 0), ("pre-fault 0x0 0x1000", {"errno": errno}))
        found = compare(Play("law", "passed", observations=mine), Play("law", "failed", observations=its))
        assert found.verdict is Verdict.DIFFERENT
        assert without_capability(found).verdict is verdict
