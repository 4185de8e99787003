# SPDX-License-Identifier: Apache-2.0
"""``prefault plan``: what to pre-fault, from recordings, and whether that pays."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from prefault.cli import output
from prefault.cli.files import check_target, replacing
from prefault.cli.values import Real, Size, parse_size
from prefault.errors import UsageError
from prefault.faults.plan import dumps

if TYPE_CHECKING:  # numpy and pyarrow take a while to import, and few commands need them
    from prefault.faults.planning import Made, PlanConfig
    from prefault.faults.recording import Recording
    from prefault.faults.working_set import Memslot
    from prefault.report.next_steps import Files

EPILOG = """\b
Examples:
  prefault plan boot.parquet                                  what pre-faulting would save
  prefault plan boot.parquet -o plan.json --html boot.html    a plan for a VMM, and a page to look at
  prefault plan a.parquet b.parquet c.parquet --over 2-of-3   what at least two of three runs needed
  prefault plan boot.parquet --cap 256M --granule 2M          the 256 MiB that are needed first, by 2 MiB
  prefault plan boot.parquet --memory private/nothing         if the host has not populated the memory

\b
Exit codes: 0 done, also if it does not pay (--json has "pays"), 2 usage or a file that is no recording,
3 operating error."""


MOST_NS = 1e12
"""More than any fault costs."""


class MemslotType(click.ParamType["tuple[int, int]"]):
    """``IPA:SIZE`` as ``0x40000000:4G``."""

    name = "ipa:size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Turn what the user typed into bytes."""
        if isinstance(value, tuple):
            return value
        ipa, _, size = str(value).rpartition(":")
        try:
            return int(ipa, 0), parse_size(size)
        except ValueError:
            self.fail(f"{value!r} is not IPA:SIZE; write 0x40000000:4G", param, ctx)


class _Options(TypedDict):
    recordings: tuple[Path, ...]
    output: Path | None
    html: Path | None
    perfetto: Path | None
    granule: int
    cap: int | None
    over: str
    pid: tuple[int, ...]
    memslot: tuple[tuple[int, int], ...]
    memory: str
    fault_cost: float | None
    prefault_cost: float | None
    force: bool


@click.command(epilog=EPILOG)
@click.argument(
    "recordings", nargs=-1, required=True, metavar="RECORDING...", type=click.Path(path_type=Path)
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the plan to this file."
)
@click.option(
    "--granule",
    type=Size(),
    default="64K",
    show_default=True,
    help="Unit of what is pre-faulted, a multiple of the page size: 4K maps least, 2M in the fewest calls.",
)
@click.option("--cap", type=Size(), help="Pre-fault no more than this: what is needed first.")
@click.option(
    "--over",
    default="union",
    show_default=True,
    help="Of several recordings: what any run needed (union), all (intersection), or some (2-of-3).",
)
@click.option(
    "--pid",
    type=click.IntRange(min=1),
    multiple=True,
    help="Take the faults of this process only, of recordings of a whole host. Repeatable: a run each.",
)
@click.option(
    "--memslot",
    type=MemslotType(),
    multiple=True,
    metavar="IPA:SIZE",
    help="The guest's memory; all else is taken for devices. Repeatable.",
)
@click.option(
    "--memory",
    default="private/write",
    show_default=True,
    help="Backing and state of the memory when it is pre-faulted: private/nothing is never touched.",
)
@click.option(
    "--fault-cost",
    type=Real(min=0, max=MOST_NS),
    metavar="NS",
    help="Cost of a fault; measured if not given.",
)
@click.option(
    "--prefault-cost", type=Real(min=0, max=MOST_NS), metavar="NS", help="Cost of pre-faulting a page."
)
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a page for a browser: heat map, working set, what the plan covers.",
)
@click.option(
    "--perfetto",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a trace for the Perfetto viewer; compressed if the name ends in .gz.",
)
@click.option("--force", is_flag=True, help="Replace files that are there.")
@output.json_option
def plan(**options: Unpack[_Options]) -> None:
    """Say what to pre-fault, what that saves, and whether it pays.

    RECORDINGS are files of `prefault record`, of one run each, from the guest's start or resumption on. The
    plan holds memory that the guest faulted on because it was not mapped yet, in order of first need; not
    devices, nor writes to memory that is mapped read-only, which pre-faulting does not spare. Costs come from
    the recordings' own durations, from --fault-cost and --prefault-cost, or are estimated.
    """
    from prefault.faults import recording
    from prefault.faults.planning import make_plan

    for name, path in _targets(options).items():
        check_target(path, f"--{name}", force=options["force"])
    _refuse_one_file_twice(_targets(options))
    _refuse_recordings(options)
    config = _config(options)
    with output.stderr().status("reading recordings"):
        recordings = [recording.read(path) for path in options["recordings"]]
        if options["pid"]:
            names = map(str, options["recordings"])
            recordings = [
                recording.of_processes(one, options["pid"], name)
                for one, name in zip(recordings, names, strict=True)
            ]
        made = make_plan(recordings, config)
        _write(made, recordings, options)
    _print(made, recordings, options)


