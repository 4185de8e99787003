# SPDX-License-Identifier: Apache-2.0
"""The serial port, as a driver sees it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.vmm import uart
from prefault.vmm.uart import Pl011


class Wires:
    """What the port is connected to."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.levels: list[bool] = []
        self.port = Pl011(self.sent.append, self.levels.append)

    def line(self) -> bool:
        """Whether it is high."""
        return bool(self.levels and self.levels[-1])


def received(port: Pl011) -> bytes:
    """All that a driver gets, reading as long as the FIFO is not empty."""
    got = bytearray()
    while not port.read(uart.FR) & uart.FR_RXFE:
        got.append(port.read(uart.DR))
    return bytes(got)


def test_a_driver_finds_a_pl011() -> None:
    port = Wires().port
    identity = [port.read(0xFE0 + 4 * index) for index in range(8)]
    assert identity[0] | (identity[1] & 0xF) << 8 == 0x011
    assert identity[4:] == [0x0D, 0xF0, 0x05, 0xB1]


@given(st.binary(max_size=200))
def test_what_the_guest_sends_comes_out(data: bytes) -> None:
    wires = Wires()
    for byte in data:
        assert not wires.port.read(uart.FR) & 1 << 5  # never full
        wires.port.write(uart.DR, byte)
    assert wires.sent == data


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_what_is_typed_comes_in_order_and_whole(pieces: list[bytes]) -> None:
    wires = Wires()
    for piece in pieces:
        wires.port.feed(piece)
    assert received(wires.port) == b"".join(pieces)


def test_the_line_is_high_as_long_as_something_waits_and_is_asked_for() -> None:
    wires = Wires()
    wires.port.feed(b"ab")
    assert not wires.line()  # masked
    wires.port.write(uart.IMSC, uart.INT_RX | uart.INT_RT)
    assert wires.line()
    wires.port.read(uart.DR)
    assert wires.line()
    wires.port.read(uart.DR)
    assert not wires.line()


def test_sending_interrupts_again_after_each_byte() -> None:
    wires = Wires()
    wires.port.write(uart.IMSC, uart.INT_TX)
    wires.port.write(uart.DR, 0x41)
    assert wires.line()
    wires.port.write(uart.ICR, uart.INT_TX)
    assert not wires.line()
    wires.port.write(uart.DR, 0x42)
    assert wires.levels == [True, False, True]


def test_registers_that_nobody_knows_read_as_zero() -> None:
    port = Wires().port
    port.write(0x500, 0xFFFF_FFFF)
    assert port.read(0x500) == 0


_WRITES = st.lists(st.tuples(st.sampled_from([*range(0, 0x4C, 4), 0x500]), st.integers(0, 0xFFFF_FFFF)))


@given(_WRITES, st.binary(max_size=40))
def test_a_saved_port_goes_on_as_it_was(writes: list[tuple[int, int]], typed: bytes) -> None:
    first, second = Wires(), Wires()
    for offset, value in writes:
        first.port.write(offset, value)
    first.port.feed(typed)
    second.port.restore(json.loads(json.dumps(first.port.save())))
    assert second.levels == []  # the GIC has the level
    for offset in range(0, 0x4C, 4):
        if offset != uart.DR:
            assert second.port.read(offset) == first.port.read(offset)
    assert received(second.port) == received(first.port) == typed
    # From there on, the interrupt line does the same in both.
    first.levels.clear()
    second.levels.clear()
    for wires in (first, second):
        wires.port.write(uart.IMSC, 0)
        wires.port.write(uart.IMSC, uart.INT_TX)
        wires.port.write(uart.DR, 1)
    assert first.levels == second.levels


@pytest.mark.parametrize("damage", [{"registers": {}}, {"received": 5}, {"mask": "no"}, {"registers": 3}])
def test_a_state_that_is_none_is_refused(damage: dict[str, object]) -> None:
    wires = Wires()
    with pytest.raises(ValueError):
        wires.port.restore({**wires.port.save(), **damage})
