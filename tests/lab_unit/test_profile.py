# SPDX-License-Identifier: Apache-2.0
"""QEMU's log, read back: functions, and the longest stretches of a call."""

from __future__ import annotations

import pytest

from prefault.lab.profile import Code, Symbols, Window, locks, masks
from prefault.report.profile import INTERRUPTS, MMU_LOCK, SPINNING

FUNCTIONS = (
    *("vectors", "el1h_64_irq", "ret_to_kernel", "ret_to_user", "kvm_vcpu_ioctl", "work"),
    *("_raw_spin_lock_irqsave", "_raw_read_lock", "_raw_read_unlock", "timer", "_raw_spin_unlock"),
)
BEGIN = 0xFFFF_8000_8000_0000
SIZE = 0x100
OFF, ON, NOP = 0xD50343DF, 0xD51B4220, 0xD503201F
ADDRESS = {name: BEGIN + 0x1_0000 + SIZE * index for index, name in enumerate(FUNCTIONS)}
CALL, SPIN, LOCK, UNLOCK, UNSPIN = FUNCTIONS[4], FUNCTIONS[6], FUNCTIONS[7], FUNCTIONS[8], FUNCTIONS[10]
INTERRUPT = (("vectors", 1), ("el1h_64_irq", 4), ("timer", 50), ("el1h_64_irq", 1), ("ret_to_kernel", 3))


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
    window = run((CALL, 1), (LOCK, 5), ("work", 10), *INTERRUPT, ("work", 2), (UNLOCK, 5))
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


def test_nothing_is_preempted_from_the_first_lock_to_the_last() -> None:
    within = ((SPIN, 3), ("work", 20), (UNSPIN, 2))
    window = run((CALL, 40), (LOCK, 4), ("work", 7), *within, ("work", 5), (UNLOCK, 4), ("work", 90))
    assert window.found.longest[SPINNING] == 4 + 7 + 3 + 20 + 2 + 5


def test_an_interrupt_that_comes_while_a_lock_is_taken_or_given_back_takes_none() -> None:
    taken = ((SPIN, 2), *INTERRUPT, (SPIN, 1), ("work", 20))
    given = ((UNSPIN, 1), *INTERRUPT, (UNSPIN, 1), ("work", 90), (SPIN, 3), ("work", 4), (UNSPIN, 2))
    window = run((CALL, 1), *taken, *given, ("work", 90), ("ret_to_user", 1))
    assert 23 <= window.found.longest[SPINNING] <= 28


def test_a_lock_function_that_calls_another_is_one() -> None:
    window = run((CALL, 1), (SPIN, 2), ("work", 3), ADDRESS[SPIN] + 8, ("work", 9), (UNSPIN, 2), ("work", 99))
    assert window.found.longest[SPINNING] == 2 + 3 + 1 + 9


@pytest.mark.parametrize(
    ("name", "held"),
    [
        *[
            ("_raw_spin_lock", 1),
            ("_raw_spin_trylock", 1),
            ("_raw_write_lock_irq", 1),
            ("_raw_read_lock_bh", 1),
        ],
        *[("_raw_spin_unlock", -1), ("_raw_spin_unlock_irqrestore", -1), ("_raw_read_unlock", -1)],
        *[("mutex_lock", 0), ("_raw_spin_lock_nothing", 0), ("do_raw_spin_lock", 0)],
    ],
)
def test_functions_that_take_and_give_locks_are_known_by_name(name: str, held: int) -> None:
    assert locks(name) == held


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
