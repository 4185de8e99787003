# SPDX-License-Identifier: Apache-2.0
"""What a walk finds in memory, what it leaves there, and whether that is so.

Every word that a walk touches holds a number made from its address, so that a page in the wrong
place is seen. What depends on the walk alone is computed once: in the lab, a loop over every page
in Python takes longer than the walk itself.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Iterator

from prefault.errors import Mismatch
from prefault.guest.program import Walk, resolve
from prefault.machine import Vm

_CHUNK = 2 << 20
_MASK = (1 << 64) - 1
_MARK = 0xA5A5_0000_0000_0001


def word(gpa: int) -> int:
    """What the host writes at ``gpa``."""
    return gpa ^ _MARK


def fill(vm: Vm, gpa: int, size: int, stride: int) -> None:
    """Write ``word`` at every stride, and zeros between."""
    for start, length in _chunks(gpa, size, stride):
        data = bytearray(length)
        words = array("Q", map(word, range(start, start + length, stride)))
        memoryview(data).cast("Q")[:: stride // 8] = memoryview(words)
        vm.write_memory(start, bytes(data))


@functools.cache
def expected_sum(walk: Walk, initial: int | None) -> int:
    """The value of ``walk``, if ``initial`` is in every word, or ``word`` if it is None."""
    reads = (address for address, write in zip(_addresses(walk), _writes(walk), strict=True) if not write)
    return sum(map(word, reads) if initial is None else (initial for _ in reads)) & _MASK


def check_writes(vm: Vm, walk: Walk) -> int:
    """Every write of the walk is in memory; the sum of what was written.

    :raises Mismatch: the first that is not
    """
    written = _written(walk)
    if not written:
        return 0
    step = walk.stride // 8
    chunks = _chunks(*_range(walk), walk.stride)
    parts = (memoryview(vm.read_memory(*chunk)).cast("Q")[::step].tolist() for chunk in chunks)
    found = list(itertools.compress(itertools.chain.from_iterable(parts), _writes(walk)))
    for address, value in zip(written, found, strict=True) if found != written else ():
        if address != value:
            raise Mismatch(
                f"the guest wrote {address:#x} at gpa {address:#x}, the host finds {value:#x}: "
                "the guest's page is not the host's"
            )
    return sum(written) & _MASK


@functools.cache
def _writes(walk: Walk) -> list[bool]:
    return [walk.is_write(index) for index in range(len(_addresses(walk)))]


@functools.cache
def _written(walk: Walk) -> list[int]:
    return list(itertools.compress(_addresses(walk), _writes(walk)))


def _addresses(walk: Walk) -> range:
    start, size = _range(walk)
    return range(start, start + size, walk.stride)


def _range(walk: Walk) -> tuple[int, int]:
    return resolve(walk.start, ()), resolve(walk.size, ())


def _chunks(gpa: int, size: int, stride: int) -> Iterator[tuple[int, int]]:
    step = max(stride, _CHUNK // stride * stride)
    for start in range(gpa, gpa + size, step):
        yield start, min(step, gpa + size - start)
