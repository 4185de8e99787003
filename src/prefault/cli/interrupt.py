# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C or SIGTERM during long work: what was done by then is shown, and the status says that it is part."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass

import click

INTERRUPTED = 128 + signal.SIGINT
"""Exit status, as shells expect it."""


class Terminated(SystemExit):
    """SIGTERM has come: it unwinds the stack as Ctrl-C does, so that children end and half files go away."""

    exit_status = 128 + signal.SIGTERM

    def __init__(self) -> None:
        super().__init__(self.exit_status)


@dataclass
class Interruption:
    """Whether there was one, as the exit status that it makes; 0 if there was none."""

    exit_status: int = 0

    def status(self, otherwise: int) -> int:
        """How the command ends."""
        return self.exit_status or otherwise


@contextlib.contextmanager
def results_kept(found: Callable[[], Sized]) -> Iterator[Interruption]:
    """A block that Ctrl-C or SIGTERM ends without taking along what it has found.

    :param found: what there is to show; if that is nothing, the interruption goes on
    """
    interruption = Interruption()
    try:
        yield interruption
    except (KeyboardInterrupt, Terminated) as error:
        if not found():
            raise
        interruption.exit_status = error.exit_status if isinstance(error, Terminated) else INTERRUPTED
        click.echo("prefault: interrupted; this is what was done before:", err=True)
