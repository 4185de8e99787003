# SPDX-License-Identifier: Apache-2.0
"""``prefault lab``: the machine in which an arm64 KVM, or for comparison x86's, runs on any Linux host."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, Unpack

import click
from rich.table import Table

from prefault.cli import output
from prefault.cli.kernels import (
    ArchOptions,
    KernelOptions,
    arch_of,
    arch_option,
    cpu_option,
    image_of,
    kernel_options,
    refuse_arm64_kernels,
    variant_of,
)
from prefault.cli.progress import drawn
from prefault.cli.values import Real, Size
from prefault.errors import ExitCode, ToolMissing, UsageError
from prefault.lab import build as lab_build
from prefault.lab import clean as lab_clean
from prefault.lab import doctor as lab_doctor
from prefault.lab import machine, payload, runs, stock, tools
from prefault.lab.arch import ARCHITECTURES, ARM64, Architecture
from prefault.lab.boot import bootable
from prefault.lab.frames import Kind
from prefault.lab.job import Job, JobFile, JobResult, JobSplat, command_line, run_job
from prefault.lab.machine import MODES, MachineOptions
from prefault.lab.variants import VARIANTS

_Command = TypeVar("_Command", bound=Callable[..., object])

SKIPPED = 4
"""Exit status of a kernel selftest that could not test anything (KSFT_SKIP)."""


@click.group()
def lab() -> None:
    """Build and use the lab: a patched arm64 kernel with KVM, emulated on any Linux machine.

    \b
    prefault lab doctor        what is here, what is missing, how to get it
    prefault lab build         kernel and root file system, once
    prefault lab run x.py      a Python file inside, its output and status outside
    """


class _MachineChoices(KernelOptions, ArchOptions):
    memory: int
    cpus: int
    mode: str
    icount: bool
    cpu: str
    lpa2: bool
    mte: bool
    append: tuple[str, ...]


def _machine_options(command: _Command) -> _Command:
    """Give a command the options of the machine."""
    options = (
        click.option("--memory", type=Size(), default="2G", show_default=True, help="Memory of the machine."),
        click.option("--cpus", type=click.IntRange(1, 8), default=2, show_default=True, help="CPUs."),
        click.option(
            "--mode", type=click.Choice(MODES), default="nested", show_default=True, help="KVM's mode."
        ),
        click.option("--icount", is_flag=True, help="Let the clock count instructions; one CPU."),
        cpu_option,
        click.option("--lpa2", is_flag=True, help="52-bit addresses; closing nested VMs is slow then."),
        click.option("--mte", is_flag=True, help="Memory tagging."),
        click.option("--append", multiple=True, metavar="ARG", help="Extra kernel argument; repeatable."),
        kernel_options,
        arch_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def _chosen_machine(choices: _MachineChoices) -> MachineOptions:
    refuse_arm64_kernels(choices, arch_of(choices))
    return MachineOptions(
        arch=arch_of(choices),
        memory_mib=choices["memory"] >> 20,
        cpus=choices["cpus"],
        mode=choices["mode"],
        icount=choices["icount"],
        cpu=choices["cpu"],
        lpa2=choices["lpa2"],
        mte=choices["mte"],
        append=(*variant_of(choices).arguments, *choices["append"]),
    )


@lab.command()
@arch_option
@output.json_option
def doctor(arch: str) -> None:
    """Say what the lab has on this machine, what it lacks, and how to get that.

    Exit status 0 if a job can run now, 77 if not.
    """
    findings = lab_doctor.examine(ARCHITECTURES[arch])
    able = lab_doctor.can_run(findings)
    if output.wants_json():
        output.emit("lab doctor", {"can_run": able, "findings": findings})
    else:
        table = Table("", "what", "needed to", "state", "how to get it", box=None)
        for finding in findings:
            sign = "ok" if finding.present else "--"
            table.add_row(sign, finding.name, finding.needed_to, finding.detail, finding.remedy)
        output.stdout().print(table)
        output.stderr().print("The lab can run." if able else "The lab cannot run yet.")
    click.get_current_context().exit(ExitCode.DONE if able else ExitCode.MISSING)


@lab.command()
@click.option("--yes", is_flag=True, help="Install missing packages without asking.")
@click.option(
    "--source",
    type=click.Path(file_okay=False, path_type=Path),
    help="Build this kernel tree, which is copied and not changed, in place of Debian's source.",
)
@click.option(
    "--variant",
    type=click.Choice(list(VARIANTS)),
    help="Build this variant in place of the ordinary kernel: "
    + "; ".join(f"{name}: {variant.about}" for name, variant in VARIANTS.items())
    + ".",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Parallel compilers; one per CPU if not given.")
@arch_option
@click.option("--dry-run", is_flag=True, help="Print the command lines and run none.")
@output.json_option
def build(
    yes: bool, source: Path | None, variant: str | None, jobs: int | None, arch: str, dry_run: bool
) -> None:
    """Build the lab's kernel and root file system; do nothing if they are there and right.

    Checks each patch of the series with checkpatch.pl --strict, and what it touches with W=1. The kernel
    that was built last is the one that runs use. Variants are built and kept beside it, without these checks.

    For x86_64 nothing is built: Debian's own kernel is fetched, with the modules that a run needs.
    """
    chosen = ARCHITECTURES[arch]
    if chosen.stock:
        if source or variant or jobs:
            raise UsageError(f"--source, --variant and --jobs are about building, and {arch} builds nothing")
        _fetch(chosen, yes, dry_run)
        return
    lacking = tools.missing()
    if dry_run:
        plan = tools.plan(lacking).commands if lacking else ()
        for command in (*plan, *lab_build.commands(source, variant=variant, jobs=jobs or 0)):
            click.echo(shlex.join(command))
        return
    if lacking:
        _install(lacking, yes)
    with drawn() as progress:
        built = lab_build.build(source, variant=variant, jobs=jobs or 0, progress=progress)
    if output.wants_json():
        output.emit("lab build", {"image": built.image, "folder": built.folder, "record": built.record})
    else:
        record = built.record
        click.echo(f"kernel {record.version} with {len(record.series)} patches: {built.image}", err=True)


def _fetch(arch: Architecture, yes: bool, dry_run: bool) -> None:
    """Have Debian's own kernel for an architecture."""
    lacking = tools.missing(tools.needed_for(arch))
    if dry_run:
        plan = tools.plan(lacking).commands if lacking else ()
        for command in (*plan, *stock.commands(arch)):
            click.echo(shlex.join(command))
        return
    if lacking:
        _install(lacking, yes, arch)
    with drawn() as progress:
        kernel = stock.fetch(arch, progress)
    if output.wants_json():
        output.emit("lab build", {"image": kernel.image, "folder": kernel.folder, "record": kernel.record})
    else:
        click.echo(f"Debian's kernel {kernel.record.version} for {arch.name}: {kernel.image}", err=True)


