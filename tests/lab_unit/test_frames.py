# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.lab.frames import LIMIT, BadFrame, Decoder, Frame, Kind, encode, split

frames = st.builds(Frame, st.sampled_from(Kind), st.binary(max_size=200))


@given(st.lists(frames), st.data())
def test_frames_come_out_whole_wherever_the_stream_is_cut(sent: list[Frame], data: st.DataObject) -> None:
    stream = b"".join(encode(frame) for frame in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    decoder = Decoder()
    got = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += list(decoder.feed(stream[start:end]))
    assert got == sent


def test_a_frame_cut_off_is_not_reported() -> None:
    whole = encode(Frame(Kind.STDOUT, b"hello"))
    assert list(Decoder().feed(whole[:-1])) == []


@pytest.mark.parametrize("stream", [b"\x00\x00\x00\x00\x00", b"\xff" * 5, b"\x03\xff\xff\xff\xff"])
def test_what_is_no_frame_is_refused(stream: bytes) -> None:
    with pytest.raises(BadFrame):
        list(Decoder().feed(stream))


@given(st.integers(0, 3 * LIMIT), st.binary(max_size=20))
def test_split_loses_nothing_and_keeps_the_limit(size: int, prefix: bytes) -> None:
    data = bytes(size)
    pieces = list(split(Kind.FILE, data, prefix))
    assert pieces
    assert all(len(piece.payload) <= LIMIT for piece in pieces)
    assert all(piece.payload.startswith(prefix) for piece in pieces)
    assert b"".join(piece.payload[len(prefix) :] for piece in pieces) == data
