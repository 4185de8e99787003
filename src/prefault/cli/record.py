# SPDX-License-Identifier: Apache-2.0
"""``prefault record``: the stage-2 faults of live VMs, or of a trace that is there, as a recording."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click
from rich.markup import escape

from prefault.cli import output
from prefault.cli.files import check_target
from prefault.cli.interrupt import INTERRUPTED
from prefault.cli.values import Real, Size, parse_size
from prefault.errors import UsageError
from prefault.faults.capture import CaptureConfig, Captured, Listener, State, capture
from prefault.faults.captured import Head, Page
from prefault.report.units import format_size, plural

if TYPE_CHECKING:  # numpy and pyarrow take a while to import, and no other command needs them
    from prefault.faults.convert import Converted
    from prefault.faults.ring import Decoder

EPILOG = """\b
Examples:
  prefault record --pid 4711 --seconds 10        a VMM that runs, for ten seconds
  prefault record                                all VMs of this host, until Ctrl-C
  trace-cmd report > t.txt; prefault record --from t.txt -o boot.parquet
  perf script | prefault record --from - -o boot.parquet
  prefault plan boot.parquet                     what to do about it

\b
Exit codes: 0 done, 2 usage or a file that is no trace, 3 operating error, 77 no tracefs or no right to trace,
130 interrupted before --seconds were over (the recording is there)."""

SUFFIX = ".capture"
"""Of the file beside the recording that a live capture goes to first."""

_LIVE = ("pid", "seconds", "durations", "buffer")


class _Options(TypedDict):
    pid: int | None
    seconds: float | None
    source: Path | None
    output: Path
    durations: bool
    buffer: int
    page_size: int
    force: bool


@click.command(epilog=EPILOG)
@click.option("--pid", type=click.IntRange(min=1), help="Record this VMM; all of the host if not given.")
@click.option("--seconds", type=Real(min=0.01), help="How long; until Ctrl-C if not given.")
@click.option(
    "--from",
    "source",
    metavar="FILE",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Read a trace in place of recording: trace-cmd report, perf script, tracefs; - is standard input.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("faults.parquet"),
    show_default=True,
    help="The recording.",
)
@click.option(
    "--durations/--no-durations",
    default=True,
    show_default=True,
    help="Record also when vCPUs stop and go on: two more events for each fault.",
)
@click.option(
    "--buffer", type=Size(), default="8M", show_default=True, help="Trace buffer of the kernel, for each CPU."
)
@click.option(
    "--page-size",
    type=click.Choice(["4K", "16K", "64K"]),
    callback=lambda _ctx, _param, value: parse_size(value),
    default="4K",
    show_default=True,
    help="Of the host that a text comes from, which does not tell; a capture does.",
)
@click.option("--force", is_flag=True, help="Replace the output if it is there.")
@output.json_option
def record(**options: Unpack[_Options]) -> None:
    """Record the stage-2 faults of VMs: when, where, of what kind, by which vCPU, how long each took.

    Any VMM will do: the kernel's own trace events are recorded, in a trace instance that goes away at the
    end. Recording slows each fault by about a microsecond. With --from, a trace that is there already is
    read. Either way the result is a Parquet file (docs/recording.md), for `prefault plan` and for any tool
    that reads Parquet.
    """
    target = options["output"]
    check_target(target, "--output", force=options["force"])
    if options["source"] is not None:
        _refuse_live_options()
        if target.exists() and options["source"].exists() and target.samefile(options["source"]):
            raise UsageError(f"--output {target}: is the trace itself; name another file")
        _convert(options["source"], options, Captured("file", 0, 0, 0))
        return
    spool = target.with_name(target.name + SUFFIX)
    ended = _record(spool, options)
    try:
        _convert(spool, options, ended)
    except BaseException:
        click.echo(f"what was captured is in {spool}: {_rescue(spool)}", err=True)
        raise
    spool.unlink()
    if ended.why == "interrupted" and options["seconds"] is not None:
        click.get_current_context().exit(INTERRUPTED)


def _is_given(name: str) -> bool:
    """Whether the user gave this option, if only with the value that it has anyway."""
    return click.get_current_context().get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _refuse_live_options() -> None:
    given = [name for name in _LIVE if _is_given(name)]
    if given:
        names = ", ".join(f"--{name}" for name in given)
        raise UsageError(f"{names}: about recording a live VM; with --from, the trace is what it is")


class _Counting(Listener):
    """Counts faults as they come, and shows how many there are."""

    def __init__(self, show: Shown) -> None:
        self._show = show
        self._decoder: Decoder | None = None
        self._pages: list[Page] = []

    def begins(self, head: Head) -> None:
        """Get ready to read pages."""
        from prefault.faults.ring import Decoder

        self._decoder = Decoder(head)

    def page(self, page: Page) -> None:
        """Keep it until it is counted."""
        self._pages.append(page)

    def state(self, state: State) -> None:
        """Count, and show."""
        assert self._decoder is not None
        pages, self._pages = self._pages, []
        self._decoder.decode(pages)
        lost = f", {plural(state.lost, 'event')} LOST" if state.lost else ""
        self._show(f"{state.seconds:5.0f} s  {plural(self._decoder.faults, 'fault')}{lost}")


class Shown:
    """A line that changes on a terminal, or a line now and then elsewhere."""

    LINE_SECONDS = 10

    def __init__(self, update: object = None) -> None:
        self._update = update
        self._calls = 0

    def __call__(self, line: str) -> None:
        """Show a line."""
        if callable(self._update):
            self._update(line + "  (Ctrl-C ends)")
        elif self._calls % self.LINE_SECONDS == 0:
            click.echo(line, err=True)
        self._calls += 1


@contextlib.contextmanager
def _shown() -> Iterator[Shown]:
    console = output.stderr()
    if not console.is_terminal:
        yield Shown()
        return
    with console.status("recording") as status:
        yield Shown(status.update)


def _rescue(spool: Path) -> str:
    return f"`prefault record --from {shlex.quote(str(spool))}` reads it"


def _record(spool: Path, options: _Options) -> Captured:
    """Capture into ``spool``, which is not there afterwards if nothing could be captured."""
    config = CaptureConfig(options["pid"], options["seconds"], options["durations"], options["buffer"])
    rescue = _rescue(spool)
    if spool.exists():
        raise UsageError(f"{spool} is there, of a recording that was broken off: {rescue}; or remove it")
    with spool.open("wb") as sink, _shown() as show:
        try:
            return capture(sink, config, _Counting(show))
        except BaseException:  # a full disk, SIGTERM, or Ctrl-C when it was at its end already
            with contextlib.suppress(OSError):
                sink.flush()
            if spool.stat().st_size == 0:
                spool.unlink()
            else:
                click.echo(f"what was captured is in {spool}: {rescue}", err=True)
            raise


def _refuse_other_page_size(said: int, known: int) -> None:
    """A capture tells its host's page size; a text is taken to have what was said."""
    if _is_given("page_size") and said != known:
        raise UsageError(
            f"--page-size {format_size(said)}: this capture is of a host with pages of {format_size(known)}"
        )


