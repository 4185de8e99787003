# SPDX-License-Identifier: Apache-2.0
"""How long work tells what it is doing. The CLI draws it; everything else may ignore it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of stages, and of steps within a stage."""

    def stage(self, name: str, steps: int = 0) -> None:
        """A new stage begins; ``steps`` is how many steps it will have, 0 if that is not known."""

    def step(self, name: str) -> None:
        """One step of the stage is done."""


class Silent:
    """Progress that nobody looks at."""

    def stage(self, name: str, steps: int = 0) -> None:
        """Say nothing."""

    def step(self, name: str) -> None:
        """Say nothing."""
