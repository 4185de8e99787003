# SPDX-License-Identifier: Apache-2.0
"""Kernels of the lab beside the ordinary one: the same source and series with another config.

The config is kernel/config/lab.config with the lines of kernel/config/NAME.config, which win.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """A kernel of its own.

    :ivar about: what it is for
    :ivar arguments: what its kernel must be told when it boots
    """

    about: str
    arguments: tuple[str, ...] = ()


VARIANTS = {
    "debug": Variant("KASAN, lockdep, fault injection and other checks; slow", ("page_poison=1",)),
    "kcsan": Variant("a detector of data races; slow"),
    "16k": Variant("16 KiB pages"),
    "64k": Variant("64 KiB pages"),
}


def arguments(name: str | None) -> tuple[str, ...]:
    """Kernel arguments of a variant; none for the ordinary kernel."""
    return VARIANTS[name].arguments if name else ()
