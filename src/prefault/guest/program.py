# SPDX-License-Identifier: Apache-2.0
"""Guest programs as data.

A ``Program`` is a list of steps that say what a guest does, not how: ``guest.compile`` turns them
into AArch64 code for a real vCPU, the spec interprets them. Both keep one *value*, 64 bits wide,
which the reading steps set and ``Report`` and ``Expect`` use.

The guest talks to the host through the *port*: a page of device memory outside of every memslot.
A write to it is an MMIO exit, which ``guest.port`` decodes, and the guest stands still in that
exit until the host runs the vCPU again.

Standard library only: this module also runs inside the lab's root file system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefault.errors import UsageError

PORT = 0x0900_0000
"""IPA of the port, for L1 and L2 alike. No memslot may cover it."""

PORT_SIZE = 0x1_0000
"""One page of the largest granule, so that one stage-2 entry of an L1 maps it."""

RET = bytes.fromhex("c0035fd6")
"""The instruction ``ret``: what must stand where ``Execute`` jumps."""

WIDTHS = (1, 2, 4, 8)
"""Bytes that one access can have."""

MAX_ARGUMENTS = 8
"""How many arguments a program can use."""


@dataclass(frozen=True)
class Argument:
    """The ``index``-th of the arguments given to ``Vcpu.load``, in the place of a number."""

    index: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < MAX_ARGUMENTS:
            raise UsageError(f"Argument({self.index}): a program has arguments 0 to {MAX_ARGUMENTS - 1}")


Operand = int | Argument
"""A 64-bit number known when the program is written, or when a vCPU is pointed at it."""


@dataclass(frozen=True)
class Step:
    """One thing that a guest does."""


def _check_width(step: Step, gpa: Operand, width: int) -> None:
    if width not in WIDTHS:
        raise UsageError(f"{type(step).__name__}: width {width} is none of {WIDTHS}")
    if isinstance(gpa, int) and gpa % width:
        # Stage 1 is off, so the guest's data accesses are Device memory: unaligned ones fault.
        raise UsageError(f"{type(step).__name__}: gpa {gpa:#x} is not aligned to its width {width}")


@dataclass(frozen=True)
class Read(Step):
    """Read memory; the value becomes what was read, zero-extended."""

    gpa: Operand
    width: int = 8

    def __post_init__(self) -> None:
        _check_width(self, self.gpa, self.width)


@dataclass(frozen=True)
class Write(Step):
    """Write the low ``width`` bytes of ``data`` to memory."""

    gpa: Operand
    data: Operand
    width: int = 8

    def __post_init__(self) -> None:
        _check_width(self, self.gpa, self.width)


@dataclass(frozen=True)
class Execute(Step):
    """Call the function at ``gpa``, where the host has put ``RET``."""

    gpa: Operand

    def __post_init__(self) -> None:
        _check_width(self, self.gpa, 4)


@dataclass(frozen=True)
class Walk(Step):
    """Touch 8 bytes at ``start``, ``start + stride``, … below ``start + size``, in order.

    Which accesses are writes is decided by ``is_write``: ``write_permille`` of 1000, spread evenly.
    A write stores its own address. The value becomes the sum, modulo 2⁶⁴, of all that was read.
    """

    start: Operand
    size: Operand
    stride: int
    write_permille: int = 0

    def __post_init__(self) -> None:
        _check_width(self, self.start, 8)
        if self.stride <= 0 or self.stride % 8:
            raise UsageError(f"Walk: stride {self.stride} is not a positive multiple of 8")
        if isinstance(self.size, int) and self.size <= 0:
            raise UsageError(f"Walk: size {self.size} is not positive")
        if not 0 <= self.write_permille <= 1000:
            raise UsageError(f"Walk: write_permille {self.write_permille} is not in 0 to 1000")

    def is_write(self, index: int) -> bool:
        """Whether the ``index``-th access of the walk writes."""
        return (index * self.write_permille) % 1000 + self.write_permille >= 1000


@dataclass(frozen=True)
class DeviceRead(Step):
    """Read where no memslot is: an MMIO exit. The value becomes the whole target register.

    ``register_bits`` 32 loads a W register (its upper half becomes 0), 64 an X register.
    """

    gpa: Operand
    width: int = 8
    sign_extend: bool = False
    register_bits: int = 64

    def __post_init__(self) -> None:
        _check_width(self, self.gpa, self.width)
        if self.register_bits not in (32, 64):
            raise UsageError(f"DeviceRead: register_bits {self.register_bits} is neither 32 nor 64")
        if self.sign_extend and self.width * 8 >= self.register_bits:
            raise UsageError(
                f"DeviceRead: {self.width} bytes cannot be sign-extended to {self.register_bits} bits"
            )
        if self.width * 8 > self.register_bits:
            raise UsageError(f"DeviceRead: {self.width} bytes do not fit into {self.register_bits} bits")


@dataclass(frozen=True)
class DeviceWrite(Step):
    """Write the low ``width`` bytes of ``data`` where no memslot is: an MMIO exit."""

    gpa: Operand
    data: Operand
    width: int = 8

    def __post_init__(self) -> None:
        _check_width(self, self.gpa, self.width)


@dataclass(frozen=True)
class Marker(Step):
    """Tell the host that the guest has come here, and stand still until it is run again."""

    number: int


@dataclass(frozen=True)
class Report(Step):
    """Send the value to the host."""


@dataclass(frozen=True)
class Expect(Step):
    """Fail if the value is not ``value``."""

    value: Operand


@dataclass(frozen=True)
class L2Mapping:
    """Leaves of L1's own stage-2 table: L2 IPAs ``[ipa, ipa+size)`` are L1 IPAs from ``gpa``.

    ``level`` is that of the leaves: 3 for pages, lower for blocks. ``ipa``, ``gpa`` and ``size``
    must be multiples of what a leaf of that level maps with the granule in use.
    """

    ipa: int
    gpa: int
    size: int
    level: int = 3
    readable: bool = True
    writable: bool = True
    executable: bool = True


@dataclass(frozen=True)
class EnterL2(Step):
    """As L1, run ``steps`` as L2 at EL1 under a stage-2 table of L1's making; then go on as L1.

    The port and the program's own code are mapped one to one besides ``mappings``.
    Needs a vCPU with ``VcpuConfig.el2``.
    """

    steps: tuple[Step, ...]
    mappings: tuple[L2Mapping, ...] = ()

    def __post_init__(self) -> None:
        if any(isinstance(step, EnterL2) for step in self.steps):
            raise UsageError("EnterL2: an L2 cannot enter an L2 of its own here")


@dataclass(frozen=True)
class TlbiIpa(Step):
    """As L1, invalidate the leaf at an IPA of the L2 that was entered last: TLBI IPAS2E1.

    :ivar level: level of the leaf in L1's table, as a hint; 0 gives none
    """

    ipa: int
    level: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 3:
            raise UsageError(f"TlbiIpa: level {self.level} is not in 0 to 3")


@dataclass(frozen=True)
class TlbiRange(Step):
    """As L1, invalidate a range of IPAs of the L2 that was entered last: TLBI RIPAS2E1.

    ``size`` must be 1 to 32 times 2, 64, 2048 or 65536 pages.
    """

    ipa: int
    size: int


@dataclass(frozen=True)
class Program:
    """What a guest does, and where in guest memory its code and tables lie.

    After the last step the guest tells the host that it is done, as often as it is run.
    An exception that it takes, at EL1 or at virtual EL2, ends it as failed.

    :ivar steps: in order
    :ivar base: gpa of the image, 64 KiB-aligned; a memslot must be there
    """

    steps: tuple[Step, ...]
    base: int = 0x4000_0000

    def __post_init__(self) -> None:
        if self.base % PORT_SIZE:
            raise UsageError(f"Program: base {self.base:#x} is not aligned to {PORT_SIZE:#x}")

    @property
    def nested(self) -> bool:
        """Whether the program has to do with an L2, so that it needs a vCPU with EL2."""
        return any(isinstance(step, EnterL2 | TlbiIpa | TlbiRange) for step in self.steps)

    @property
    def argument_count(self) -> int:
        """How many arguments ``Vcpu.load`` must be given."""
        return _argument_count(self.steps)


def _argument_count(steps: tuple[Step, ...]) -> int:
    count = 0
    for step in steps:
        if isinstance(step, EnterL2):
            count = max(count, _argument_count(step.steps))
        for operand in vars(step).values():
            if isinstance(operand, Argument):
                count = max(count, operand.index + 1)
    return count


def resolve(operand: Operand, arguments: Sequence[int]) -> int:
    """The number that ``operand`` stands for."""
    if isinstance(operand, int):
        return operand
    if operand.index >= len(arguments):
        raise UsageError(f"the program uses argument {operand.index}, but {len(arguments)} were given")
    return arguments[operand.index]
