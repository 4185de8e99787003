# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C during long work: what was done by then is shown, and the status says that it is not all."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass

import click

INTERRUPTED = 128 + signal.SIGINT
"""Exit status, as shells expect it."""


@dataclass
class Interruption:
    """Whether there was one."""

    happened: bool = False

    def status(self, otherwise: int) -> int:
        """How the command ends."""
        return INTERRUPTED if self.happened else otherwise


@contextlib.contextmanager
def results_kept(found: Callable[[], Sized]) -> Iterator[Interruption]:
    """A block that Ctrl-C ends without taking along what it has found.

    :param found: what there is to show; if that is nothing, the interruption goes on
    """
    interruption = Interruption()
    try:
        yield interruption
    except KeyboardInterrupt:
        if not found():
            raise
        interruption.happened = True
        click.echo("prefault: interrupted; this is what was done before:", err=True)