def _targets(options: _Options) -> dict[str, Path]:
    """The files that are asked for, by option."""
    named = {"output": options["output"], "html": options["html"], "perfetto": options["perfetto"]}
    return {name: path for name, path in named.items() if path}


def _refuse_one_file_twice(targets: dict[str, Path]) -> None:
    seen: dict[Path, str] = {}
    for name, path in targets.items():
        other = seen.setdefault(path.resolve(), name)
        if other != name:
            raise UsageError(f"--{other} and --{name} are one file, {path}: name two")


def _refuse_recordings(options: _Options) -> None:
    """Refuse to write over a recording, or to take one for two runs."""
    seen: set[Path] = set()
    for path in options["recordings"]:
        if path.resolve() in seen:
            raise UsageError(f"{path}: is given twice, but two runs are two recordings")
        seen.add(path.resolve())
    for name, path in _targets(options).items():
        if path.resolve() in seen:
            raise UsageError(f"--{name} {path}: is a recording that the plan is made from; name another file")


def _write(made: Made, recordings: list[Recording], options: _Options) -> None:
    from prefault.report.faults_html import page
    from prefault.report.perfetto import trace

    if options["output"]:
        with replacing(options["output"]) as file:
            file.write(dumps(made.plan))
    if options["html"]:
        with replacing(options["html"]) as file:
            file.write(page(made, recordings, _named(options)))
    if options["perfetto"]:
        with replacing(options["perfetto"]) as file:
            file.writelines(trace(made, recordings))


def _named(options: _Options) -> Files:
    from prefault.report.next_steps import Files

    written = options["output"]
    words = [f"--pid {pid}" for pid in options["pid"]]
    words += [f"--memslot {ipa:#x}:{size}" for ipa, size in options["memslot"]]
    costs = {"--fault-cost": options["fault_cost"], "--prefault-cost": options["prefault_cost"]}
    words += [f"{name} {cost:.15g}" for name, cost in costs.items() if cost is not None]
    return Files(tuple(map(str, options["recordings"])), str(written) if written else None, tuple(words))


def _config(options: _Options) -> PlanConfig:
    from prefault.faults.costs import Given
    from prefault.faults.planning import PlanConfig

    return PlanConfig(
        granule=options["granule"],
        over=options["over"],
        cap=options["cap"],
        memslots=_memslots(options["memslot"]),
        given=Given(options["memory"], options["fault_cost"], options["prefault_cost"]),
    )


def _memslots(given: tuple[tuple[int, int], ...]) -> tuple[Memslot, ...]:
    from prefault.faults.working_set import Memslot

    slots = tuple(Memslot(ipa, size) for ipa, size in sorted(given))
    for one in slots:
        if one.ipa < 0 or one.ipa % 4096 or one.size % 4096 or one.ipa + one.size > 1 << 52:
            raise UsageError(f"--memslot {one.ipa:#x}:{one.size}: must be whole pages below 2^52")
    for one, other in itertools.pairwise(slots):
        if one.ipa + one.size > other.ipa:
            raise UsageError(f"--memslot: the slots at {one.ipa:#x} and {other.ipa:#x} overlap")
    return slots


def _print(made: Made, recordings: list[Recording], options: _Options) -> None:
    from prefault.report.next_steps import next_steps
    from prefault.report.plan import sentences

    if output.wants_json():
        output.emit("plan", {"plan": made.plan.to_json(), "files": _targets(options)})
        return
    console = output.stdout()
    seconds = sum(one.metadata.seconds for one in recordings) / len(recordings)
    for sentence in sentences(made.plan, seconds):
        console.print(sentence, soft_wrap=not console.is_terminal, markup=False)
    for advice in made.plan.advice:
        console.print(f"- {advice.text}.", soft_wrap=not console.is_terminal, markup=False)
    for path in _targets(options).values():
        console.print(f"written: {path}", soft_wrap=True, markup=False)
    for step in next_steps(made.plan, recordings, _named(options)):
        console.print(f"Next: {step.text}", soft_wrap=not console.is_terminal, markup=False)
        if step.command:  # all that follows is on the page
            console.print(f"  {step.command}", soft_wrap=True, markup=False, highlight=False)
            break
