# SPDX-License-Identifier: Apache-2.0
"""Measure in the lab what the estimates of ``prefault run --machine spec`` are made of.

    .venv/bin/python benchmarks/figures.py            print the figures, in instructions
    .venv/bin/python benchmarks/figures.py --write    and store them for the estimates

Every backing is walked by reads alone and by writes, ordinary and nested, without and with
pre-faulting, in three boots of the lab with its clock counting instructions; about 4 minutes. What a
walk without faults costs is taken off, the rest is divided by the number of faults.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from prefault.errors import LabError
from prefault.lab.build import current
from prefault.lab.job import Job, run_job
from prefault.lab.machine import MachineOptions
from prefault.machine import Backing, FaultCounts, Resident
from prefault.report import estimate
from prefault.report.estimate import PREFAULTED, WITHOUT, Figures, key, split, who
from prefault.scenarios.walk_result import WalkConfig, WalkResult, WalkRun

TARGET = Path(estimate.__file__).with_name("figures.json")
ORDINARY = WalkConfig(size=8 << 20, write_permille=0)
LARGE = WalkConfig(size=32 << 20, write_permille=0)
MEMORY = tuple(backing for backing in Backing if backing is not Backing.DEVICE)
NESTED = WalkConfig(size=4 << 20, write_permille=0, nested=True)
FEW = 16
"""Writes per thousand by an L2: breaking copy-on-write costs a hundred million instructions there."""


def configs(base: WalkConfig, writes: int) -> Iterator[WalkConfig]:
    """Each backing in each state, walked by reads alone and with writes."""
    for backing in MEMORY:
        for resident in Resident:
            for permille in (0, writes):
                yield dataclasses.replace(base, backing=backing, resident=resident, write_permille=permille)


def measure(walks: list[WalkConfig]) -> list[WalkResult]:
    """Do the walks in one boot."""
    argv = ["python3", "-m", "prefault.scenarios.walk", "--json"]
    job = Job((*argv, *(json.dumps(one.to_json()) for one in walks)), timeout=3000)
    done = run_job(job, MachineOptions(icount=True, append=("hugepages=32",)))
    results = [json.loads(line) for line in done.stdout.splitlines()]
    if len(results) != len(walks) or "error" in results[-1]:
        raise LabError(f"the walks ended early: {results[-1:]}; see {done.run_dir}")
    return [WalkResult.from_json(one) for one in results]


def slope(small: WalkResult, large: WalkResult) -> dict[str, float]:
    """What does not depend on the backing, from two sizes of memory that is resident."""
    pages = (large.config.size - small.config.size) // small.page_size
    access = (large.with_prefault.walk_ns - small.with_prefault.walk_ns) / pages
    fixed = small.with_prefault.walk_ns - access * (small.config.size // small.page_size)
    call = small.with_prefault.prefault_ns - leaf(small, large) * sum(small.with_prefault.leaves.values())
    return {"access": access, "exit": fixed / small.with_prefault.exits, "call": call}


def leaf(small: WalkResult, large: WalkResult) -> float:
    """What pre-faulting costs for each leaf, from two sizes of the same kind of memory."""
    less, more = small.with_prefault, large.with_prefault
    return (more.prefault_ns - less.prefault_ns) / (sum(more.leaves.values()) - sum(less.leaves.values()))


def fit(reads: WalkRun, writes: WalkRun, config: WalkConfig, base: Figures, name: str) -> dict[str, float]:
    """What each kind of fault costs whoever is called ``name``."""
    first, spent_first = _sum(reads, config, base, name)
    second, spent = _sum(writes, config, base, name)
    costs: dict[str, float] = {}
    if first["read"]:
        costs["read"] = spent_first / first["read"]
        spent -= second["read"] * costs["read"]
    for kind in ("write", "permission"):
        if second[kind]:
            # No state has both in one walk: all writes meet pages of one kind.
            costs[kind] = spent / second[kind]
            break
    return {kind: round(cost, 1) for kind, cost in costs.items()}


def _sum(run: WalkRun, config: WalkConfig, base: Figures, name: str) -> tuple[dict[str, int], float]:
    """Faults of all phases of one walker, and what they cost together."""
    total, spent = FaultCounts(), 0.0
    for phase in run.phases:
        if who(config, phase) != name:
            continue
        for kind in ("read", "write", "permission"):
            setattr(total, kind, getattr(total, kind) + getattr(phase.faults, kind))
        spent += phase.ns - base.access * estimate.accesses(config, 4096, phase) - base.exit * phase.exits
    return split(total), spent


def evaluate(ordinary: list[WalkResult], large: list[WalkResult], nested: list[WalkResult]) -> Figures:
    """The figures out of what was measured."""
    sizes = list(zip(ordinary[::2], large, strict=True))
    resident = next(pair for pair in sizes if key(pair[0].config) == "private/write")
    fixed = {name: round(value, 1) for name, value in slope(*resident).items()}
    base = Figures(f"Linux {current().record.version} with the series", **fixed, prefault={}, faults={})
    prefault = {key(pair[0].config): round(leaf(*pair), 1) for pair in sizes}
    faults: dict[str, dict[str, dict[str, dict[str, float]]]] = {"guest": {}, "l2": {}, "l1": {}}
    for results, names in ((ordinary, ("guest",)), (nested, ("l2", "l1"))):
        for reads, writes in zip(results[::2], results[1::2], strict=True):
            for name in names:
                faults[name][key(reads.config)] = {
                    WITHOUT: fit(reads.without, writes.without, reads.config, base, name),
                    PREFAULTED: fit(reads.with_prefault, writes.with_prefault, reads.config, base, name),
                }
    return dataclasses.replace(base, prefault=prefault, faults=faults)


def table(figures: Figures) -> Table:
    """What an ordinary guest pays, by backing and state."""
    shown = Table(title=f"Instructions, {figures.measured}")
    shown.add_column("backing/resident", no_wrap=True)
    for heading in ("pre-fault a leaf", "read fault", "write fault", "permission fault and next"):
        shown.add_column(heading, justify="right")
    for filed, leaf in figures.prefault.items():
        sides = figures.faults["guest"][filed]
        kinds = [
            sides[PREFAULTED].get(kind, sides[WITHOUT].get(kind)) for kind in ("read", "write", "permission")
        ]
        shown.add_row(filed, f"{leaf:,.0f}", *("" if one is None else f"{one:,.0f}" for one in kinds))
    return shown


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--write", is_flag=True, help=f"Store them as {TARGET.name} of prefault.report.")
def main(write: bool) -> None:
    """Measure, print, and store if asked to."""
    console = Console(stderr=True)
    with console.status("ordinary guests"):
        ordinary = measure(list(configs(ORDINARY, 1000)))
        large = measure(list(configs(LARGE, 0))[::2])
    with console.status("nested guests"):
        nested = measure(list(configs(NESTED, FEW)))
    figures = evaluate(ordinary, large, nested)
    Console().print(table(figures))
    if write:
        TARGET.write_text(json.dumps(dataclasses.asdict(figures), indent=1) + "\n")
        console.print(f"stored in {TARGET.name} (prefault {version('prefault')})")


if __name__ == "__main__":
    main()
