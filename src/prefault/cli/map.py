# SPDX-License-Identifier: Apache-2.0
"""``prefault map``: the stage-2 tables of a VM, drawn."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import click
from rich.console import Console, RenderableType
from rich.text import Text

from prefault.cli import output
from prefault.cli.kernels import image_of, variant_of
from prefault.cli.walks import (
    WalkOptions,
    given,
    print_command,
    printed_by,
    refuse_lab_options,
    same_in_lab,
    walk_config,
    walk_options,
)
from prefault.errors import CapabilityMissing, UsageError
from prefault.kvm import open_kvm, stage2
from prefault.lab.job import Job, command_line, run_job
from prefault.lab.machine import MachineOptions
from prefault.report import map_text
from prefault.report.map import Slot, TableMap, changes, page_size_of
from prefault.report.map_json import change_json, table_json
from prefault.report.map_svg import Panel, svg
from prefault.report.walk import describe
from prefault.scenarios.tables import TablesResult, tables
from prefault.scenarios.walk import WalkConfig
from prefault.spec import HostConfig, open_spec

EPILOG = """\b
Examples:
  prefault map                                     a small VM: before, pre-faulted, and after its walk
  prefault map --svg map.svg                       the same as a picture for a browser
  prefault map --backing thp --prefault 50         blocks, half of them pre-faulted
  prefault map --nested --machine lab              an L2's shadow tables, on the real kernel
  prefault map --pid 4711                          a VM of this host
  prefault map stage2_page_tables                  a file of debugfs, copied from wherever
  ssh host cat /sys/kernel/debug/kvm/*/stage2_page_tables | prefault map -
  prefault map --diff before.txt after.txt         what changed from one dump to the other

\b
Exit codes: 0 done, 2 usage or a file that is no dump, 3 operating error,
77 no capability or no lab, 124 timed out, 125 the lab was lost."""

VM_OPTIONS = (
    *("size", "backing", "resident", "vcpus", "nested", "writes", "prefault", "when", "machine"),
    *("memory", "mode", "timeout", "kernel", "variant", "dry_run"),
)
"""Options about a VM that the command makes itself."""

STANDARD_INPUT = "standard input"


@dataclass(frozen=True)
class Scene:
    """Tables of one moment, the canonical one first."""

    name: str
    tables: tuple[TableMap, ...]


@dataclass(frozen=True)
class Story:
    """What is drawn: moments in order.

    :ivar title: of the whole
    :ivar remarks: lines below
    :ivar facts: more for ``--json``
    """

    title: str
    scenes: tuple[Scene, ...]
    remarks: tuple[str, ...] = ()
    facts: tuple[tuple[str, object], ...] = ()


class _Options(WalkOptions):
    files: tuple[str, ...]
    pid: int | None
    diff: bool
    page_size: str | None
    svg: Path | None
    width: int | None
    all_parts: bool


@click.command("map", epilog=EPILOG)
@click.argument("files", nargs=-1)
@click.option("--pid", type=click.IntRange(min=1), help="Draw the VMs of this process, from debugfs.")
@click.option(
    "--diff", is_flag=True, help="Show what changed between two FILES, or from one moment to the next."
)
@click.option(
    "--svg", type=click.Path(dir_okay=False, path_type=Path), help="Write a picture to this file as well."
)
@click.option("--all", "all_parts", is_flag=True, help="List every run of leaves, however many there are.")
@click.option("--width", type=click.IntRange(60, 400), help="Columns; those of the terminal if not given.")
@click.option(
    "--page-size",
    type=click.Choice(["4K", "16K", "64K"]),
    help="Granule: of the specification's host, or of FILES that do not tell.",
)
@walk_options(size="4M")
@output.json_option
def map_(**options: Unpack[_Options]) -> None:
    """Draw stage-2 tables: levels, blocks and pages, permissions, holes.

    Without FILES, a small VM is made as by `prefault run`, and its tables are drawn before anything is
    mapped, pre-faulted, and after its guest has walked. FILES are what debugfs says of a VM
    (stage2_page_tables, nested/*, or the VM's whole folder); - is standard input.
    """
    story = _story(options)
    if story is None:
        return
    if options["svg"]:
        _write_svg(story, options["svg"])
    if output.wants_json():
        output.emit("map", _json(story, diff=options["diff"]))
    else:
        _print(story, options)


def _story(options: _Options) -> Story | None:
    """What is to be drawn; None if that was only a dry run."""
    files, pid = options["files"], options["pid"]
    if files or pid:
        named = given(VM_OPTIONS)
        if named or (files and pid):
            raise UsageError(
                f"{', '.join(named) or '--pid'}: FILES are tables already; leave one of the two out"
            )
        if pid and options["diff"]:
            raise UsageError("--diff: VMs of a process are no moments of one; save a dump now and one later")
        return _of_process(pid, options) if pid else _of_files(options)
    refuse_lab_options(options["machine"])
    if options["page_size"] and options["machine"] != "spec":
        raise UsageError(f"--page-size: the page size of --machine {options['machine']} is what it is")
    config = walk_config(options)
    make = {"spec": _on_spec, "lab": _in_lab, "kvm": _here}[options["machine"]]
    result = make(config, options)
    return _of_walk(result, options) if result else None


# A VM that is made for it.


def _on_spec(config: WalkConfig, options: _Options) -> TablesResult:
    host = HostConfig(page_size=_bytes(options["page_size"] or "4K"))
    with output.stderr().status("the guest walks its memory on the specification"), open_spec(host) as kvm:
        return tables(kvm, config)


def _bytes(granule: str) -> int:
    return int(granule.removesuffix("K")) << 10


def _here(config: WalkConfig, options: _Options) -> TablesResult:
    with open_kvm() as kvm:
        return tables(kvm, config)


def _in_lab(config: WalkConfig, options: _Options) -> TablesResult | None:
    arguments = ("--json", json.dumps(config.to_json()))
    job = Job(("python3", "-m", "prefault.scenarios.tables", *arguments), timeout=options["timeout"])
    machine = MachineOptions(
        memory_mib=options["memory"] >> 20,
        cpus=options["vcpus"],
        mode=options["mode"],
        append=variant_of(options).arguments,
    )
    kernel = image_of(options)
    if options["dry_run"]:
        print_command(command_line(job, machine, kernel=kernel))
        return None
    with output.stderr().status("the guest walks its memory in the lab"):
        done = run_job(job, machine, kernel=kernel)
    return TablesResult.from_json(printed_by(done))


def _of_walk(result: TablesResult, options: _Options) -> Story:
    slots = tuple(Slot(name, gpa, size) for name, (gpa, size) in result.slots.items())
    scenes = []
    for stage in result.stages:
        dumps = [next(stage2.read(text.splitlines())) for text in stage.tables]
        maps = [
            TableMap(
                f"shadow MMU {number - 1}" if dump.shadow else "canonical MMU",
                dump,
                result.page_size,
                slots=() if dump.shadow else slots,
            )
            for number, dump in enumerate(dumps)
        ]
        scenes.append(Scene(stage.name, tuple(maps)))
    again = options["machine"] == "spec" and not options["page_size"]  # the lab has its own
    remarks = (f"On the real kernel: {same_in_lab()}",) if again else ()
    facts = (("machine", options["machine"]), ("config", result.config.to_json()), ("slots", result.slots))
    return Story(describe(result.config), tuple(scenes), remarks, facts)


# Tables that are there.


def _of_files(options: _Options) -> Story:
    files = options["files"]
    if options["diff"] and len(files) != 2:
        raise UsageError(f"--diff compares two FILES, not {len(files)}")
    with output.stderr().status("reading tables"):
        named = [(name, list(_read(name))) for name in files]
    scenes = [
        Scene(STANDARD_INPUT if name == "-" else name, _maps(name, dumps, options)) for name, dumps in named
    ]
    if options["diff"] and any(len(scene.tables) != 1 for scene in scenes):
        raise UsageError("--diff compares two tables, but there are several in one of the FILES")
    return Story("", tuple(scenes))


def _of_process(pid: int, options: _Options) -> Story:
    try:
        here = sorted(stage2.DEBUGFS_KVM.iterdir())
    except OSError as error:
        raise CapabilityMissing(
            f"{stage2.DEBUGFS_KVM} cannot be read: {error.strerror}; that needs root, KVM and debugfs"
        ) from error
    # A VM's folder is named after the process and the file descriptor.
    folders = [folder for folder in here if folder.name.startswith(f"{pid}-")]
    if not folders:
        others = sorted({folder.name.split("-")[0] for folder in here if folder.is_dir()})
        has = f"these have: {', '.join(others)}" if others else "no process has"
        raise UsageError(f"process {pid} has no VM on this host; {has}")
    scenes = [Scene(folder.name, _maps(folder.name, list(_read(str(folder))), options)) for folder in folders]
    return Story("", tuple(scenes))


def _read(name: str) -> Iterator[tuple[str, stage2.Dump]]:
    """The tables in a file or in a VM's folder, each with its name.

    :raises UsageError: it cannot be read, is no dump, or is empty
    :raises CapabilityMissing: the folder is of a kernel that does not show its tables
    """
    path = Path(name)
    if name != "-" and path.is_dir():
        if not (path / "stage2_page_tables").exists():
            raise CapabilityMissing(
                f"{path} has no stage2_page_tables; arm64 kernels with CONFIG_PTDUMP_STAGE2_DEBUGFS have it"
            )
        shadows = sorted((path / "nested").glob("*"), key=_numbers)
        for file in (path / "stage2_page_tables", *shadows):
            yield from ((file.name, dump) for dump in _dumps(str(file), shadow=file in shadows))
        return
    for number, dump in enumerate(_dumps(name)):
        yield (f"table {number}" if number else "table"), dump


def _numbers(file: Path) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", file.name)]


def _dumps(name: str, *, shadow: bool = False) -> list[stage2.Dump]:
    """The tables in one file; a shadow MMU may have none."""
    try:
        if name == "-":
            found = list(stage2.read(sys.stdin, STANDARD_INPUT))
        else:
            with Path(name).open(errors="backslashreplace") as file:
                found = list(stage2.read(file, name))
    except FileNotFoundError as error:
        if shadow:
            return []
        raise UsageError(f"{name}: {error.strerror}") from error
    except OSError as error:
        hint = "; tables of debugfs need root" if isinstance(error, PermissionError) else ""
        raise UsageError(f"{name}: {error.strerror}{hint}") from error
    if not found and not shadow:
        raise UsageError(f"{name}: there is no table in it; a table begins with '---[ Guest IPA ]---'")
    return found


def _maps(name: str, named: list[tuple[str, stage2.Dump]], options: _Options) -> tuple[TableMap, ...]:
    dumps = [dump for _, dump in named]
    told = options["page_size"]
    size, others = page_size_of(dumps, name, _bytes(told) if told else None)
    return tuple(TableMap(label, dump, size, others) for label, dump in named)


# Output.


def _print(story: Story, options: _Options) -> None:
    console = output.stdout(options["width"])
    ascii_only = console.options.ascii_only
    for line in _lines(story, console, options, ascii_only):
        console.print(line)
    for remark in story.remarks:
        console.print(f"\n{remark}", markup=False, soft_wrap=True)


def _lines(story: Story, console: Console, options: _Options, ascii_only: bool) -> Iterator[RenderableType]:
    if story.title:
        yield Text(story.title)
    limit = 0 if options["all_parts"] else map_text.LIMIT
    if options["diff"]:
        yield from _differences(story, limit)
    else:
        yield from _drawings(story, console.width, limit, ascii_only)


def _drawings(story: Story, width: int, limit: int, ascii_only: bool) -> Iterator[RenderableType]:
    before: Scene | None = None
    for scene in story.scenes:
        for number, table in enumerate(scene.tables):
            yield Text()
            yield Text(_heading(scene, number, before), "bold")
            ranges = map_text.shown_regions(_same_table(story, number))
            yield map_text.drawing(table, ranges, width, limit, ascii_only=ascii_only)
        before = scene if story.title else None  # files are not moments of one VM
    yield Text()
    yield map_text.legend(ascii_only=ascii_only)


def _same_table(story: Story, number: int) -> list[TableMap]:
    """One table at all moments, so that all are drawn alike."""
    return [scene.tables[number] for scene in story.scenes if number < len(scene.tables)]


def _heading(scene: Scene, number: int, before: Scene | None) -> str:
    table = scene.tables[number]
    heading = f"{scene.name}: {map_text.title(table)}" if table.name != "table" else scene.name
    if before and number < len(before.tables):
        heading += f" ({map_text.change_line(before.tables[number], table)})"
    return heading


def _pairs(story: Story) -> Iterator[tuple[Scene, Scene, TableMap, TableMap]]:
    """Each table of each moment with what it was at the moment before."""
    for before, after in itertools.pairwise(story.scenes):
        for one, other in zip(before.tables, after.tables, strict=False):
            yield before, after, one, other


def _differences(story: Story, limit: int) -> Iterator[RenderableType]:
    for before, after, one, other in _pairs(story):
        yield Text()
        name = "" if other.name == "table" else f": {map_text.title(other)}"
        yield Text(f"{before.name} to {after.name}{name} ({map_text.change_line(one, other)})", "bold")
        if changes(one, other):
            yield map_text.change_table(one, other, limit)


def _json(story: Story, *, diff: bool) -> dict[str, object]:
    found: dict[str, object] = dict(story.facts)
    found["scenes"] = [
        {"name": scene.name, "tables": [table_json(table) for table in scene.tables]}
        for scene in story.scenes
    ]
    if diff:
        found["changes"] = [
            {
                "before": before.name,
                "after": after.name,
                "table": other.name,
                "changes": [change_json(change) for change in changes(one, other)],
            }
            for before, after, one, other in _pairs(story)
        ]
    return found


def _write_svg(story: Story, path: Path) -> None:
    """Put the picture where it belongs, whole or not at all."""
    panels = [
        [Panel(_heading(scene, number, None), table) for number, table in enumerate(scene.tables)]
        for scene in story.scenes
    ]
    _replace(path, svg(story.title, panels))


def _replace(path: Path, text: str) -> None:
    """Write a file that has its name only when it is whole."""
    if str(path) == "-" or (path.exists() and not path.is_file()):
        raise UsageError(f"--svg {path}: it must be a file, because it is written beside and renamed")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text)
        beside.replace(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"--svg {path}: {error.strerror}; the folder must be there") from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)
