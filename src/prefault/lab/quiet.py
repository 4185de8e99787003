# SPDX-License-Identifier: Apache-2.0
"""A job on a kernel that does nothing of its own accord.

Left to themselves, khugepaged makes THPs and kcompactd moves pages whenever they come by.
"""

from __future__ import annotations

from collections.abc import Sequence

_KHUGEPAGED = "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs"
_KCOMPACTD = "/proc/sys/vm/compaction_proactiveness"
_NEVER = (1 << 32) - 1


def quietly(argv: Sequence[str]) -> tuple[str, ...]:
    """A command line that lets both rest before it begins."""
    rest = f"echo {_NEVER} >{_KHUGEPAGED}; echo 0 >{_KCOMPACTD}"
    return ("sh", "-c", f'{rest}; exec "$@"', "sh", *argv)
