# SPDX-License-Identifier: Apache-2.0
"""Drawing progress: a bar on a terminal, a line now and then elsewhere. Always on standard error."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import click
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from prefault.cli import output
from prefault.lab.progress import Progress

LINE_SECONDS = 15.0
"""How often a log gets a line about a stage that goes on."""


class Drawing:
    """Progress on a terminal."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=None, what="")

    def stage(self, name: str, steps: int = 0) -> None:
        """Begin the bar again under another name."""
        self._bar.reset(self._task, total=steps or None, description=name, what="")

    def step(self, name: str) -> None:
        """Move the bar by one."""
        self._bar.update(self._task, advance=1, what=name.strip()[:60])


class Lines:
    """Progress in a log."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()
        self._name = ""
        self._steps = self._done = 0

    def stage(self, name: str, steps: int = 0) -> None:
        """One line for the stage."""
        self._name, self._steps, self._done = name, steps, 0
        self._say("")

    def step(self, name: str) -> None:
        """A line if the last one was long ago."""
        self._done += 1
        if time.monotonic() - self._said >= LINE_SECONDS:
            share = f" {min(99, 100 * self._done // self._steps)} %" if self._steps else ""
            self._say(f"{share} {name.strip()}")

    def _say(self, rest: str) -> None:
        self._said = time.monotonic()
        click.echo(f"[{self._said - self._began:4.0f} s] {self._name}{rest}", err=True)


@contextlib.contextmanager
def drawn() -> Iterator[Progress]:
    """Show progress while the block runs."""
    console = output.stderr()
    if not console.is_terminal:
        yield Lines()
        return
    columns = (
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[what]}", style="dim"),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        yield Drawing(bar)
