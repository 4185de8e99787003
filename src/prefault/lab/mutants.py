# SPDX-License-Identifier: Apache-2.0
"""Kernels with a mistake in the series: what scenarios and soaks must be able to tell from a right one.

A mutant is a patch on top of the series. The text before its diff says what the mistake is, and may end
with lines such as ``Mode: protected``, the mode of KVM in which it shows, ``Variant: debug``, the kernel
that notices it, ``Machine: mte``, if it takes guests with memory tags, and ``Equivalent: reason``, if nobody
can tell it from the right kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from prefault.errors import UsageError
from prefault.lab.build import KERNEL_FOLDER

_TRAILER = re.compile(r"^(Mode|Variant|Machine|Equivalent): (.+)$", re.MULTILINE)
_DIFF = re.compile(r"^---$", re.MULTILINE)
_LICENCE = "SPDX-License-Identifier:"


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    :ivar mistake: what is wrong, in a sentence
    :ivar mode: the mode of KVM in which it shows
    :ivar variant: the variant of the lab's kernel that notices it; None is the ordinary one
    :ivar mte: it takes guests with memory tags
    :ivar equivalent: why nobody can tell it from the right kernel; empty if somebody can
    """

    name: str
    patch: Path
    mistake: str
    mode: str = "nested"
    variant: str | None = None
    mte: bool = False
    equivalent: str = ""


def read(folder: Path = KERNEL_FOLDER / "mutants") -> list[Mutant]:
    """All mutants, by name.

    :raises UsageError: there are none
    """
    found = [_read_one(path) for path in sorted(folder.glob("*.patch"))]
    if not found:
        raise UsageError(f"{folder} has no mutants: run prefault from its repository (pip install -e .)")
    return found


def _read_one(path: Path) -> Mutant:
    head = _DIFF.split(path.read_text(), maxsplit=1)[0]
    trailers = dict(_TRAILER.findall(head))
    text = [line for line in _TRAILER.sub("", head).splitlines() if not line.startswith(_LICENCE)]
    return Mutant(
        name=path.stem,
        patch=path,
        mistake=" ".join(" ".join(text).split()),
        mode=trailers.get("Mode", "nested"),
        variant=trailers.get("Variant"),
        mte=trailers.get("Machine") == "mte",
        equivalent=trailers.get("Equivalent", ""),
    )


def choose(names: tuple[str, ...], mutants: list[Mutant]) -> list[Mutant]:
    """Those with these names; all, if there are no names.

    :raises UsageError: there is none of that name
    """
    known = {one.name: one for one in mutants}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UsageError(f"no mutant is called {', '.join(unknown)}; there are: {', '.join(known)}")
    return [known[name] for name in names] if names else mutants
