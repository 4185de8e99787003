# SPDX-License-Identifier: Apache-2.0
"""``prefault bench``: what pre-faulting costs, and what it spares, in instructions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import click
from rich.table import Table

from prefault.bench.cases import MIB, SIZE, Case, Context, choose
from prefault.bench.measure import Measured
from prefault.bench.pairs import PairAsk
from prefault.bench.waits import Ask
from prefault.cli import output
from prefault.cli.interrupt import results_kept
from prefault.cli.kernels import KernelOptions, cpu_option, image_of, kernel_options, variant_of
from prefault.cli.progress import drawn
from prefault.cli.values import KernelImage, Real, Size
from prefault.cli.walks import print_command
from prefault.errors import ExitCode, LabError, UsageError
from prefault.lab import bench as in_lab
from prefault.lab import build, compare, stock
from prefault.lab.arch import ARM64, X86_64
from prefault.lab.bench import Boot, Settings
from prefault.lab.machine import MODES
from prefault.lab.profile import profile
from prefault.lab.progress import Progress
from prefault.report import bench as report
from prefault.report.bench import Profiled, Row
from prefault.report.units import format_size, plural

EPILOG = """\b
Examples:
  prefault bench                                    the usual cases, on this kernel and page at a time
  prefault bench 'private/*' guest-memfd/resident   some of them
  prefault bench --size 32M --size 4G private/resident
  prefault bench --kernel arch/arm64/boot/Image     judge another kernel
  prefault bench --cpu cortex-a76 'private/*'       a CPU without FWB: each page is cleaned from the cache
  prefault bench --peer 'private/*'                 with x86's ioctl in the same table
  prefault bench --all --plot cost.svg              everything, and a picture
  prefault bench --by-function guest-memfd/resident where the instructions go
  prefault bench --pairs                            two vCPUs, a half each, and all of it each
  prefault bench --list                             what there is

