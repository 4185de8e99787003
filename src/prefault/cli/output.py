# SPDX-License-Identifier: Apache-2.0
"""Where a command's output goes: its result to standard output, everything else to standard error.

With ``--json`` the result is one object on standard output, on a line of its own::

    {"version": 1, "command": "run", ...}

and a command that fails prints ``{"version": 1, "command": "run", "error": {...}}`` instead.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import click
from rich.console import Console

JSON_VERSION = 1
"""Raised when a field changes its meaning or goes away, not when one is added."""

_Command = TypeVar("_Command", bound=Callable[..., object])

_JSON_KEY = "prefault.json"
"""Key in ``click.Context.meta`` that says whether ``--json`` was given."""


def json_option(command: _Command) -> _Command:
    """Give a command ``--json``; ask :func:`wants_json` whether it was given.

    The option is eager, so that bad values of other options are reported as JSON, too.
    """

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[_JSON_KEY] = value

    return click.option(
        "--json",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=remember,
        help="Print one versioned JSON object on standard output, and nothing else there.",
    )(command)


def wants_json(ctx: click.Context | None = None) -> bool:
    """Whether ``--json`` was given to the command that is running."""
    ctx = ctx or click.get_current_context(silent=True)
    return bool(ctx and ctx.meta.get(_JSON_KEY))


def stdout(width: int | None = None) -> Console:
    """Console for results. Made on each call, because tests exchange ``sys.stdout``."""
    return Console(highlight=False, soft_wrap=False, width=width)


def stderr() -> Console:
    """Console for progress and remarks."""
    return Console(stderr=True, highlight=False)


def emit(command: str, payload: Mapping[str, object]) -> None:
    """Print the JSON object of a command."""
    click.echo(json.dumps({"version": JSON_VERSION, "command": command, **payload}, default=_plain))


def emit_error(command: str, error: Mapping[str, object]) -> None:
    """Print the JSON object of a command that failed."""
    emit(command, {"error": error})


def _plain(value: object) -> object:
    """What ``json`` cannot write itself: dataclasses, enums, paths, sets and bytes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    raise TypeError(f"{type(value).__name__} has no JSON form")
