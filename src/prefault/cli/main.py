# SPDX-License-Identifier: Apache-2.0
"""The frame around the subcommands: the one place where exceptions become messages and exit codes."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NoReturn

import click

from prefault import __version__
from prefault.cli import output
from prefault.cli.lab import lab
from prefault.cli.probe import probe
from prefault.cli.run import run
from prefault.errors import ExitCode, PrefaultError

INTERRUPTED = 128 + signal.SIGINT
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


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="prefault")
def root() -> None:
    """Pre-fault the memory of arm64 KVM guests, and see what that saves.

    \b
    prefault probe             what the KVM of this machine offers
    prefault run               a guest walks its memory, without and with pre-faulting
    prefault lab build         build the kernel of the lab: arm64 KVM on any Linux machine
    """


root.add_command(probe)
root.add_command(run)
root.add_command(lab)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``prefault`` and return its exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    argv = list(sys.argv[1:] if arguments is None else arguments)
    ctx: click.Context | None = None
    try:
        with root.make_context("prefault", list(argv)) as ctx:
            root.invoke(ctx)
        sys.stdout.flush()
        return ExitCode.DONE
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except BrokenPipeError:
        _forget_stdout()
        return BROKEN_PIPE
    except click.ClickException as error:
        # The option parser may have stopped before it came to --json.
        error.show()
        return _end(argv, "--json" in argv, "UsageError", error.format_message(), ExitCode.USAGE)
    except (KeyboardInterrupt, click.Abort):
        click.echo("prefault: interrupted", err=True)
        return _end(argv, output.wants_json(ctx), "Interrupted", "interrupted", INTERRUPTED)
    except PrefaultError as error:
        click.echo(f"prefault: {error}", err=True)
        for note in getattr(error, "__notes__", ()):
            click.echo(note, err=True)
        as_json = output.wants_json(ctx)
        return _end(argv, as_json, type(error).__name__, str(error), error.exit_code, plain_attributes(error))
    except Exception as error:
        traceback.print_exc()
        as_json = output.wants_json(ctx)
        return _end(argv, as_json, type(error).__name__, str(error), ExitCode.OPERATING_ERROR)


def plain_attributes(error: PrefaultError) -> dict[str, object]:
    """The facts that an error carries, as far as JSON can hold them."""
    return {k: v for k, v in vars(error).items() if isinstance(v, str | int | float | list | tuple | None)}


def _end(
    argv: Sequence[str],
    as_json: bool,
    kind: str,
    message: str,
    exit_code: int,
    attributes: Mapping[str, object] | None = None,
) -> int:
    """Print the error object if there is someone to read it, and return the exit status."""
    if as_json:
        facts = {"type": kind, "message": message, "exit_code": int(exit_code), **(attributes or {})}
        output.emit_error(" ".join(_command_words(argv)), facts)
    return exit_code


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


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    """SIGTERM unwinds the stack as Ctrl-C does, so that children end and half files go away."""
    raise SystemExit(128 + number)


def _forget_stdout() -> None:
    """Keep the interpreter from flushing into the closed pipe when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
