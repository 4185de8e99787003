# SPDX-License-Identifier: Apache-2.0
"""Huge pages of this host, read and reserved through sysfs."""

from __future__ import annotations

import contextlib
from pathlib import Path

from prefault.errors import CapabilityMissing, UsageError

_HUGETLB = Path("/sys/kernel/mm/hugepages")
_THP = Path("/sys/kernel/mm/transparent_hugepage")


def sizes() -> dict[int, int]:
    """hugetlb page sizes in bytes, with how many pages of each can be had.

    A page that a mapping has reserved, but not touched yet, is free and spoken for.
    """
    found = {}
    for folder in sorted(_HUGETLB.glob("hugepages-*kB")):
        kib = int(folder.name.removeprefix("hugepages-").removesuffix("kB"))
        free, reserved = (int((folder / f"{name}_hugepages").read_text()) for name in ("free", "resv"))
        found[kib << 10] = free - reserved
    return found


def default_size() -> int:
    """The default hugetlb page size in bytes, 0 if there is no hugetlb."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Hugepagesize:"):
            return int(line.split()[1]) << 10
    return 0


def thp_mode() -> str:
    """``always``, ``madvise`` or ``never``; empty if the kernel has no THP."""
    try:
        text = (_THP / "enabled").read_text()
    except OSError:
        return ""
    return text.partition("[")[2].partition("]")[0]


def pmd_size() -> int:
    """Bytes that a THP has, 0 if the kernel has no THP."""
    try:
        return int((_THP / "hpage_pmd_size").read_text())
    except OSError:
        return 0


class Reservation:
    """Keeps ``count`` huge pages of a size available until closed, adding to the pool if needed."""

    def __init__(self, page_size: int, count: int) -> None:
        free = sizes()
        if page_size not in free:
            known = ", ".join(hex(size) for size in free) or "none"
            raise UsageError(
                f"hugetlb page size {page_size:#x} does not exist on this host; there are: {known}"
            )
        self._pool = _HUGETLB / f"hugepages-{page_size >> 10}kB" / "nr_hugepages"
        self._added = max(0, count - free[page_size])
        if not self._added:
            return
        before = int(self._pool.read_text())
        with contextlib.suppress(OSError):
            self._pool.write_text(str(before + self._added))
        got = int(self._pool.read_text()) - before
        if got < self._added:
            wanted, self._added = self._added, max(0, got)
            self.close()
            raise CapabilityMissing(
                f"{wanted} more huge pages of {page_size:#x} bytes are needed, {got} could be had; "
                f"as root: echo {before + wanted} > {self._pool}"
            )

    def close(self) -> None:
        """Give back what was added to the pool. Safe to call again."""
        added, self._added = self._added, 0
        if added:
            with contextlib.suppress(OSError):
                self._pool.write_text(str(max(0, int(self._pool.read_text()) - added)))