\b
Exit codes: 0 measured, 1 with --check: something is dearer than it may be; or the kernel log has a splat,
2 usage, 3 operating error, 77 no lab, 124 timed out, 125 the lab was lost, 130 interrupted."""

PLOTS = (".svg", ".png", ".pdf")
_COUNTED_ROUNDS = 2
"""Of what two vCPUs take in instructions: rounds differ by a thousandth."""


class _Options(KernelOptions):
    names: tuple[str, ...]
    list_only: bool
    everything: bool
    size: tuple[int, ...]
    mode: tuple[str, ...]
    compare: bool
    peer: bool
    page_at_a_time: Path | None
    by_function: bool
    waits: bool
    pairs: bool
    repeat: int
    cpu: str
    memory: int | None
    timeout: float
    plot: Path | None
    check: bool
    dry_run: bool


@click.command(epilog=EPILOG)
@click.option("--list", "list_only", is_flag=True, help="Print the cases, and measure nothing.")
@click.option(
    "--all", "everything", is_flag=True, help="All cases, and larger sizes of the first: half an hour."
)
@click.option(
    "--size", type=Size(), multiple=True, help="Memory that is pre-faulted, in place of 32M; repeatable."
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    multiple=True,
    help="Measure in this mode of KVM; repeatable. Without it: all cases in nested, some in protected.",
)
@click.option(
    "--compare/--no-compare",
    default=True,
    show_default=True,
    help="Measure the page-at-a-time version of the ioctl, too; it is built once.",
)
@click.option(
    "--peer",
    is_flag=True,
    help="Measure x86's older ioctl, too, on the kernel that `prefault lab build --arch x86_64` fetches.",
)
@click.option(
    "--page-at-a-time",
    type=KernelImage(),
    help="The Image of that version, in place of the one that is built from the series.",
)
@click.option(
    "--by-function",
    is_flag=True,
    help="Show instead the functions of the kernel that the instructions go to, and how long others wait.",
)
@click.option(
    "--waits",
    is_flag=True,
    help="Measure instead how long demand faults and invalidations take while another vCPU pre-faults.",
)
@click.option(
    "--pairs",
    is_flag=True,
    help="Measure instead what a second vCPU brings, with a half each, and when both do all of it.",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="How often each figure is taken; shown is the median. Of many leaves: once.",
)
@cpu_option
@click.option("--memory", type=Size(), help="Memory of the lab's machine; what the cases need, if not given.")
@click.option(
    "--timeout",
    type=Real(min=0, min_open=True),
    default=3600,
    show_default=True,
    help="Seconds for each boot of the lab.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help=f"Draw the costs into this file as well: {', '.join(PLOTS)}.",
)
@click.option("--check", is_flag=True, help="Exit status 1 if something costs more than it may.")
@kernel_options
@click.option("--dry-run", is_flag=True, help="Print QEMU's command lines and do nothing.")
@output.json_option
@click.argument("names", nargs=-1)
def bench(**options: Unpack[_Options]) -> None:
    """Measure in the lab what pre-faulting costs, and what it spares, in instructions.

    Each case is memory in some state, and a guest that walks it. Measured are the guest's demand faults,
    pre-faulting, the same again, and the guest's walk afterwards; beside them madvise(MADV_POPULATE_READ),
    MADV_POPULATE_WRITE and MAP_POPULATE of the same memory, and the page-at-a-time version of the same
    ioctl. All of it is counted on a machine whose clock counts instructions, so that two runs give the
    same figures. NAMES are patterns as in the shell.
    """
    _check_usage(options)
    if options["waits"] or options["pairs"]:
        _timed(options)
        return
    chosen = choose(options["names"], everything=options["everything"], sizes=options["size"])
    if options["cpu"] != Settings.cpu:  # others may have to clean each page from the data cache
        chosen = tuple(replace(case, bar=None) for case in chosen)
    if options["list_only"]:
        _list(chosen)
        return
    boots, settings = tuple(_plan(chosen, options)), _settings(options)
    if options["dry_run"]:
        for boot in boots:
            print_command(in_lab.command(boot, settings))
        return
    if options["by_function"]:
        _by_function(boots, settings, options)
        return
    results = _Results(boots)
    started = time.monotonic()
    with results_kept(lambda: results.rows()) as interruption, drawn() as progress:
        results.measure(settings, options, progress)
    _print(results, options, time.monotonic() - started)
    missed = options["check"] and report.failures(results.rows())
    status = ExitCode.DOES_NOT_HOLD if missed else ExitCode.DONE
    if results.problem:
        status = results.problem.exit_code
    click.get_current_context().exit(interruption.status(status))


def _settings(options: _Options) -> Settings:
    return Settings(
        repeat=options["repeat"],
        timeout=options["timeout"],
        memory_mib=(options["memory"] or 0) >> 20,
        cpu=options["cpu"],
        append=variant_of(options).arguments,
    )


def _check_usage(options: _Options) -> None:
    """What can be said before anything is done.

    :raises UsageError: options contradict each other
    """
    plot = options["plot"]
    if plot and plot.suffix not in PLOTS:
        raise UsageError(f"--plot {plot}: the name must end in one of {', '.join(PLOTS)}")
    if plot and not plot.parent.is_dir():
        raise UsageError(f"--plot {plot}: there is no folder {plot.parent}; make it first")
    if options["page_at_a_time"] and not options["compare"]:
        raise UsageError("--page-at-a-time names what --no-compare leaves out: give one of them")
    if options["by_function"] and (not options["names"] or set(options["mode"]) - {"nested"} or plot):
        raise UsageError(
            "--by-function takes the names of some cases, draws no plot, and sees only what runs at kernel "
            "addresses, which under pKVM and nVHE the hypervisor does not: --mode nested"
        )
    timed = [name for name in ("waits", "pairs", "by_function") if options[name]]
    if len(timed) > 1:
        raise UsageError("--waits, --pairs and --by-function measure different things: give one of them")
    if (options["waits"] or options["pairs"]) and (
        options["names"] or plot or len(options["mode"]) > 1 or len(options["size"]) > 1
    ):
        raise UsageError(
            f"--{timed[0]} has one case of its own and draws no plot: give at most one size and mode"
        )
    if options["peer"] and timed:
        raise UsageError(f"--peer adds rows to the table, which --{timed[0].replace('_', '-')} does not draw")
    if options["variant"] == "6.12" and options["compare"] and not options["page_at_a_time"]:
        raise UsageError("the page-at-a-time version is built of the series for 7.3 only: add --no-compare")


def _list(chosen: tuple[Case, ...]) -> None:
    if output.wants_json():
        output.emit("bench", {"cases": [case.to_json() for case in chosen]})
        return
    table = Table("case", "memory", "must reach", "modes", box=None)
    for case in chosen:
        bar = "" if case.bar is None else f"{case.bar:,}"
        size = "" if case.size == SIZE else format_size(case.size)
        table.add_row(case.name, size, bar, ", ".join(case.modes))
    output.stdout().print(table)


def _plan(chosen: tuple[Case, ...], options: _Options) -> Iterator[Boot]:
    """What is booted for this kernel.

    :raises UsageError: nothing is left to be measured
    """
    kernel = image_of(options)
    modes = options["mode"] or tuple(dict.fromkeys(mode for case in chosen for mode in case.modes))
    for mode in modes:
        cases = tuple(
            case
            for case in chosen
            if (options["mode"] or mode in case.modes)
            and (mode == "nested" or case.context is Context.ORDINARY)
        )
        if cases:
            yield Boot(mode, cases, kernel)
        elif options["mode"]:
            raise UsageError(f"nothing to measure in mode {mode}: nested guests need --mode nested")
    of_peer = tuple(case for case in chosen if case.has_peer)
    if options["peer"] and of_peer:
        stock.current(X86_64)  # what is missing is told before anything is measured
        yield Boot("nested", of_peer, arch=X86_64)


def _by_function(boots: tuple[Boot, ...], settings: Settings, options: _Options) -> None:
    """Profile the cases, each call in a boot of its own."""
    found: list[Profiled] = []
    with results_kept(lambda: found) as interruption, drawn() as progress:
        old = _old_kernel(options, progress) if options["compare"] else None
        for case in next((boot.cases for boot in boots if boot.mode == "nested"), ()):
            # A whole table of pages, or a few blocks; QEMU writes a line for each instruction.
            size = 2 * MIB if not case.blocks else max(8 * MIB, case.page_size)
            small = case if options["size"] else case.sized(size)
            one = Profiled(small)
            found.append(one)
            progress.stage(case.name, 3)
            for name, call, kernel in (
                (report.DEMAND, "demand", image_of(options)),
                (report.PAGE_WISE, "prefault", old),
                (report.PRE_FAULT, "prefault", image_of(options)),
            ):
                if name != report.PAGE_WISE or old:
                    boot = Boot("nested", (small,), kernel)
                    one.profiles[name] = profile(small, call, boot, settings)
                progress.step(name)
    if output.wants_json():
        output.emit("bench", {"profiles": [one.to_json() for one in found]})
    else:
        for one in found:
            console = output.stdout(report.WIDTH)
            console.print(report.profile_table(one))
            console.print(report.hold(one), soft_wrap=True)
    click.get_current_context().exit(interruption.status(ExitCode.DONE))


def _timed(options: _Options) -> None:
    """How long others wait, or two take, on this kernel and on the page-at-a-time version."""
    size = {"size": options["size"][0]} if options["size"] else {}
    boot = Boot(options["mode"][0] if options["mode"] else "nested", ())
    ask = Ask(**size) if options["waits"] else PairAsk(**size)
    found: dict[str, Any] = {}
    with results_kept(lambda: found) as interruption, drawn() as progress:
        kernels = {"this kernel": image_of(options)}
        if options["compare"]:
            kernels[report.PAGE_WISE] = _old_kernel(options, progress)
        for name, kernel in kernels.items():
            progress.stage(name)
            on = replace(boot, kernel=kernel)
            if isinstance(ask, Ask):
                found[name] = in_lab.waits(on, _settings(options), ask)
            else:
                counted = replace(ask, rounds=_COUNTED_ROUNDS)
                found[name] = {
                    "instructions": in_lab.pairs(on, _settings(options), counted, icount=True),
                    "time": in_lab.pairs(on, _settings(options), ask),
                }
    what, table = ("waits", report.waits_table) if options["waits"] else ("pairs", report.pairs_table)
    if output.wants_json():
        output.emit("bench", {"size": ask.size, what: found})
    else:
        output.stdout(report.WIDTH).print(table(found))
    click.get_current_context().exit(interruption.status(ExitCode.DONE))


def _old_kernel(options: _Options, progress: Progress) -> Path:
    """The Image of the page-at-a-time version."""
    return options["page_at_a_time"] or compare.page_at_a_time(options["variant"], progress)


class _Results:
    """What was measured so far."""

    def __init__(self, boots: tuple[Boot, ...]) -> None:
        self.boots = boots
        self.problem: LabError | None = None
        self._found: dict[tuple[str, bool], list[Measured]] = {}
        self.folders: list[Path] = []

    def measure(self, settings: Settings, options: _Options, progress: Progress) -> None:
        """Measure it all; a lost machine ends it, if there is something to show."""
        boots = list(self.boots)
        if options["compare"]:
            old = _old_kernel(options, progress)
            ours = [boot for boot in self.boots if boot.arch is ARM64]
            boots += [Boot(boot.mode, boot.cases, old, ioctl_only=True) for boot in ours]
        for boot in boots:
            try:
                self._boot(boot, settings, progress)
            except LabError as error:
                if not self.rows():
                    raise
                self.problem = error
                return

    def _boot(self, boot: Boot, settings: Settings, progress: Progress) -> None:
        which = "page at a time" if boot.ioctl_only else "this kernel"
        progress.stage(f"{report.MODES[boot.where]}, {which}", len(boot.cases))
        found = self._found.setdefault((boot.where, boot.ioctl_only), [])

        def tell(one: Measured) -> None:
            found.append(one)
            progress.step(one.case)

        self.folders.append(in_lab.measure(boot, settings, tell))

    def rows(self) -> list[Row]:
        """What is there, in the order of the cases."""
        return [
            Row(boot.where, case, one, self._before(boot.where, index))
            for boot in self.boots
            for index, (case, one) in enumerate(
                zip(boot.cases, self._found.get((boot.where, False), []), strict=False)
            )
        ]

    def _before(self, mode: str, index: int) -> Measured | None:
        found = self._found.get((mode, True), [])
        return found[index] if index < len(found) else None


def _print(results: _Results, options: _Options, seconds: float) -> None:
    rows = results.rows()
    missed = report.failures(rows)
    if output.wants_json():
        output.emit(
            "bench",
            {
                "unit": "instructions per leaf",
                "kernel": image_of(options) or build.kernel_image(),
                "rows": [row.to_json() for row in rows],
                "does_not_hold": missed,
                "problem": str(results.problem or ""),
                "seconds": round(seconds, 1),
                "run_dirs": results.folders,
            },
        )
    else:
        _print_table(results, rows, missed, seconds)
    if options["plot"]:
        report.plot(rows, options["plot"])
        click.echo(f"drawn: {options['plot']}", err=True)


def _print_table(results: _Results, rows: list[Row], missed: list[str], seconds: float) -> None:
    console = output.stdout(max(output.stdout().width, report.WIDTH))
    console.print(report.table(rows))
    for line in (*report.remarks(rows), *(f"does not hold: {line}" for line in missed)):
        console.print(line, markup=False, soft_wrap=True)
    if results.problem:
        console.print(f"not all was measured: {results.problem}", markup=False, soft_wrap=True)
    held = sum(row.bar is not None and not any(row.failures()) for row in rows)
    bars = sum(row.bar is not None for row in rows)
    console.print(
        f"{plural(len(rows), 'case')}, {held} of {bars} within what must be reached, {seconds:.0f} s"
    )