def _install(lacking: dict[tools.Tool, str], yes: bool, arch: Architecture = ARM64) -> None:
    """Install what is missing, if the user agrees.

    :raises ToolMissing: the user does not, or cannot be asked
    """
    plan = tools.plan(lacking)
    listed = "\n".join(f"  {tool.name}: {problem}" for tool, problem in lacking.items())
    click.echo(f"Missing on this machine:\n{listed}\nThis would install it:\n{plan}", err=True)
    if not yes:
        if not sys.stdin.isatty():
            raise ToolMissing(f"packages must be installed; run `{lab_doctor.install(arch)}`, or:\n{plan}")
        if not click.confirm("Install?", err=True):
            raise ToolMissing(f"nothing was installed; to do it yourself:\n{plan}")
    with drawn() as progress:
        progress.stage("packages")
        plan.run(progress.step)
    still = tools.missing(lacking)
    if still:
        listed = "; ".join(f"{tool.name}: {problem}" for tool, problem in still.items())
        raise ToolMissing(f"still missing after installing ({listed}): see `prefault lab doctor`")


class _RunChoices(_MachineChoices):
    script: str | None
    arguments: tuple[str, ...]
    module: bool
    timeout: float
    collect: tuple[str, ...]
    output_folder: Path
    dry_run: bool


