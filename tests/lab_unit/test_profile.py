# SPDX-License-Identifier: Apache-2.0
"""QEMU's log, read back: functions, and the longest stretches of a call."""

from __future__ import annotations

import pytest

from prefault.lab.profile import Code, Symbols, Window, masks
from prefault.report.profile import INTERRUPTS, MMU_LOCK, RESCHED

FUNCTIONS = (
    *("vectors", "el1h_64_irq", "ret_to_kernel", "ret_to_user", "kvm_vcpu_ioctl", "work"),
    *("kvm_arch_vcpu_pre_fault_memory", "_raw_read_lock", "_raw_read_unlock", "timer"),
)
BEGIN = 0xFFFF_8000_8000_0000
SIZE = 0x100
OFF, ON, NOP = 0xD50343DF, 0xD51B4220, 0xD503201F
ADDRESS = {name: BEGIN + 0x1_0000 + SIZE * index for index, name in enumerate(FUNCTIONS)}
CALL, PIECE, LOCK, UNLOCK = FUNCTIONS[4], FUNCTIONS[6], FUNCTIONS[7], FUNCTIONS[8]


def symbols() -> Symbols:
    lines = [f"{address:x} t {name}.isra.0" for name, address in ADDRESS.items()]
    return Symbols.read([*lines, f"{ADDRESS['work']:x} t $x"])


def code() -> Code:
    """Each function is NOPs, but for its last two words: interrupts off, interrupts on."""
    body = NOP.to_bytes(4, "little") * (SIZE // 4 - 2) + OFF.to_bytes(4, "little") + ON.to_bytes(4, "little")
    return Code(bytes(0x1_0000) + body * len(FUNCTIONS), symbols().begin)


def line(address: int) -> bytes:
    return b"Trace 0: 0x7f00 [00000400/%016x/00000041/ff000201] \n" % address


def run(*steps: tuple[str, int] | int) -> Window:
    """Functions with how many instructions of each; a bare number is an address."""
    window = Window(symbols(), code())
    for step in steps:
        if isinstance(step, int):
            window.take(line(step))
            continue
        for index in range(step[1]):
            window.take(line(ADDRESS[step[0]] + 4 * (index % 16)))
    return window


def test_only_what_lies_between_entry_and_return_is_counted() -> None:
    window = run(("work", 9), (CALL, 2), ("work", 3), ("ret_to_user", 1), ("work", 9))
    assert window.over
    assert dict(window.found.counts) == {CALL: 2, "work": 3, "ret_to_user": 1}


def test_lines_that_are_no_trace_are_passed_over() -> None:
    window = run((CALL, 1))
    window.take(b"Stopped execution of TB chain before 0x1 [ffff] work\n")
    assert window.found.counts.total() == 1


def test_the_longest_hold_is_from_having_the_lock_to_having_given_it_back() -> None:
    window = run((CALL, 1), *[(LOCK, 5), ("work", 10), (UNLOCK, 5)], *[(LOCK, 5), ("work", 7), (UNLOCK, 5)])
    assert window.found.longest[MMU_LOCK] == 10


def test_interrupts_are_counted_but_hold_nothing_up() -> None:
    interrupt = (("vectors", 1), ("el1h_64_irq", 4), ("timer", 50), ("el1h_64_irq", 1), ("ret_to_kernel", 3))
    window = run((CALL, 1), (LOCK, 5), ("work", 10), *interrupt, ("work", 2), (UNLOCK, 5))
    assert window.found.longest[MMU_LOCK] <= 14
    assert window.found.counts["timer"] == 50


def test_an_interrupt_within_an_interrupt_ends_none() -> None:
    inner = (("vectors", 1), ("el1h_64_irq", 1), ("timer", 5), ("ret_to_kernel", 1))
    outer = (("vectors", 1), ("el1h_64_irq", 1), *inner, ("timer", 100), ("ret_to_kernel", 1))
    window = run((CALL, 1), (LOCK, 5), ("work", 10), *outer, ("work", 2), (UNLOCK, 5))
    assert window.found.longest[MMU_LOCK] <= 14


def test_interrupts_are_off_from_the_first_mask_to_the_last_restore() -> None:
    off, on = ADDRESS["work"] + SIZE - 8, ADDRESS["work"] + SIZE - 4
    window = run((CALL, 1), off, ("work", 3), off, on, ("work", 4), on, ("work", 50))
    assert window.found.longest[INTERRUPTS] == 10


def test_pieces_are_what_lies_between_points_at_which_others_may_run() -> None:
    pieces = ((PIECE, 3), ("work", 20), (CALL, 2), (PIECE, 3), ("work", 4), (CALL, 2))
    window = run((CALL, 40), *pieces, ("ret_to_user", 1))
    assert window.found.longest[RESCHED] == 25


@pytest.mark.parametrize(
    ("word", "effect"),
    [
        (OFF, 1),
        (0xD50342DF, 1),
        (0xD50341DF, 0),
        (ON, -1),
        (0xD51B4225, -1),
        (0xD50342FF, -1),
        (NOP, 0),
        (0, 0),
    ],
)
def test_instructions_that_mask_interrupts_are_known(word: int, effect: int) -> None:
    assert masks(word) == effect


def test_code_outside_of_the_image_is_nothing() -> None:
    assert code().word(BEGIN - 4) == code().word(BEGIN + (1 << 30)) == 0
