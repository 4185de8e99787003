# SPDX-License-Identifier: Apache-2.0
"""Orders and configurations survive the way into the lab."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import UsageError
from prefault.machine import GUEST_MEMORY, Backing, Resident
from prefault.vmm.config import MIB, GuestConfig
from prefault.vmm.order import Boot, How, Restore, Watch, boot_from, plain, restore_from

GUESTS = st.builds(
    GuestConfig,
    memory=st.integers(8, 1000).map(lambda number: number * 2 * MIB),
    vcpus=st.integers(1, 8),
    backing=st.sampled_from(GUEST_MEMORY),
    huge_page_size=st.sampled_from([0, 2 * MIB]),
    resident=st.sampled_from(Resident),
    el2=st.booleans(),
)
TEXT = st.text(max_size=5)
WATCHES = st.builds(
    Watch,
    TEXT,
    TEXT,
    st.booleans(),
    TEXT,
    st.lists(st.tuples(TEXT, TEXT), max_size=2).map(tuple),
    st.booleans(),
)
RANGES = st.lists(st.tuples(st.integers(0, 1 << 52), st.integers(1, 1 << 40)), max_size=3).map(tuple)


def through_json(raw: dict[str, object]) -> dict[str, object]:
    found = json.loads(json.dumps(raw))
    assert isinstance(found, dict)
    return {name: value for name, value in found.items() if name != "do"}


@given(st.builds(Boot, TEXT, TEXT, GUESTS, TEXT, WATCHES))
def test_an_order_to_boot_survives(order: Boot) -> None:
    assert boot_from(through_json(plain(order))) == order


@given(
    st.builds(
        Restore,
        TEXT,
        st.sampled_from(How),
        st.booleans(),
        st.just({}),
        RANGES,
        RANGES,
        st.booleans(),
        WATCHES,
    )
)
def test_an_order_to_restore_survives(order: Restore) -> None:
    assert restore_from(through_json(plain(order))) == order


def test_what_an_order_leaves_out_is_as_usual() -> None:
    assert boot_from({"image": "I", "initrd": ""}) == Boot("I", "", GuestConfig())
    assert boot_from({"image": "I", "initrd": "", "guest": {"vcpus": 2}, "watch": {"stop": "x"}}) == Boot(
        "I", "", GuestConfig(vcpus=2), watch=Watch(stop="x")
    )
    assert restore_from({"folder": "F"}) == Restore("F")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"vcpus": 0}, "0 vCPUs"),
        ({"vcpus": 9}, "1 to 8"),
        ({"memory": MIB}, "at least 16 MiB"),
        ({"memory": 33 * MIB}, "multiples of 2 MiB"),
        ({"memory": 1 << 40}, "at most 0xffc0000000"),
        ({"huge_page_size": 3 << 20}, "power of two"),
        ({"huge_page_size": -2}, "power of two"),
        ({"backing": Backing.DEVICE}, "backing device"),
    ],
)
def test_a_guest_that_cannot_be_is_refused(wrong: dict[str, object], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        GuestConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"vcpus": "2"}, "'vcpus' in its guestconfig is no int"),
        ({"vcpus": True}, "'vcpus' in its guestconfig is no int"),
        ({"memory": 1e9}, "'memory' in its guestconfig is no int"),
        ({"huge_page_size": "x"}, "'huge_page_size' in its guestconfig is no int"),
        ({"el2": "no"}, "'el2' in its guestconfig is no bool"),
        ({"backing": ["thp"]}, "not a valid Backing"),
        ({"resident": None}, "not a valid Resident"),
        ({"wings": 2}, "guests here have no 'wings'"),
        ([], "is no object"),
    ],
)
def test_a_guest_of_other_types_is_refused(wrong: Any, why: str) -> None:
    with pytest.raises((TypeError, ValueError), match=why):
        GuestConfig.from_json(wrong)
