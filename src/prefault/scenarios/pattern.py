# SPDX-License-Identifier: Apache-2.0
"""What a walk finds in memory, what it leaves there, and whether that is so.

Every word that a walk touches holds a number made from its address, so that a page in the wrong
place is seen. Done in chunks with strided views: a loop over every page would take longer in the
lab than the walk itself.
"""

from __future__ import annotations

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
    """Write ``word`` at every stride."""
    for start, length in _chunks(gpa, size, stride):
        data = bytearray(length)
        for index, address in enumerate(range(start, start + length, stride)):
            data[index * stride : index * stride + 8] = word(address).to_bytes(8, "little")
        vm.write_memory(start, bytes(data))


def expected_sum(walk: Walk, initial: int | None) -> int:
    """The value of ``walk``, if ``initial`` is in every word, or ``word`` if it is None."""
    start, size = _range(walk)
    total = 0
    for index, address in enumerate(range(start, start + size, walk.stride)):
        if not walk.is_write(index):
            total += word(address) if initial is None else initial
    return total & _MASK


def check_writes(vm: Vm, walk: Walk) -> int:
    """Every write of the walk is in memory; the sum of what was written.

    :raises Mismatch: the first that is not
    """
    start, size = _range(walk)
    if not walk.write_permille:
        return 0
    index = total = 0
    for chunk, length in _chunks(start, size, walk.stride):
        words = memoryview(vm.read_memory(chunk, length)).cast("Q")[:: walk.stride // 8].tolist()
        for address, found in zip(range(chunk, chunk + length, walk.stride), words, strict=True):
            if walk.is_write(index):
                total += address
                if found != address:
                    raise Mismatch(
                        f"the guest wrote {address:#x} at gpa {address:#x}, the host finds {found:#x}: "
                        "the guest's page is not the host's"
                    )
            index += 1
    return total & _MASK


def _range(walk: Walk) -> tuple[int, int]:
    return resolve(walk.start, ()), resolve(walk.size, ())


def _chunks(gpa: int, size: int, stride: int) -> Iterator[tuple[int, int]]:
    step = max(stride, _CHUNK // stride * stride)
    for start in range(gpa, gpa + size, step):
        yield start, min(step, gpa + size - start)