@lab.command(context_settings={"allow_interspersed_args": False})
@click.option("-m", "module", is_flag=True, help="SCRIPT is a module of prefault or the standard library.")
@_machine_options
@click.option(
    "--timeout",
    type=Real(min=0, min_open=True),
    default=120,
    show_default=True,
    help="Seconds for the script, boot not included.",
)
@click.option("--collect", multiple=True, metavar="PATH", help="File or folder inside to bring back.")
@click.option(
    "--output",
    "output_folder",
    type=click.Path(file_okay=False, path_type=Path),
    default="lab-output",
    show_default=True,
    help="Where collected files go.",
)
@click.option("--dry-run", is_flag=True, help="Print QEMU's command line, its files in place.")
@output.json_option
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(**choices: Unpack[_RunChoices]) -> None:
    """Run a Python file (or, with -m, a module) inside the lab.

    Its output goes where it belongs; prefault's exit status is 0 if the script's is, and 1 with the script's
    own status told if not. The package prefault can be imported, without its cli, report and lab parts.

    \b
    prefault lab run probe.py --verbose
    prefault lab run --mode protected --collect /tmp/out -m prefault.scenarios.walk

    \b
    Exit codes: 0 done, 1 the script failed or the kernel log has a splat, 2 usage,
    77 no lab, 124 over its time, 125 the lab was lost.
    """
    job = _chosen_job(choices)
    options = _chosen_machine(choices)
    kernel = image_of(choices)
    if choices["dry_run"]:
        click.echo(shlex.join(command_line(job, options, kernel=kernel)))
        return
    as_json = output.wants_json()
    try:
        result = run_job(job, options, kernel=kernel, on_output=None if as_json else _pass_on)
    except JobSplat as error:
        _save(error.result, choices["output_folder"])
        raise
    saved = _save(result, choices["output_folder"])
    if as_json:
        output.emit(
            "lab run",
            {
                "status": result.status,
                "stdout": result.stdout,
                "stderr": result.stderr,
                "files": saved,
                "seconds": round(result.seconds, 3),
                "run_dir": result.run_dir,
            },
        )
    elif result.status != 0:
        click.echo(
            f"prefault: the script ended with {_status(result.status)}; see {result.run_dir}", err=True
        )
    click.get_current_context().exit(ExitCode.DOES_NOT_HOLD if result.status else ExitCode.DONE)


def _chosen_job(choices: _RunChoices) -> Job:
    script = choices["script"]
    assert script is not None
    if choices["module"]:
        return Job(
            ("python3", "-m", script, *choices["arguments"]), {}, choices["collect"], choices["timeout"]
        )
    path = Path(script)
    if not path.is_file():
        raise UsageError(f"{script}: no such file; a module is run with -m")
    inside = f"/root/{path.name}"
    argv = ("python3", inside, *choices["arguments"])
    return Job(argv, {inside: path.read_bytes()}, choices["collect"], choices["timeout"])


def _status(number: int) -> str:
    return f"status {number}" if number >= 0 else f"signal {-number}"


def _pass_on(kind: Kind, piece: bytes) -> None:
    stream = sys.stdout.buffer if kind is Kind.STDOUT else sys.stderr.buffer
    stream.write(piece)
    stream.flush()


def _save(result: JobResult, folder: Path) -> dict[str, Path]:
    saved = {}
    for name, data in result.files.items():
        target = folder / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        saved[name] = target
    return saved


