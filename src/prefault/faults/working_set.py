# SPDX-License-Identifier: Apache-2.0
"""The working set of a run: which pages of memory the guest needed, when first, and what it paid for them.

Only faults that pre-faulting can spare count: translation faults on memory, of the guest itself. What is a
device is told by the recording's kind ``mmio``, by memslots, or else by how often a page faults
(DEVICE_FAULTS).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prefault.faults.plan import END
from prefault.faults.recording import Recording
from prefault.faults.syndrome import Access, Kind

DEVICE_FAULTS = 16
"""Without better knowledge, a page of an arm64 guest with so many translation faults, by data accesses only
and with no permission fault, is taken for a device: memory stays mapped, a device never is."""

DEVICE_FAULTS_OF_ONE = 4
"""And one thread must have taken so many of them: memory that many vCPUs need at once is no device."""

LONG = 100
"""A fault that took so many times what most take was not about its page: its vCPU was stopped meanwhile, or
the host was waiting for something. It counts as one that took no more than this."""

Int64 = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Memslot:
    """A range of the guest's memory."""

    ipa: int
    size: int


@dataclass(frozen=True)
class WorkingSet:
    """Of one run; arrays have a value for each page, in order of address.

    :ivar page: number of the page: IPA divided by the page size
    :ivar first_ns: when it was first needed, from the run's first fault
    :ivar written: whether that was by a write
    :ivar faults: how many faults it would have spared to have it mapped
    :ivar wait_ns: how long those took, as far as is known
    :ivar timed: how many of them have a duration
    :ivar memory_faults: translation faults on memory, all of them
    :ivar memory_wait_ns: how long those took, as far as is known
    :ivar memory_timed: how many of them have a duration
    :ivar median_ns: how long one of them took in the middle; 0 if that is not known
    :ivar long: how many of them took ``LONG`` times that, or more
    :ivar devices: pages that were taken for devices
    """

    page_size: int
    page: npt.NDArray[np.uint64]
    first_ns: Int64
    written: Flags
    faults: Int64
    wait_ns: Int64
    timed: Int64
    memory_faults: int
    memory_wait_ns: int
    memory_timed: int
    median_ns: float
    long: int
    devices: int


def working_set(recording: Recording, memslots: Sequence[Memslot] = ()) -> WorkingSet:
    """Find it."""
    faults, size = recording.faults, recording.metadata.page_size
    start = int(faults.time_ns[0]) if len(faults) else 0
    ordinary = (faults.kind == Kind.TRANSLATION) & (faults.nested != 1) & (faults.ipa < np.uint64(END))
    if memslots:
        ordinary &= inside(faults.ipa, memslots)
        devices = np.empty(0, np.uint64)
    else:
        devices = _devices(recording, ordinary)
        ordinary &= ~np.isin(faults.ipa // np.uint64(size), devices)
    memory = faults.take(ordinary)
    page, first, index = np.unique(memory.ipa // np.uint64(size), return_index=True, return_inverse=True)
    began = _began(recording, ordinary)[ordinary]
    spared = began <= memory.time_ns[first][index] + np.maximum(memory.duration_ns[first][index], 0)
    timed = memory.duration_ns >= 0
    known = spared & timed
    median = float(np.median(memory.duration_ns[timed])) if timed.any() else 0.0
    usual = np.minimum(memory.duration_ns, max(int(LONG * median), 1))
    count = len(page)
    return WorkingSet(
        page_size=size,
        page=page,
        first_ns=memory.time_ns[first] - start,
        written=memory.access[first] == Access.WRITE,
        faults=np.bincount(index[spared], minlength=count),
        wait_ns=np.bincount(index[known], usual[known], minlength=count).astype(np.int64),
        timed=np.bincount(index[known], minlength=count),
        memory_faults=len(memory),
        memory_wait_ns=int(np.maximum(memory.duration_ns, 0).sum()),
        memory_timed=int(np.count_nonzero(timed)),
        median_ns=median,
        long=int(np.count_nonzero(memory.duration_ns > usual)),
        devices=len(devices),
    )


def inside(ipa: npt.NDArray[np.uint64], memslots: Sequence[Memslot]) -> Flags:
    """Whether each address is in a memslot."""
    found = np.zeros(len(ipa), np.bool_)
    for slot in memslots:
        found |= (ipa >= np.uint64(slot.ipa)) & (ipa - np.uint64(slot.ipa) < np.uint64(slot.size))
    return found


def _devices(recording: Recording, ordinary: Flags) -> npt.NDArray[np.uint64]:
    """Pages that look like devices, if the recording does not tell devices itself."""
    faults, size = recording.faults, np.uint64(recording.metadata.page_size)
    told = recording.metadata.architecture != "aarch64" or np.any(faults.kind == Kind.MMIO)
    if told:
        return np.empty(0, np.uint64)
    data = ordinary & (faults.access != Access.EXECUTE)
    page, index, count = np.unique(faults.ipa[data] // size, return_inverse=True, return_counts=True)
    often = count[index] >= DEVICE_FAULTS
    most = _most_of_one(index[often], faults.tid[data][often], len(page))
    memory = faults.ipa[(faults.kind == Kind.PERMISSION) | (faults.access == Access.EXECUTE)] // size
    found: npt.NDArray[np.uint64] = page[(most >= DEVICE_FAULTS_OF_ONE) & ~np.isin(page, memory)]
    return found


def _most_of_one(index: Int64, tid: npt.NDArray[np.int32], pages: int) -> Int64:
    """The faults on each page that one thread took, of the thread that took most."""
    threads, number = np.unique(tid, return_inverse=True)
    each, count = np.unique(index * max(1, len(threads)) + number, return_counts=True)
    most = np.zeros(pages, np.int64)
    np.maximum.at(most, each // max(1, len(threads)), count)
    return most


def _began(recording: Recording, ordinary: Flags) -> Int64:
    """Of each fault: its time, or that of the first of those that it repeats.

    A fault would not have been, had its page been mapped, if it is the first on the page, if another vCPU
    took it while that one was served, or if it repeats such a one: KVM lets a vCPU try again, and so fault
    again, when the host was changing something. Other faults on the page mean that the host has taken the
    mapping away again, which it would have done with a pre-faulted one, too.
    """
    faults = recording.faults
    order = np.argsort(faults.tid, kind="stable")
    page, tid = faults.ipa[order] // np.uint64(recording.metadata.page_size), faults.tid[order]
    again = np.zeros(len(order), np.bool_)
    again[1:] = (page[1:] == page[:-1]) & (tid[1:] == tid[:-1])
    again[1:] &= ordinary[order][1:] & ordinary[order][:-1]
    start = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
    began = np.empty(len(order), np.int64)
    began[order] = faults.time_ns[order][start]
    return began
