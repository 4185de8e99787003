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
    """

    about: str
    arguments: tuple[str, ...] = ()
    base: str = SERIES_VERSION


VARIANTS = {
    "debug": Variant("KASAN, lockdep, fault injection and other checks; slow", ("page_poison=1",)),
    "kcsan": Variant("a detector of data races; slow"),
    "16k": Variant("16 KiB pages"),
    "64k": Variant("64 KiB pages"),
    "6.12": Variant("the long-term kernel 6.12", base="6.12"),
}


def arguments(name: str | None) -> tuple[str, ...]:
    """Kernel arguments of a variant; none for the ordinary kernel."""
    return VARIANTS[name].arguments if name else ()


def base(name: str | None) -> str:
    """The kernel version of a variant, or of the ordinary kernel."""
    return VARIANTS[name].base if name else SERIES_VERSION
