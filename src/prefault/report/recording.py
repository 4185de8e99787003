# SPDX-License-Identifier: Apache-2.0
"""What is in a recording, as numbers and as a table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.table import Table

from prefault.faults.recording import Recording
from prefault.faults.syndrome import ACCESSES, KINDS
from prefault.report.units import format_duration, format_size, plural


@dataclass(frozen=True)
class Summary:
    """Of a recording.

    :ivar kinds: kind → access → number of faults
    :ivar timed: faults whose duration is known
    :ivar guest_stopped_ns: sum of these durations, over all vCPUs
    :ivar pages: distinct pages of ordinary memory with a translation fault
    :ivar vcpus: vCPUs, or threads where a vCPU's number is not known
    """

    faults: int
    kinds: dict[str, dict[str, int]]
    timed: int
    guest_stopped_ns: int
    pages: int
    vcpus: int
    nested: int


def summary(recording: Recording) -> Summary:
    """Count."""
    faults = recording.faults
    both = np.bincount(faults.kind.astype(np.int64) * 3 + faults.access, minlength=15).reshape(5, 3)
    kinds = {
        KINDS[kind]: {ACCESSES[access]: int(both[kind, access]) for access in range(3) if both[kind, access]}
        for kind in range(5)
        if both[kind].any()
    }
    timed = faults.duration_ns >= 0
    ordinary = (faults.kind == 0) & (faults.nested != 1)
    pages = np.unique(faults.ipa[ordinary] // np.uint64(recording.metadata.page_size))
    return Summary(
        faults=len(faults),
        kinds=kinds,
        timed=int(np.count_nonzero(timed)),
        guest_stopped_ns=int(faults.duration_ns[timed].sum()),
        pages=len(pages),
        vcpus=len(np.unique(recording.vcpu_labels())),
        nested=int(np.count_nonzero(faults.nested == 1)),
    )


def summary_table(recording: Recording, found: Summary) -> Table:
    """For people."""
    about = recording.metadata
    table = Table(
        title=f"{plural(found.faults, 'stage-2 fault')} in {format_duration(about.seconds * 1e9)}",
        title_justify="left",
    )
    table.add_column("")
    for name in (*ACCESSES, "all"):
        table.add_column(name, justify="right")
    for kind, by_access in found.kinds.items():
        cells = [f"{by_access[access]:,}" if access in by_access else "" for access in ACCESSES]
        table.add_row(kind, *cells, f"{sum(by_access.values()):,}")
    return table


def summary_lines(recording: Recording, found: Summary) -> list[str]:
    """What the table does not say."""
    about = recording.metadata
    memory = format_size(found.pages * about.page_size)
    lines = [
        f"{found.vcpus} {'vCPU or thread' if found.vcpus == 1 else 'vCPUs or threads'}; "
        f"{plural(found.pages, 'page')} of {format_size(about.page_size)} ({memory})"
    ]
    if found.timed:
        share = "" if found.timed == found.faults else f" ({found.timed:,} of the faults have a duration)"
        lines.append(f"vCPUs were stopped for {format_duration(found.guest_stopped_ns)} in all{share}")
    elif found.faults:
        lines.append("durations are not known: they need kvm:kvm_exit and kvm:kvm_entry in the same trace")
    if found.nested:
        lines.append(f"{found.nested:,} faults are of nested guests, which pre-faulting does not spare")
    return lines
