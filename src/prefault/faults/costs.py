# SPDX-License-Identifier: Apache-2.0
"""What faults and pre-faulting cost: from a recording, given, or estimated from figures of the lab.

The figures are instructions (report/figures.json for arm64 with the series). A recording tells what a fault
cost there, in ns; that gives the ns of an instruction there, and with it an estimate of what pre-faulting
would cost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

from prefault.errors import UsageError

POPULATED = "private/write"
"""Memory that the host has populated for writing, as after a restore that reads the memory file."""

UNTOUCHED = "private/nothing"
"""Memory that nobody has written yet, as of a guest that boots, or of a mapped file with holes."""

CALL = 2600.0
"""Instructions of a KVM_PRE_FAULT_MEMORY call without what it maps: docs/cost.md has 3,777 for the call that
maps one leaf of ``hugetlb-1G/resident``, and 1,206 for a block among others. Taken for x86, too."""

_BLOCKS = ("thp", "hugetlb")
BLOCK = 2 << 20


@dataclass(frozen=True)
class Figures:
    """Instructions, for memory of some backing in some state.

    :ivar read: a fault by a read
    :ivar write: a fault by a write
    :ivar prefault: pre-faulting one page, or one block if ``block``
    :ivar permission: a write to what was pre-faulted: copy-on-write is broken, and the guest faults twice; 0
        if such a write does not fault
    """

    read: float
    write: float
    prefault: float
    permission: float
    block: bool


_X86 = {
    "private/write": Figures(3059, 3059, 2407, 0, False),
    "shared/write": Figures(3059, 3059, 2407, 0, False),
    "private/nothing": Figures(4433, 9240, 3781, 13332, False),
    "thp/write": Figures(10.5 * 512, 10.5 * 512, 2560, 0, True),
}
"""Measured on Linux 7.3.4 with SVM under emulation, page at a time as x86 does it; per 4 KiB page, or
block."""


def figures(architecture: str, memory: str) -> Figures:
    """The figures of an architecture for ``private/write`` and the like.

    :raises UsageError: there are none
    """
    table = _X86 if architecture == "x86_64" else _arm64()
    if memory not in table:
        raise UsageError(f"--memory {memory}: on {architecture} there are figures for {', '.join(table)}")
    return table[memory]


def kinds_of_memory() -> list[str]:
    """What there are figures for, on any architecture."""
    return list(_arm64())


def _arm64() -> dict[str, Figures]:
    values = json.loads(files("prefault.report").joinpath("figures.json").read_text())
    found = {}
    for memory, prefault in values["prefault"].items():
        faults = values["faults"]["guest"][memory]
        permission = faults["prefaulted"].get("permission", 0.0)
        block = memory.startswith(_BLOCKS)
        without = faults["without"]
        found[memory] = Figures(without["read"], without["write"], prefault, permission, block)
    return found


@dataclass(frozen=True)
class Costs:
    """In ns.

    :ivar call: of the ioctl, beside what it maps; 0 if the cost of a page was given, which has all in it then
    :ivar source: ``recording``, ``given`` or ``estimate``
    """

    fault: float
    prefault: float
    call: float
    permission: float
    block: bool
    source: str
    memory: str


@dataclass(frozen=True)
class Given:
    """What the user knows better.

    :ivar memory: backing and state of the guest's memory when it is pre-faulted
    :ivar fault: cost of a fault in ns
    :ivar prefault: cost of pre-faulting one page (one block, of huge pages) in ns
    """

    memory: str = POPULATED
    fault: float | None = None
    prefault: float | None = None


def costs(architecture: str, given: Given, reads: int, writes: int, measured: float | None) -> Costs:
    """The costs to reckon with.

    :param reads: faults by reads, of those that would be saved; they weigh the figures
    :param writes: faults by writes
    :param measured: mean duration of such a fault in the recording in ns, None if not known
    """
    known = figures(architecture, given.memory)
    count = reads + writes
    instructions = (reads * known.read + writes * known.write) / count if count else known.read
    fault = given.fault if given.fault is not None else measured
    scale = 1.0 if fault is None else fault / instructions
    source = "given" if given.fault is not None else "recording" if measured is not None else "estimate"
    prefault = given.prefault if given.prefault is not None else known.prefault * scale
    return Costs(
        fault=instructions if fault is None else fault,
        prefault=prefault,
        call=CALL * scale if given.prefault is None else 0.0,
        permission=known.permission * scale,
        block=known.block,
        source=source,
        memory=given.memory,
    )
