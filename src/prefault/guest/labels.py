# SPDX-License-Identifier: Apache-2.0
"""Names of places in machine code, which the assemblers of all architectures have."""

from __future__ import annotations

import abc


class Labels(abc.ABC):
    """What has labels, and knows how far its code is."""

    def __init__(self) -> None:
        self._labels: dict[str, int] = {}
        self._names = 0

    @property
    @abc.abstractmethod
    def offset(self) -> int:
        """Offset in bytes of the next instruction."""

    def fresh(self, stem: str) -> str:
        """A label name that nothing else has."""
        self._names += 1
        return f"{stem}.{self._names}"

    def label(self, name: str) -> None:
        """Give the next instruction a name."""
        if name in self._labels:
            raise ValueError(f"label {name} is defined twice")
        self._labels[name] = self.offset

    def place(self, name: str) -> int:
        """Offset of the instruction of that name."""
        if name not in self._labels:
            raise ValueError(f"label {name} is used but not defined")
        return self._labels[name]
