# SPDX-License-Identifier: Apache-2.0
"""``prefault apply``: a plan, in a VMM that runs and knows nothing of it."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import click
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from prefault.cli import output
from prefault.cli.interrupt import INTERRUPTED
from prefault.cli.values import Real
from prefault.errors import ExitCode, UsageError
from prefault.faults import plan as plans
from prefault.inject.apply import Applied, Found, Process
from prefault.report.units import plural

EPILOG = """\b
Examples:
  prefault apply plan.json --pid 4711                 the VMM of process 4711
  prefault apply plan.json --pid 4711 --dry-run       who would be stopped, and for what
  prefault apply plan.json --pid 4711 --slice 2       stop a vCPU for 2 ms at a time

\b
Exit codes: 0 done (holes are passed over, and reported), 2 usage, no plan, or a process without a VM,
3 some memory could not be pre-faulted, no vCPU stops, or the VMM ended, 77 no right to trace, or no
KVM_PRE_FAULT_MEMORY, 130 Ctrl-C, 143 SIGTERM (what was done stays)."""

_SHOWN_FAILURES = 10
_NONE = "without --dry-run, threads at work are asked, and if none runs a vCPU, it ends with status 2"


@click.command(epilog=EPILOG)
@click.argument("plan", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--pid", type=click.IntRange(min=1), required=True, help="The VMM: QEMU, Firecracker, …")
@click.option(
    "--slice",
    "slice_ms",
    type=Real(min=0.5, max=1000),
    metavar="MS",
    default=5.0,
    show_default=True,
    help="How long a vCPU is stopped at a time, about; then it runs for at least as long.",
)
@click.option(
    "--allow-seccomp",
    is_flag=True,
    help="Suspend a thread's seccomp filters while it is stopped, in place of refusing.",
)
@click.option("--dry-run", is_flag=True, help="Find the vCPUs and say what would be done; stop none of them.")
@output.json_option
def apply(*, plan: Path, pid: int, slice_ms: float, allow_seccomp: bool, dry_run: bool) -> None:
    """Pre-fault what a plan names in a VMM that runs, whatever VMM it is.

    Its vCPU threads are stopped one at a time, for a few milliseconds each (ptrace), run the ioctl
    KVM_PRE_FAULT_MEMORY, and go on as if nothing had been: registers, signals and system calls are as they
    were, whatever ends this command. Ctrl-C lets go at once.

    One's own VMM calls prefault.inject.apply.apply(), without ptrace (docs/apply.md).
    """
    ranges = _ranges(plan)
    with Process(pid, allow_seccomp=allow_seccomp) as process:
        found = process.find(stop=not dry_run)
        if dry_run:
            _print_dry(found, ranges, slice_ms)
            return
        _warn_of_unknown(found)
        with _bar(sum(size for _, size in ranges)) as on_bytes:
            done = process.apply(found, ranges, slice_s=slice_ms / 1000, on_bytes=on_bytes)
    _print(pid, done)
    if done.ended == "interrupted":
        click.echo("prefault: interrupted; all vCPUs were let go", err=True)
        click.get_current_context().exit(128 + done.signal if done.signal else INTERRUPTED)
    if any(one.error != "ENOENT" for one in done.failed):
        click.get_current_context().exit(ExitCode.OPERATING_ERROR)


def _ranges(path: Path) -> list[tuple[int, int]]:
    """What to pre-fault.

    :raises UsageError: it is no plan, or of another architecture, whose guests have their memory elsewhere
    """
    plan = plans.load(path)
    if plan.architecture != platform.machine():
        raise UsageError(
            f"{path}: is of a host with {plan.architecture}, and this one has {platform.machine()}: record "
            "and plan on a host like this one"
        )
    return [(one.ipa, one.size) for one in plan.ranges]


@contextlib.contextmanager
def _bar(size: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; nothing elsewhere: this takes seconds."""
    console = output.stderr()
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (
        TimeElapsedColumn(),
        TextColumn("pre-faulting"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=size)
        yield lambda count: bar.update(task, advance=count)


def _warn_of_unknown(found: Found) -> None:
    if found.unknown:
        names = ", ".join(map(str, found.unknown))
        share = "the others do its share" if found.threads else _NONE
        click.echo(f"vCPU {names}: no thread was seen running it; {share}", err=True)


def _print_dry(found: Found, ranges: list[tuple[int, int]], slice_ms: float) -> None:
    size = sum(size for _, size in ranges)
    if output.wants_json():
        output.emit(
            "apply",
            {"dry_run": True, "pid": found.pid, "bytes": size, "ranges": len(ranges), "slice_ms": slice_ms}
            | {"vcpus": [asdict(one) for one in found.threads], "unknown_vcpus": found.unknown},
        )
        return
    console = output.stdout()
    console.print(f"would pre-fault {_mib(size)} in {plural(len(ranges), 'range')}, in process {found.pid}:")
    for one in found.threads:
        how = "" if one.certain else ", by its name"
        console.print(f"  vCPU {one.index}: thread {one.tid} is stopped for {slice_ms:g} ms at a time{how}")
    _warn_of_unknown(found)


def _print(pid: int, done: Applied) -> None:
    if output.wants_json():
        output.emit("apply", {"pid": pid, **asdict(done), "longest_stop_s": done.longest_stop_s})
        return
    console = output.stdout()
    console.print(
        f"pre-faulted {_mib(done.bytes)} of {_mib(done.size)} in {done.seconds:.2f} s, "
        f"with {plural(done.calls, 'call')}; longest stop of a vCPU {1000 * done.longest_stop_s:.1f} ms",
        soft_wrap=True,
    )
    for one in done.vcpus:
        console.print(
            f"  vCPU {one.index}: {plural(one.calls, 'stop')}, {_mib(one.bytes)}, "
            f"stopped for {1000 * one.stopped_s:.1f} ms in all, {1000 * one.longest_stop_s:.1f} ms at most",
            soft_wrap=True,
        )
    for failed in done.failed[:_SHOWN_FAILURES]:
        hint = f": {failed.hint}" if failed.hint else ""
        click.echo(f"not done: {failed.ipa:#x}+{failed.size:#x}, {failed.error}{hint}", err=True)
    if len(done.failed) > _SHOWN_FAILURES:
        click.echo(
            f"and {plural(len(done.failed) - _SHOWN_FAILURES, 'range')} more (--json has all)", err=True
        )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"
