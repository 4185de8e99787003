# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prefault.vmm.console import Console


@given(st.binary(max_size=2000))
def test_all_that_is_said_is_passed_on_in_order(said: bytes) -> None:
    out = bytearray()
    console = Console(out.extend)
    for byte in said:
        console.send(byte)
    console.flush()
    assert out == said
    assert console.size == len(said)


def say(console: Console, text: bytes) -> None:
    for byte in text:
        console.send(byte)


def test_a_line_is_passed_on_when_it_is_whole() -> None:
    pieces: list[bytes] = []
    say(Console(pieces.append), b"one\ntwo")
    assert pieces == [b"one\n"]


def test_words_are_noticed_as_soon_as_they_are_said_and_each_time() -> None:
    out, calls = bytearray(), []
    console = Console(out.extend)
    console.watch("ready", lambda: calls.append(bytes(out)))
    say(console, b"not rea\ndy; readready ready\n")
    assert len(calls) == 2


def test_several_may_wait_for_the_same_words() -> None:
    calls: list[int] = []
    console = Console(bytearray().extend)
    console.watch("ready", lambda: calls.append(1))
    console.watch("ready", lambda: calls.append(2))
    say(console, b"ready")
    assert calls == [1, 2]
