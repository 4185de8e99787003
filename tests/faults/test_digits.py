# SPDX-License-Identifier: Apache-2.0
"""Numbers read eight characters at a time are those that Python reads one by one."""

from __future__ import annotations

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prefault.faults.digits import PAD, Text

TEXTS = st.text("0123456789abcdefgxABCDEFG :,-\n\xe9°\x7f", max_size=60)


def places(data: bytes) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Every place in a text, its end included."""
    return np.arange(len(data) + 1) + PAD


@given(TEXTS)
def test_decimal_numbers_end_where_they_end(text: str) -> None:
    data = text.encode()
    values, lengths = Text(data).decimal_before(places(data))
    for end, value, length in zip(range(len(data) + 1), values, lengths, strict=True):
        digits = (re.search(rb"[0-9]*\Z", data[:end]) or [b""])[0][-16:]
        assert (int(value), int(length)) == (int(digits or b"0"), len(digits))


@given(TEXTS)
def test_decimal_numbers_begin_where_they_begin(text: str) -> None:
    data = text.encode()
    values, lengths = Text(data).decimal_at(places(data))
    for begin, value, length in zip(range(len(data) + 1), values, lengths, strict=True):
        digits = (re.match(rb"[0-9]{0,8}", data[begin:]) or [b""])[0]
        assert (int(value), int(length)) == (int(digits or b"0"), len(digits))


@given(TEXTS)
def test_hexadecimal_numbers_are_read_with_and_without_0x(text: str) -> None:
    data = text.encode()
    values, ends = Text(data).hex_at(places(data))
    for begin, value, end in zip(range(len(data) + 1), values, ends, strict=True):
        prefix = 2 if data[begin : begin + 2] == b"0x" else 0
        digits = (re.match(rb"[0-9a-fA-F]{0,16}", data[begin + prefix :]) or [b""])[0]
        assert int(value) == int(digits or b"0", 16)
        assert int(end) - PAD == (begin + prefix + len(digits) if digits else begin)


@given(TEXTS)
def test_spaces_are_counted(text: str) -> None:
    data = text.encode()
    before, after = Text(data).spaces_before(places(data)), Text(data).spaces_after(places(data))
    for place, left, right in zip(range(len(data) + 1), before, after, strict=True):
        assert left == min(16, len(data[:place]) - len(data[:place].rstrip(b" ")))
        assert right == len(data[place:]) - len(data[place:].lstrip(b" "))
