# SPDX-License-Identifier: Apache-2.0
"""Kconfig fragments: what they ask for, and whether Kconfig granted it.

Kconfig drops, without a word, what a line's dependencies do not allow; such a kernel would fail much later
and in stranger ways. So every line of a fragment is looked up in the resulting .config.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_SET = re.compile(r"(CONFIG_\w+)=(.+)")
_UNSET = re.compile(r"# (CONFIG_\w+) is not set")


@dataclass(frozen=True)
class Refused:
    """An option that came out otherwise than asked."""

    option: str
    wanted: str
    got: str

    def __str__(self) -> str:
        return f"{self.option}: wanted {self.wanted}, got {self.got}"


def parse(text: str) -> dict[str, str]:
    """Options of a fragment or a .config; one that is off has the value ``n``.

    :raises ValueError: a line is neither an option, a comment nor empty
    """
    options = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if match := _SET.fullmatch(line):
            options[match[1]] = match[2]
        elif match := _UNSET.fullmatch(line):
            options[match[1]] = "n"
        elif line and not line.startswith("#"):
            raise ValueError(f"line {number} is no Kconfig option: {line!r}")
    return options


def merged(base: str, *others: str) -> str:
    """Fragments as one, in which later ones win: what they have is left out of those before."""
    for other in others:
        own = parse(other)
        kept = [line for line in base.splitlines() if not own.keys() & parse(line).keys()]
        base = "\n".join([*kept, other])
    return base


def refused(fragment: str, result: str) -> tuple[Refused, ...]:
    """Options of ``fragment`` that ``result``, a .config, does not have. What is absent there is off."""
    granted = parse(result)
    return tuple(
        Refused(option, wanted, granted.get(option, "n"))
        for option, wanted in parse(fragment).items()
        if granted.get(option, "n") != wanted
    )
