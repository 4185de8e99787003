# SPDX-License-Identifier: Apache-2.0
"""Kernels of the lab beside the ordinary one: with another config, or of another base.

The config is kernel/config/lab.config with the lines of kernel/config/NAME.config, which win. A variant with
a base of its own has the series of that base.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefault.lab.source import SERIES_VERSION


@dataclass(frozen=True)
class Variant:
    """A kernel of its own.

    :ivar about: what it is for
    :ivar arguments: what its kernel must be told when it boots
    :ivar base: the kernel version, one of ``source.PACKAGES``
    :ivar memory_mib: what the machine needs for all scenarios, blocks of level 2 among them
    :ivar slow: how many times longer than on the ordinary kernel something may take
    """

    about: str
    arguments: tuple[str, ...] = ()
    base: str = SERIES_VERSION
    memory_mib: int = 3072
    slow: int = 1


_HUNG_TASKS = "sysctl.kernel.hung_task_timeout_secs=1200"
"""Ten times the usual. A change of memslots waits until no MMU notifier is at work. Each takes seconds there
where it takes the shadow MMUs of nested guests apart, and two threads that madvise without a pause hold it up
for minutes."""

VARIANTS = {
    "debug": Variant(
        "KASAN, lockdep, fault injection and other checks; slow",
        ("page_poison=1", _HUNG_TASKS),
        memory_mib=4096,
        slow=10,
    ),
    "kcsan": Variant("a detector of data races; slow", (_HUNG_TASKS,), slow=10),
    "16k": Variant("16 KiB pages", slow=2),
    "64k": Variant("64 KiB pages", memory_mib=10240, slow=2),
    "6.12": Variant("the long-term kernel 6.12", base="6.12"),
}
_ORDINARY = Variant("what the lab boots unless told otherwise")


def of(name: str | None) -> Variant:
    """A variant by its name; None is the ordinary kernel."""
    return VARIANTS[name] if name else _ORDINARY
