# SPDX-License-Identifier: Apache-2.0
"""The frame around the subcommands: the one place where exceptions become messages and exit codes."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

import click

from prefault import __version__
from prefault.cli import output
from prefault.cli.apply import apply
from prefault.cli.bench import bench
from prefault.cli.bisectable import bisectable
from prefault.cli.conform import conform
from prefault.cli.explore import explore
from prefault.cli.interrupt import INTERRUPTED, Terminated
from prefault.cli.lab import lab
from prefault.cli.map import map_
from prefault.cli.mutants import mutants
from prefault.cli.plan import plan
from prefault.cli.probe import probe
from prefault.cli.record import record
from prefault.cli.run import run
from prefault.cli.soak import soak
from prefault.cli.vm import vm
from prefault.errors import ExitCode, PrefaultError

BROKEN_PIPE = 128 + signal.SIGPIPE

EPILOG = """\b
Exit codes:
  0    done
  1    checked, and it does not hold
  2    wrong usage
  3    operating error
  77   a tool, right or capability is not here
  124  timed out
  125  the lab was lost
  130  interrupted"""

SURROUNDINGS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE, errno.EFBIG}
"""What the machine around may answer at any time: a message will do, a traceback would only hide it."""

_REMEDY = "make room or name another place (the lab's: `prefault lab clean`, XDG_CACHE_HOME), then try again"


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="prefault")
def root() -> None:
    """Pre-fault the memory of arm64 KVM guests, and see what that saves.

    \b
    prefault probe             what the KVM of this machine offers
    prefault run               a guest walks its memory, without and with pre-faulting
    prefault map               the stage-2 tables of a VM, drawn
    prefault record            the stage-2 faults of a live VM, or of a trace
    prefault plan              what to pre-fault of what was recorded, and whether it pays
    prefault apply             a plan, in a VMM that runs and knows nothing of it
    prefault conform           the same scenarios on the specification and on a real kernel
    prefault explore           races on the specification, in every order
    prefault bench             what pre-faulting costs, and what it spares, in instructions
    prefault vm boot           a Linux guest: boot, snapshot, restore
    prefault lab build         build the kernel of the lab: arm64 KVM on any Linux machine
    """


root.add_command(probe)
root.add_command(run)
root.add_command(map_)
root.add_command(record)
root.add_command(plan)
root.add_command(apply)
root.add_command(conform)
root.add_command(explore)
root.add_command(bench)
root.add_command(vm)
root.add_command(lab)
lab.add_command(soak)
lab.add_command(mutants)
lab.add_command(bisectable)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``prefault`` and return its exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As standard error has it: names of files may be no text, and terminals may know no "µs".
        sys.stdout.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if arguments is None else arguments)
    ctx: click.Context | None = None
    status: int = ExitCode.DONE
    try:
        try:
            with root.make_context("prefault", list(argv), obj=tuple(argv)) as ctx:
                root.invoke(ctx)
        except click.exceptions.Exit as leave:
            status = leave.exit_code
        sys.stdout.flush()  # here, where an error of it can still be told
    except BrokenPipeError:
        _forget_stdout()
        return BROKEN_PIPE
    except (Exception, KeyboardInterrupt) as error:
        failure = _explain(error)
        # Of wrong usage, the option parser may have stopped before it came to --json.
        if output.wants_json(ctx) or ("--json" in argv and isinstance(error, click.ClickException)):
            _emit(failure, " ".join(_command_words(argv)))
        _flush_if_possible()
        return failure.exit_code
    return status


@dataclass(frozen=True)
class Failure:
    """What a command that failed says of itself under ``--json``."""

    type: str
    message: str
    exit_code: int
    attributes: Mapping[str, object] = field(default_factory=dict)
    """The facts that the error carries, as far as JSON can hold them."""


def _explain(error: BaseException) -> Failure:
    """Tell the user on standard error what went wrong."""
    kind = type(error).__name__
    match error:
        case click.Abort() | KeyboardInterrupt():
            click.echo("prefault: interrupted", err=True)
            return Failure("Interrupted", "interrupted", INTERRUPTED)
        case click.ClickException():
            error.show()
            return Failure("UsageError", error.format_message(), ExitCode.USAGE)
        case PrefaultError():
            click.echo("\n".join((f"prefault: {error}", *getattr(error, "__notes__", ()))), err=True)
            return Failure(kind, str(error), error.exit_code, _plain_attributes(error))
        case OSError(errno=number, strerror=text, filename=name) if number in SURROUNDINGS:
            # An error of open() has a name; one of write() has none.
            message = f"{text}{f': {name}' if name else ''}; {_REMEDY}"
            click.echo(f"prefault: {message}", err=True)
            return Failure(kind, message, ExitCode.OPERATING_ERROR, {"errno": number})
    traceback.print_exception(error)
    return Failure(kind, str(error), ExitCode.OPERATING_ERROR)


def _plain_attributes(error: PrefaultError) -> dict[str, object]:
    return {k: v for k, v in vars(error).items() if isinstance(v, str | int | float | list | tuple | None)}


def _emit(failure: Failure, command: str) -> None:
    facts = {"type": failure.type, "message": failure.message, "exit_code": int(failure.exit_code)}
    with contextlib.suppress(OSError):  # standard output may be what failed
        output.emit_error(command, {**facts, **failure.attributes})


def _flush_if_possible() -> None:
    """Leave nothing for the interpreter to flush, and to fail with, at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        _forget_stdout()


def _command_words(argv: Sequence[str]) -> list[str]:
    """The subcommand that ``argv`` names: ``["lab", "build"]``."""
    words: list[str] = []
    group: click.Command = root
    for word in argv:
        if not isinstance(group, click.Group) or word not in group.commands:
            break
        words.append(word)
        group = group.commands[word]
    return words


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated


def _forget_stdout() -> None:
    """Keep the interpreter from flushing into the closed pipe when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
