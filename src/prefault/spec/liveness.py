# SPDX-License-Identifier: Apache-2.0
"""Which local variables of a suspended function it may still read.

A value that nobody reads again, left over from an earlier turn of a loop for instance, does not
make two states different. Where bytecode is not understood in full, a variable counts as live.
"""

from __future__ import annotations

import dis
import functools
from types import CodeType

_ENDS = frozenset({"RETURN_VALUE", "RERAISE", "RAISE_VARARGS"})
_ALWAYS_JUMPS = frozenset({"JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT"})


@functools.lru_cache(4096)
def place(code: CodeType, lasti: int) -> tuple[int, frozenset[str]]:
    """The instruction that a frame is in, and the names that may be read after it before they are written.

    :param lasti: ``f_lasti``; once the interpreter has specialised a call, that is in the cache of its
        instruction, or at the PRECALL before it that Python 3.11 has
    """
    live = _analyse(code)
    offset = max(one for one in live if one <= lasti)
    while dis.opname[code.co_code[offset]] == "PRECALL":
        offset = min(one for one in live if one > offset)
    return offset, live[offset] | {*code.co_cellvars, *code.co_freevars}


@functools.lru_cache(1024)
def _analyse(code: CodeType) -> dict[int, frozenset[str]]:
    """Offset of each instruction → what is live after it. The usual backward data flow."""
    instructions = list(dis.get_instructions(code))
    successors = _successors(code, instructions)
    before: dict[int, frozenset[str]] = {one.offset: frozenset() for one in instructions}
    after = dict(before)
    changed = True
    while changed:
        changed = False
        for one in reversed(instructions):
            out = frozenset[str]().union(*(before[target] for target in successors[one.offset]))
            new = (out - _written(one)) | _read(one)
            after[one.offset] = out
            if new != before[one.offset]:
                before[one.offset], changed = new, True
    return after


def _names(one: dis.Instruction) -> frozenset[str]:
    return frozenset(one.argval if isinstance(one.argval, tuple) else (one.argval,))


def _written(one: dis.Instruction) -> frozenset[str]:
    return _names(one) if one.opname == "STORE_FAST" else frozenset()


def _read(one: dis.Instruction) -> frozenset[str]:
    """Instructions that read and write at once count as reading."""
    return _names(one) if "_FAST" in one.opname and one.opname != "STORE_FAST" else frozenset()


def _successors(code: CodeType, instructions: list[dis.Instruction]) -> dict[int, list[int]]:
    """Offset of each instruction → offsets of those that may come next, exception handlers included."""
    found: dict[int, list[int]] = {}
    for one, following in zip(instructions, [*instructions[1:], None], strict=True):
        targets = found[one.offset] = []
        if one.opcode in dis.hasjrel or one.opcode in dis.hasjabs:
            targets.append(one.argval)
        if following and one.opname not in _ENDS | _ALWAYS_JUMPS:
            targets.append(following.offset)
    for entry in dis.Bytecode(code).exception_entries:  # type: ignore[attr-defined]  # not in typeshed
        for offset in range(entry.start, entry.end + 1):
            if offset in found:
                found[offset].append(entry.target)
    return found
