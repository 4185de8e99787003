# SPDX-License-Identifier: Apache-2.0
"""What is known of a peer is told from what is not."""

from __future__ import annotations

import dataclasses

import pytest

from prefault.conform import peers
from prefault.conform.compare import Comparison, Verdict, compare
from prefault.conform.suite import Play, choose
from prefault.scenarios import SCENARIOS

DIRTY = "prefaulting_makes_nothing_dirty[private]"
SAID = "pre-faulting made pages dirty"
SEEN: tuple[tuple[str, object], ...] = (("exit", 1), ("leaves", []), ("pre-fault", {"errno": 0}))
ALL = [entry for entries in peers.KNOWN.values() for entry in entries]


def on_peer(name: str, text: str, seen: tuple[tuple[str, object], ...] = (SEEN[0], SEEN[2])) -> Comparison:
    """A law that holds on the specification, and not on a kernel that does not show its tables."""
    return compare(Play(name, "passed", observations=SEEN), Play(name, "failed", text, 0, seen), tables=False)


def test_tables_that_are_not_shown_are_not_compared() -> None:
    its = (SEEN[0], SEEN[2])
    spec, kernel = Play("law", "passed", observations=SEEN), Play("law", "passed", observations=its)
    assert compare(spec, kernel, tables=False).verdict is Verdict.EQUAL
    assert compare(spec, kernel).verdict is Verdict.DIFFERENT


def test_what_is_known_is_told_with_its_reason() -> None:
    found = peers.known("x86_64", on_peer(DIRTY, SAID))
    assert found is not None
    assert "dirty" in found.peer and "M7" in found.reason


@pytest.mark.parametrize(
    ("arch", "one"),
    [
        ("x86_64", on_peer(DIRTY, "the guest's writes are not in the log")),
        ("x86_64", on_peer("copy_on_write_is_not_broken[private-read]", SAID)),
        ("x86_64", on_peer(DIRTY, SAID, (("exit", 2), SEEN[2]))),
        ("arm64", on_peer(DIRTY, SAID)),
    ],
    ids=["it says something else", "another law", "it differs before", "another architecture"],
)
def test_any_other_difference_is_news(arch: str, one: Comparison) -> None:
    assert one.verdict is Verdict.DIFFERENT
    assert peers.known(arch, one) is None


def test_what_is_equal_is_not_known_to_differ() -> None:
    same = Play(DIRTY, "passed", observations=SEEN)
    assert peers.known("x86_64", compare(same, same)) is None


def test_a_peer_that_has_changed_is_noticed() -> None:
    names = choose(["prefaulting_makes_nothing_dirty", "logging_that_starts_*"])
    equal = [compare(Play(name, "passed"), Play(name, "passed")) for name in names]
    assert peers.gone("x86_64", equal) == [peers.X86_64[0]]
    still = dataclasses.replace(equal[0], verdict=Verdict.KNOWN)
    assert peers.gone("x86_64", [still, *equal[1:]]) == []
    assert peers.gone("x86_64", []) == []


def test_what_chance_did_not_show_is_not_gone() -> None:
    (name,) = choose(["slots_can_move_meanwhile"])
    assert peers.gone("x86_64", [compare(Play(name, "passed"), Play(name, "passed"))]) == []


def test_scenarios_that_may_hang_come_last_and_none_is_left_out() -> None:
    names = tuple(SCENARIOS)
    ordered = peers.in_order("x86_64", names)
    laws = [name.partition("[")[0] for name in ordered[-4:]]
    assert set(laws) == {"slots_can_move_meanwhile", "slots_can_come_and_go_meanwhile"}
    assert sorted(ordered) == sorted(names)
    assert peers.in_order("arm64", names) == names


@pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry.scenarios[0])
def test_what_is_known_is_about_listed_scenarios(entry: peers.Known) -> None:
    for pattern in entry.scenarios:
        assert choose([pattern])
