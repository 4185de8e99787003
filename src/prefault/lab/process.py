# SPDX-License-Identifier: Apache-2.0
"""Child processes that do not outlive what started them.

Each child leads a process group of its own. However the ``with`` block ends, Ctrl-C included, the whole
group is gone afterwards; and if this process is killed outright, the kernel kills the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from prefault.errors import LabError, PrefaultError, ToolMissing

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_GRACE_SECONDS = 2


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """A block at whose end Ctrl-C or SIGTERM comes, if it came during it.

    Python interrupts the main thread alone; in another there is nothing to hold.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for each in came:
            signal.raise_signal(each)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        _signal_group(child, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_SECONDS)
    _signal_group(child, signal.SIGKILL)
    child.wait()
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            stream.close()


@contextlib.contextmanager
def running(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program; its process group is gone when the block ends.

    :param environment: variables on top of this process's own
    :raises ToolMissing: there is no such program
    """
    with contextlib.ExitStack() as ending:
        with _signals_held():  # inside Popen() it would leave a child that nobody knows of
            try:
                child = subprocess.Popen(
                    list(argv),
                    cwd=cwd,
                    env={**os.environ, **(environment or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    process_group=0,
                    preexec_fn=_die_with_parent,  # one prctl, safe between fork and exec
                )
            except FileNotFoundError as error:
                raise ToolMissing(f"{argv[0]} is not installed: see `prefault lab doctor`") from error
            ending.callback(_end, child)
        yield child


def run(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> tuple[int, str]:
    """Run a program to its end.

    :param on_line: told each line of output as it comes
    :returns: exit status, and standard output and error together as text
    """
    lines = []
    with running(
        argv, cwd=cwd, environment=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        assert child.stdout is not None
        for raw in child.stdout:
            line = raw.decode(errors="replace")
            lines.append(line)
            if on_line is not None:
                on_line(line.rstrip("\n"))
        status = child.wait()
    return status, "".join(lines)


def check(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    failure: type[PrefaultError] = LabError,
    hint: str = "",
) -> str:
    """Run a program that must succeed.

    :param hint: what the message of a failure begins with
    :returns: its output
    :raises LabError: (or ``failure``) it ended with another status than 0; the message has its last lines
    """
    status, output = run(argv, cwd=cwd, environment=environment)
    if status != 0:
        tail = "\n".join(output.rstrip().splitlines()[-10:])
        what = f"`{shlex.join(argv)}` ended with status {status}:\n{tail}"
        raise failure(f"{hint}\n{what}" if hint else what)
    return output
