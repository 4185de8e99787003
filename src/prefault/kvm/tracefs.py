# SPDX-License-Identifier: Apache-2.0
"""A trace instance: a buffer of its own in tracefs, which disturbs nobody else's tracing.

Source: Documentation/trace/ftrace.rst, Instances
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from prefault.errors import CapabilityMissing

TRACEFS = Path("/sys/kernel/tracing")
PROC = Path("/proc")

_numbers = itertools.count()


def has(event: str) -> bool:
    """Whether there is such an event, as far as this user may see: ``events/kvm/kvm_exit``.

    Ordinary users may not look into tracefs at all, for which Path.is_dir() would raise.
    """
    try:
        return (TRACEFS / event).is_dir()
    except OSError:
        return False


class Instance:
    """A trace instance, made when this is.

    :ivar folder: where it is
    :raises CapabilityMissing: it cannot be made
    """

    def __init__(self, purpose: str) -> None:
        """Make it; ``purpose`` is for the message if that fails: ``counting stage-2 faults``."""
        _remove_orphans()
        self.folder = TRACEFS / "instances" / f"prefault-{os.getpid()}-{next(_numbers)}"
        try:
            self.folder.mkdir()
        except OSError as error:
            raise CapabilityMissing(
                f"{self.folder} cannot be made: {error.strerror}; {purpose} needs root and a mounted tracefs "
                "(mount -t tracefs tracefs /sys/kernel/tracing)"
            ) from error

    @property
    def is_there(self) -> bool:
        """Whether nobody has removed it."""
        return self.folder.is_dir() and self.folder.parent.parent == TRACEFS

    def write(self, name: str, value: str) -> None:
        """Write one of its files."""
        (self.folder / name).write_text(value)

    def read(self, name: str) -> str:
        """Read one of its files."""
        return (self.folder / name).read_text()

    def total(self, *counters: str) -> int:
        """The sum of counters in the statistics of all CPUs: ``overrun``, ``dropped events``."""
        pattern = re.compile(rf"^(?:{'|'.join(counters)}): (\d+)", re.MULTILINE)
        files = self.folder.glob("per_cpu/cpu*/stats")
        return sum(int(number) for file in files for number in pattern.findall(file.read_text()))

    def close(self, events: Iterable[str]) -> None:
        """Disable its events and remove it. Safe to call again."""
        for event in events:
            with contextlib.suppress(OSError):
                self.write(f"{event}/enable", "0")
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _remove_orphans() -> None:
    """Remove instances of processes that were killed; one that is in use cannot be removed."""
    for folder in (TRACEFS / "instances").glob("prefault-*"):
        pid = folder.name.split("-")[1]
        if pid.isdecimal() and not (PROC / pid).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()