def _convert(source: Path, options: _Options, ended: Captured) -> None:
    """Make the recording, and say what is in it."""
    from prefault.faults import recording
    from prefault.faults.convert import convert

    name = escape(str(source))
    with output.stderr().status(f"reading {name}") as status:
        size = source.stat().st_size if source.is_file() else 0

        def on_bytes(done: int) -> None:
            status.update(
                f"reading {name}: {100 * done // size if size else done >> 20} {'%' if size else 'MiB'}"
            )

        found = convert(source, options["page_size"], on_bytes)
        _refuse_other_page_size(options["page_size"], found.recording.metadata.page_size)
        recording.write(found.recording, options["output"])
    _print(found, options["output"], ended)


def _print(found: Converted, target: Path, ended: Captured) -> None:
    from prefault.report.recording import summary, summary_lines, summary_table

    counted, about = summary(found.recording), found.recording.metadata
    if output.wants_json():
        facts = {"output": target, "metadata": about, "summary": counted, "ended": ended.why}
        read = {
            "lines": found.lines,
            "events": found.events,
            "bad_lines": found.bad,
            "cut_off": found.cut_off,
            "mixed_threads": found.mixed,
        }
        output.emit("record", {**facts, "read": read})
    else:
        console = output.stdout()
        console.print(summary_table(found.recording, counted))
        for line in summary_lines(found.recording, counted):
            console.print(line, soft_wrap=True)
        written = f"written to {target}; next: prefault plan {shlex.quote(str(target))}"
        console.print(written, soft_wrap=True, markup=False)
    _warn(found, ended)


def _warn(found: Converted, ended: Captured) -> None:
    about = found.recording.metadata
    if ended.why == "process":
        click.echo("the process ended while it was recorded", err=True)
    if found.cut_off:
        click.echo("the capture was cut off: its end, and the number of lost events, are not known", err=True)
    if found.backwards > found.events // 4:
        click.echo(
            f"{found.backwards:,} of {plural(found.events, 'event')} come before the one above them: if "
            "times are differences here (perf script --deltatime, trace-cmd report --ts-diff), those of this "
            "recording are wrong; print the trace again without that",
            err=True,
        )
    if about.lost_events:
        lost = f"{plural(about.lost_events, 'event')} {'was' if about.lost_events == 1 else 'were'} LOST"
        click.echo(
            f"{lost}: there were more faults than are recorded; give the kernel more room "
            "(--buffer 64M; trace-cmd -b; perf -m)",
            err=True,
        )
    for tid, vcpus in found.mixed.items():
        names = ", ".join(map(str, vcpus))
        click.echo(
            f"thread {tid} has the faults of {len(vcpus)} vCPUs ({names}): the trace seems to have processes "
            "in place of threads, so that it is not known how long the faults took, and which vCPU took each "
            "may be wrong; ask for both: `perf script -F comm,pid,tid,cpu,time,event,trace`",
            err=True,
        )
    if about.bad_lines:
        click.echo(
            f"{plural(about.bad_lines, 'line')} of {found.lines:,} could not be read, the first:", err=True
        )
        for bad in found.bad:
            click.echo(f"  line {bad.number}: {bad.text}", err=True)
