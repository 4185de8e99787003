# SPDX-License-Identifier: Apache-2.0
"""``prefault lab soak``: pre-faulting while everything else goes on at once, for minutes."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import click
from rich.table import Table

from prefault.cli import output
from prefault.cli.interrupt import results_kept
from prefault.cli.kernels import KernelOptions, image_of, kernel_options, variant_of
from prefault.cli.values import Real, Size
from prefault.errors import ExitCode, JobTimeout, LabError, LabLost, Splat
from prefault.lab.frames import Kind
from prefault.lab.job import Job, JobResult, JobSplat, run_job
from prefault.lab.machine import MODES, MachineOptions
from prefault.soak.run import Round, SoakConfig

EPILOG = """\b
Examples:
  prefault lab soak                        one minute, ordinary and nested guests in turn
  prefault lab soak --minutes 30 --seed 7  longer, with other chances
  prefault lab soak --variant debug        with KASAN, lockdep and failing allocations

\b
Exit codes: 0 all held, 1 something did not or the kernel log has a splat, 2 usage, 77 no lab,
124 timed out, 125 the lab was lost."""

SLACK = 6
"""How much longer than its fighting a soak may take: setting up, checking, and a slow kernel."""


class _Options(KernelOptions):
    minutes: float
    seed: int
    nested: bool
    vcpus: int
    cpus: int
    memory: int | None
    mode: str


@dataclass
class _Rounds:
    """The rounds that were told so far."""

    done: list[Round] = field(default_factory=list)
    _text: bytes = b""

    def __call__(self, kind: Kind, piece: bytes) -> None:
        """Take what the job prints."""
        if kind is not Kind.STDOUT:
            return
        *lines, self._text = (self._text + piece).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, printed: dict[str, Any]) -> None:
        if "error" in printed:
            raise LabError(str(printed["error"]["message"]))
        one = Round(**printed)
        self.done.append(one)
        kind = "nested" if one.nested else "ordinary"
        click.echo(f"round {one.number} ({kind}): {sum(one.counts.values()):,} operations", err=True)

    @property
    def counts(self) -> Counter[str]:
        """Operations of all rounds, by kind."""
        total: Counter[str] = Counter()
        for one in self.done:
            total.update(one.counts)
        return total

    @property
    def wrong(self) -> Iterator[str]:
        """Everything that did not hold, with the round that it was in."""
        for one in self.done:
            for line in one.wrong:
                yield f"round {one.number}: {line}"


@click.command(epilog=EPILOG)
@click.option("--minutes", type=Real(min=0.05), default=1, show_default=True, help="Of fighting, in all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of all chances; threads still race.")
@click.option("--nested/--no-nested", default=True, show_default=True, help="L2 guests in every other round.")
@click.option("--vcpus", type=click.IntRange(2, 8), default=4, show_default=True, help="vCPUs of the VM.")
@click.option("--cpus", type=click.IntRange(1, 8), default=4, show_default=True, help="CPUs of the lab.")
@click.option("--memory", type=Size(), help="Memory of the lab; 3G, or what the variant needs, if not given.")
@click.option("--mode", type=click.Choice(MODES), default="nested", show_default=True, help="KVM's mode.")
@kernel_options
@output.json_option
def soak(**options: Unpack[_Options]) -> None:
    """Pre-fault while guests run and the host does everything that it may.

    Each round is a new VM with memslots on every backing. vCPUs pre-fault and run, L2 guests among them,
    while threads madvise, mprotect, fork, merge and compact the memory, switch dirty logging, and move,
    delete and recreate slots; signals come in between, and allocations fail where the kernel can be told
    to. Then all rest: every byte of guest memory is compared with what was written, and every leaf of
    the stage-2 table with the host's memory.
    """
    rounds, memory, variant = _Rounds(), options["memory"], variant_of(options)
    config = SoakConfig(
        seconds=options["minutes"] * 60,
        # Setting up and checking take a slow kernel longer, too.
        round_seconds=min(10.0 * variant.slow, options["minutes"] * 60),
        bout_seconds=2.0 * variant.slow,
        vcpus=options["vcpus"],
        nested=options["nested"] and options["mode"] == "nested",
        seed=options["seed"],
    )
    job = Job(
        ("python3", "-m", "prefault.soak.run", json.dumps(dataclasses.asdict(config))),
        timeout=120 + SLACK * 60 * options["minutes"],
    )
    machine = MachineOptions(
        memory_mib=memory >> 20 if memory else variant.memory_mib,
        cpus=options["cpus"],
        mode=options["mode"],
        append=("hugepages=8", *variant.arguments),
    )
    splats: tuple[str, ...] = ()
    problem = "it was interrupted"
    with results_kept(lambda: rounds.done) as interruption:
        splats, problem = _fight(job, machine, image_of(options), rounds)
    _print(rounds, config, splats, problem)
    wrong = splats or problem or list(rounds.wrong)
    status = ExitCode.DOES_NOT_HOLD if wrong else ExitCode.DONE
    click.get_current_context().exit(interruption.status(status))


def _fight(
    job: Job, machine: MachineOptions, kernel: Path | None, rounds: _Rounds
) -> tuple[tuple[str, ...], str]:
    """Run the job; the splats, and what else went wrong with it. What was done before is in ``rounds``."""
    try:
        result: JobResult = run_job(job, machine, kernel=kernel, on_output=rounds)
    except JobSplat as error:
        return error.lines, str(error)
    except (LabLost, JobTimeout, Splat) as error:
        if not rounds.done:
            raise
        return (), str(error)
    if result.status and not list(rounds.wrong):
        last = result.stderr.decode(errors="replace").strip()[-2000:]
        return (), f"the soak ended with status {result.status}; see {result.run_dir}\n{last}"
    return (), ""


def _print(rounds: _Rounds, config: SoakConfig, splats: tuple[str, ...], problem: str) -> None:
    counts, wrong = rounds.counts, list(rounds.wrong)
    if output.wants_json():
        facts = {"config": config, "rounds": rounds.done, "operations": dict(counts)}
        output.emit("lab soak", {**facts, "wrong": wrong, "splats": splats, "problem": problem})
        return
    table = Table("operation", "times", box=None)
    table.columns[1].justify = "right"
    for name, number in sorted(counts.items()):
        table.add_row(name, f"{number:,}")
    console = output.stdout()
    console.print(table)
    for line in wrong:
        console.print(line, soft_wrap=True, markup=False)
    if problem:
        console.print(problem, soft_wrap=True, markup=False)
    console.print(
        f"{len(rounds.done)} rounds, {config.seconds / 60:g} minutes asked for, "
        f"{counts.total():,} operations, {len(wrong)} things wrong, {len(splats)} splats"
    )