@lab.command()
@_machine_options
@click.option("--dry-run", is_flag=True, help="Print QEMU's command line, its files in place.")
def shell(dry_run: bool, **choices: Unpack[_MachineChoices]) -> None:
    """Open a console in the lab; leave with `exit` or Ctrl-A x."""
    if not (dry_run or sys.stdin.isatty()):
        raise UsageError("the shell needs a terminal: use `prefault lab run` for scripts")
    options = _chosen_machine(choices)
    kernel = bootable(options.arch, image_of(choices))
    folder = runs.dry() if dry_run else runs.new()
    initrd = folder / "initrd.cpio"
    kernel.put_initrd(initrd, payload.shell_archive())
    argv = machine.shell_command(options, kernel.image, initrd)
    if dry_run:
        click.echo(shlex.join(argv))
        return
    try:
        with runs.held(folder), _terminal_restored():
            status = subprocess.call(argv)  # in our process group: the terminal is QEMU's now
    except FileNotFoundError as error:
        raise ToolMissing(f"{argv[0]} is not installed: run `{lab_doctor.install(options.arch)}`") from error
    finally:
        initrd.unlink(missing_ok=True)
    click.get_current_context().exit(ExitCode.DONE if status == 0 else ExitCode.LAB_LOST)


@contextlib.contextmanager
def _terminal_restored() -> Iterator[None]:
    """Put the terminal back as it was, whatever QEMU left."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@lab.command()
@click.option("--all", "everything", is_flag=True, help="Remove all parts.")
@click.argument("parts", nargs=-1, type=click.Choice(list(lab_clean.PARTS)))
@output.json_option
def clean(everything: bool, parts: tuple[str, ...]) -> None:
    """Remove parts of the lab's cache and say how much that freed. Installed packages stay."""
    chosen = tuple(lab_clean.PARTS) if everything else parts
    if not chosen:
        listed = ", ".join(f"{part} ({size >> 20} MiB)" for part, size in lab_clean.sizes().items())
        raise UsageError(f"nothing to remove was named: use --all or one of {listed}")
    freed = {part: lab_clean.remove(part) for part in chosen}
    if output.wants_json():
        output.emit("lab clean", {"freed": freed})
        return
    for part, size in freed.items():
        click.echo(f"{part}: {size >> 20} MiB freed")


@lab.command()
@_machine_options
@click.option(
    "--timeout",
    type=Real(min=0, min_open=True),
    default=600,
    show_default=True,
    help="Seconds for each test.",
)
@output.json_option
@click.argument("names", nargs=-1)
def selftest(names: tuple[str, ...], timeout: float, **choices: Unpack[_MachineChoices]) -> None:
    """Run the kernel's own KVM selftests that were built with it; all of them if none is named.

    Exit status 0 if none failed, 1 if one did, 77 if all were skipped.
    """
    if arch_of(choices).stock:
        raise UsageError(
            "the kernel's selftests are built with it, and x86_64 builds nothing: leave --arch out"
        )
    kernel = image_of(choices)
    built = lab_build.current(choices["variant"])
    verdicts = {}
    for name in names or built.record.selftests:
        inside = f"/root/{name}"
        program = JobFile(built.selftest(name).read_bytes(), 0o755)
        job = Job((inside,), {inside: program}, timeout=timeout)
        echo = None if output.wants_json() else _pass_on_as_remark
        status = run_job(job, _chosen_machine(choices), kernel=kernel, on_output=echo).status
        verdicts[name] = {0: "pass", SKIPPED: "skip"}.get(status, f"fail ({_status(status)})")
        if not output.wants_json():
            click.echo(f"{name}: {verdicts[name]}")
    if output.wants_json():
        output.emit("lab selftest", {"verdicts": verdicts})
    click.get_current_context().exit(_selftest_exit(list(verdicts.values())))


def _selftest_exit(verdicts: list[str]) -> ExitCode:
    if any(verdict.startswith("fail") for verdict in verdicts):
        return ExitCode.DOES_NOT_HOLD
    return ExitCode.DONE if "pass" in verdicts else ExitCode.MISSING


def _pass_on_as_remark(_: Kind, piece: bytes) -> None:
    sys.stderr.buffer.write(piece)
    sys.stderr.buffer.flush()
