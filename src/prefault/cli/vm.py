# SPDX-License-Identifier: Apache-2.0
"""``prefault vm``: a small VMM that boots Linux, snapshots it and restores it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, Unpack

import click

from prefault.cli import output
from prefault.cli.kernels import KernelOptions, image_of, lab_options, variant_of
from prefault.cli.values import KernelImage, Size
from prefault.cli.walks import given, print_command
from prefault.errors import (
    BadSnapshot,
    CapabilityMissing,
    ExitCode,
    GuestDied,
    LabError,
    Mismatch,
    PrefaultError,
    UsageError,
)
from prefault.lab import guestfs, runs
from prefault.lab.frames import Kind
from prefault.lab.job import Job, JobFile, JobResult, command_line, run_job
from prefault.lab.machine import MachineOptions
from prefault.machine import GUEST_MEMORY, Resident
from prefault.report.units import format_size
from prefault.vmm import app, ranges, snapshot
from prefault.vmm.config import MAX_VCPUS, GuestConfig
from prefault.vmm.order import COMMAND_LINE, Boot, How, Restore, Watch, plain
from prefault.vmm.saved import Saved
from prefault.vmm.snapshot import Snapshot

BOOT_EPILOG = """\b
Examples:
  prefault vm initrd guest.cpio                          a small root file system: busybox
  prefault vm boot Image --initrd guest.cpio --machine lab --append quiet
  prefault vm boot Image --initrd guest.cpio --vcpus 4 --backing thp
  prefault vm boot Image --initrd guest.cpio --snapshot warm --snapshot-when ready

\b
Exit codes: 0 the guest powered itself off, or was stopped as asked; 1 it asked for a reset or crashed;
2 usage, 3 operating error, 77 no KVM, no GICv3 or no lab, 124 timed out, 125 the lab was lost."""

RESTORE_EPILOG = """\b
Examples:
  prefault vm restore warm                               read everything, then go on
  prefault vm restore warm --how map --prefault all      map the file, pre-fault it
  prefault vm restore warm --how userfaultfd --first plan.json --prefault plan.json

\b
Exit codes: 0 the guest powered itself off, or was stopped as asked; 1 the snapshot is damaged or foreign,
or the guest asked for a reset or crashed; 2 usage, 3 operating error, 77 no KVM, no capability or no lab,
124 timed out, 125 the lab was lost."""

_Command = TypeVar("_Command", bound=Callable[..., object])

LAB_OPTIONS = ("lab_memory", "lab_cpus", "mode", "timeout", "kernel", "variant", "dry_run")
_LAB_SHARE = 2
"""The guest's memory may take the lab's memory divided by this: files come and go beside it."""

_INSIDE = "/root/vm"
_ORDER, _RESULT = f"{_INSIDE}/order.json", f"{_INSIDE}/result.json"
_TAKEN, _PACKED, _GIVEN = "/tmp/taken", "/tmp/taken.pack", "/tmp/given"


class _SharedOptions(KernelOptions):
    snapshot: Path | None
    snapshot_when: str
    stop_after_snapshot: bool
    stop_when: str
    type: tuple[tuple[str, str], ...]
    count_faults: bool
    machine: str
    lab_memory: int
    lab_cpus: int
    mode: str
    timeout: float
    dry_run: bool


def _shared_options(command: _Command) -> _Command:
    """What boot and restore have in common: what to wait for, and where to run."""
    options = (
        click.option(
            "--snapshot",
            type=click.Path(path_type=Path),
            help="Folder to write a snapshot to, at --snapshot-when or when SIGUSR2 comes.",
        ),
        click.option("--snapshot-when", default="", help="Console text at which the snapshot is taken."),
        click.option("--stop-after-snapshot", is_flag=True, help="End when the snapshot is written."),
        click.option("--stop-when", default="", help="Console text at which the VM ends, as asked."),
        click.option(
            "--type",
            type=(str, str),
            multiple=True,
            metavar="TEXT KEYS",
            help="When the console shows TEXT, type KEYS and return; repeatable.",
        ),
        click.option(
            "--count-faults", is_flag=True, help="Count the guest's stage-2 faults; takes root, and time."
        ),
        click.option(
            "--machine",
            type=click.Choice(["kvm", "lab"]),
            default="kvm",
            show_default=True,
            help="On this arm64 host's own KVM, or on that of the lab, which any Linux machine has.",
        ),
        click.option(
            "--lab-memory", type=Size(), default="2G", show_default=True, help="Lab: memory of the machine."
        ),
        click.option(
            "--lab-cpus", type=click.IntRange(1, 8), default=2, show_default=True, help="Lab: its CPUs."
        ),
        lab_options,
    )
    for option in reversed(options):
        command = option(command)
    return command


def _backing_option(default: str | None) -> Callable[[_Command], _Command]:
    return click.option(
        "--backing",
        type=click.Choice([backing.value for backing in GUEST_MEMORY]),
        default=default,
        show_default=default is not None,
        help="What is behind the guest's memory.",
    )


def _page_size_option(command: _Command) -> _Command:
    return click.option(
        "--page-size", type=Size(), help="Of --backing hugetlb; the host's default if not given."
    )(command)


def _resident_option(default: str | None) -> Callable[[_Command], _Command]:
    return click.option(
        "--resident",
        type=click.Choice([resident.value for resident in Resident]),
        default=default,
        show_default=default is not None,
        help="What the host populates before: nothing, for reading, or for writing.",
    )


@click.group()
def vm() -> None:
    """Boot, snapshot and restore arm64 Linux guests with a small VMM.

    \b
    prefault vm boot Image     boot a kernel; its console is standard output
    prefault vm restore DIR    let a guest go on from a snapshot
    prefault vm show DIR       what a snapshot has, and whether it is whole
    prefault vm initrd FILE    make a small root file system for guests
    """


class _BootOptions(_SharedOptions):
    image: Path
    initrd: Path | None
    append: tuple[str, ...]
    memory: int
    vcpus: int
    backing: str
    page_size: int | None
    resident: str
    el2: bool


@vm.command(epilog=BOOT_EPILOG)
@click.argument("image", type=KernelImage())
@click.option(
    "--initrd",
    type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path),
    help="Initial RAM file system; `prefault vm initrd` makes one.",
)
@click.option("--append", multiple=True, metavar="ARG", help=f"Kernel argument after `{COMMAND_LINE}`.")
@click.option("--memory", type=Size(), default="256M", show_default=True, help="Memory of the guest.")
@click.option("--vcpus", type=click.IntRange(1, MAX_VCPUS), default=1, show_default=True, help="vCPUs.")
@_backing_option("private")
@_page_size_option
@_resident_option("nothing")
@click.option("--el2", is_flag=True, help="Give the guest EL2, so that it can have guests.")
@_shared_options
@output.json_option
def boot(**options: Unpack[_BootOptions]) -> None:
    """Boot an arm64 Linux Image.

    The guest has an in-kernel GICv3 and timers, PSCI, and a serial port (PL011, ttyAMA0), which is standard
    output and, on this host's own KVM, standard input. The VM ends when the guest powers itself off or
    asks for a reset, at --stop-when, and with Ctrl-C.
    """
    _refuse(options)
    guest = GuestConfig(
        memory=options["memory"],
        vcpus=options["vcpus"],
        backing=_backing(options["backing"]),
        huge_page_size=options["page_size"] or 0,
        resident=Resident(options["resident"]),
        el2=options["el2"],
    )
    if guest.el2 and options["machine"] == "lab" and options["mode"] != "nested":
        raise UsageError(f"--el2 needs --mode nested: a KVM in mode {options['mode']} has no nested guests")
    order = Boot(
        image=str(options["image"]),
        initrd=str(options["initrd"] or ""),
        guest=guest,
        command_line=" ".join((COMMAND_LINE, *options["append"])),
        watch=_watch(options),
    )
    _do("vm boot", order, guest.memory, options)


class _RestoreOptions(_SharedOptions):
    folder: Path
    how: str
    backing: str | None
    page_size: int | None
    resident: str | None
    check: bool
    first: str
    prefault: str


@vm.command(epilog=RESTORE_EPILOG)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--how",
    type=click.Choice([how.value for how in How]),
    default=How.EAGER.value,
    show_default=True,
    help="Read all of the memory before, map the file privately, or bring pages as they are touched.",
)
@_backing_option(None)
@_page_size_option
@_resident_option(None)
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Check all of the memory before the guest runs; without it, only what is read.",
)
@click.option(
    "--first",
    default="",
    metavar="RANGES",
    help="userfaultfd: what to bring before all else: plan.json, or IPA+SIZE[,IPA+SIZE…].",
)
@click.option(
    "--prefault",
    default="none",
    show_default=True,
    metavar="RANGES",
    help="What to pre-fault before the guest runs: all, none, plan.json, or IPA+SIZE[,IPA+SIZE…].",
)
@_shared_options
@output.json_option
def restore(**options: Unpack[_RestoreOptions]) -> None:
    """Let a guest go on from a snapshot.

    A snapshot that is truncated, damaged, or of another kind of machine is refused before anything runs.
    """
    _refuse(options)
    how = How(options["how"])
    if options["first"] and how is not How.USERFAULTFD:
        raise UsageError("--first is about what userfaultfd brings: add --how userfaultfd")
    if options["backing"] and how is How.MAP:
        raise UsageError("--how map has the file itself behind the memory: leave --backing out")
    if options["resident"] not in (None, "nothing") and how is How.USERFAULTFD:
        raise UsageError("--resident populates, and userfaultfd brings what is not there: leave one out")
    with _opened(options["folder"]) as saved:
        size = saved.guest.memory
    asked = options["prefault"]
    order = Restore(
        folder=str(options["folder"]),
        how=how,
        check=options["check"],
        guest=_changes(options),
        first=tuple(ranges.parse(options["first"])) if options["first"] else (),
        pre_fault=() if asked in ("all", "none") else tuple(ranges.parse(asked)),
        pre_fault_all=asked == "all",
        watch=_watch(options),
    )
    _do("vm restore", order, size, options)


def _changes(options: _RestoreOptions) -> dict[str, object]:
    """What is behind the memory, where it is not what the snapshot says."""
    named = {
        "backing": options["backing"],
        "huge_page_size": options["page_size"],
        "resident": options["resident"],
    }
    changes: dict[str, object] = {name: value for name, value in named.items() if value is not None}
    if options["how"] == How.USERFAULTFD.value:
        changes["resident"] = Resident.NOTHING.value
    return changes


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Saved]:
    """A snapshot's state, read on this machine, so that what is wrong with it is told at once."""
    source = Snapshot(folder)
    try:
        yield Saved.from_snapshot(source)
    finally:
        source.close()


@vm.command()
@click.argument("folder", type=click.Path(path_type=Path))
@output.json_option
def show(folder: Path) -> None:
    """Say what a snapshot has, and check that it is whole.

    Exit status 0 if it is, 1 if it is truncated or damaged.
    """
    source = Snapshot(folder)
    try:
        saved = Saved.from_snapshot(source)
        source.check()
        stored = sum(one is not None for one in source.sums) * snapshot.CHUNK
        facts = {
            "folder": folder,
            "guest": saved.guest.to_json(),
            "kernel": saved.kernel,
            "page_size": saved.page_size,
            "stored": stored,
            "registers": len(saved.vcpus[0].registers),
        }
    finally:
        source.close()
    if output.wants_json():
        output.emit("vm show", facts)
        return
    guest = saved.guest
    click.echo(
        f"{folder}: whole; {guest.vcpus} vCPUs with {facts['registers']} registers each"
        f"{', with EL2' if guest.el2 else ''}; {format_size(guest.memory)} of {guest.backing.value} memory, "
        f"{format_size(stored) if stored else 'nothing'} of it stored; made on Linux {saved.kernel} "
        f"with pages of {format_size(saved.page_size)}"
    )


@vm.command()
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--script",
    type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path),
    help="Shell commands for the guest's init in place of a shell on the console; end with `poweroff -f`.",
)
@click.option(
    "--python", is_flag=True, help="Python and prefault's VMM besides, for guests that have guests."
)
@click.option(
    "--add",
    multiple=True,
    metavar="INSIDE=FILE",
    help="One more file, at this absolute path inside; repeatable.",
)
def initrd(target: Path, script: Path | None, python: bool, add: tuple[str, ...]) -> None:
    """Make a small root file system for guests: busybox, and a script that init runs.

    What is in it comes from the lab's own root file system, which is fetched if it is not here yet.
    """
    commands = script.read_text() if script else guestfs.SHELL
    data = guestfs.archive(commands, dict(_added(one) for one in add), python=python)
    target.write_bytes(data)
    click.echo(f"{target}: {format_size(-(-len(data) // 4096) * 4096)}", err=True)


def _added(text: str) -> tuple[str, bytes]:
    inside, equals, file = text.partition("=")
    if not equals or not inside.startswith("/"):
        raise UsageError(f"--add {text}: write the absolute path inside, =, and the file to put there")
    try:
        return inside, Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"--add {text}: {file} cannot be read: {error.strerror}") from error


def _backing(name: str) -> Any:
    return next(backing for backing in GUEST_MEMORY if backing.value == name)


def _refuse(options: _SharedOptions) -> None:
    """Options that contradict each other are mistakes of whoever gave them.

    :raises UsageError: there are some
    """
    named = given(LAB_OPTIONS)
    if named and options["machine"] != "lab":
        raise UsageError(f"{', '.join(named)}: about the lab; add --machine lab")
    folder = options["snapshot"]
    if folder:
        snapshot.refuse_existing(folder)
    elif options["snapshot_when"] or options["stop_after_snapshot"]:
        raise UsageError("a snapshot needs a folder: add --snapshot DIR")


def _watch(options: _SharedOptions) -> Watch:
    return Watch(
        snapshot=options["snapshot_when"],
        snapshot_to=str(options["snapshot"] or ""),
        stop_after_snapshot=options["stop_after_snapshot"],
        stop=options["stop_when"],
        type=tuple((text, f"{keys}\n") for text, keys in options["type"]),
        count_faults=options["count_faults"],
    )


def _do(command: str, order: Boot | Restore, memory: int, options: _SharedOptions) -> None:
    """Do an order here or in the lab, and say how it ended."""
    said = bytearray()
    sink = said.extend if output.wants_json() else _pass_on
    if options["machine"] == "lab":
        outcome = _in_lab(order, memory, options, sink)
        if outcome is None:
            return
    else:
        outcome = _here(order, sink)
    if output.wants_json():
        console = {"console": said.decode(errors="replace")} if said else {}
        output.emit(command, {"machine": options["machine"], **outcome, **console})
    else:
        _remark(outcome)
    _judge(outcome, options)


def _remark(outcome: Mapping[str, Any]) -> None:
    """Say what the guest did not."""
    faults, strays = outcome["faults"], outcome["strays"]
    if faults:
        parts = ", ".join(f"{number:,} {kind}" for kind, number in faults.items())
        total = faults["read"] + faults["write"] + faults["execute"]
        click.echo(f"prefault: {total:,} stage-2 faults ({parts})", err=True)
    if strays:
        listed = ", ".join(f"{gpa:#x}" for gpa in strays)
        click.echo(f"prefault: the guest used addresses at which it has nothing: {listed}", err=True)


def _here(order: Boot | Restore, sink: Callable[[bytes], None]) -> Mapping[str, Any]:
    stdin = _stdin()
    if isinstance(order, Boot):
        return app.boot(order, out=sink, stdin=stdin).to_json()
    return app.restore(order, out=sink, stdin=stdin).to_json()


def _stdin() -> int:
    """The keyboard, if there is one."""
    try:
        return sys.stdin.fileno()
    except (OSError, ValueError):
        return -1


def _pass_on(piece: bytes) -> None:
    sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def _in_lab(
    order: Boot | Restore, memory: int, options: _SharedOptions, sink: Callable[[bytes], None]
) -> Mapping[str, Any] | None:
    if memory > options["lab_memory"] // _LAB_SHARE:
        enough = format_size(memory * _LAB_SHARE).replace(" ", "")
        raise UsageError(
            f"{format_size(memory)} of guest memory are over half of the lab's "
            f"{format_size(options['lab_memory'])}: use --lab-memory {enough}"
        )
    taken = options["snapshot"]
    files, raw = _files(order)
    if taken:
        raw = {**raw, "watch": {**dataclasses.asdict(order.watch), "snapshot_to": _TAKEN}, "pack": _PACKED}
    job = Job(
        ("python3", "-m", "prefault.vmm", _ORDER, _RESULT),
        {**files, _ORDER: json.dumps(raw).encode()},
        (_RESULT, _PACKED),
        options["timeout"],
    )
    machine = MachineOptions(
        memory_mib=options["lab_memory"] >> 20,
        cpus=options["lab_cpus"],
        mode=options["mode"],
        append=variant_of(options).arguments,
    )
    kernel = image_of(options)
    if options["dry_run"]:
        print_command(command_line(job, machine, kernel=kernel))
        return None
    done = run_job(job, machine, kernel=kernel, on_output=_Streams(sink))
    outcome = _result(done, order)
    if taken and _PACKED in done.files:
        snapshot.unpack(done.files[_PACKED], taken)
        outcome["snapshot"]["folder"] = str(taken)
    return {**outcome, "lab": {"seconds": done.seconds, "run_dir": done.run_dir}}


class _Streams:
    """Passes on what the guest says and what the VMM remarks, but for the error, which is told at the end."""

    def __init__(self, sink: Callable[[bytes], None]) -> None:
        self._sink = sink

    def __call__(self, kind: Kind, piece: bytes) -> None:
        """Take a piece of output."""
        if kind is Kind.STDOUT:
            self._sink(piece)
        else:
            sys.stderr.buffer.write(piece)
            sys.stderr.buffer.flush()


def _files(order: Boot | Restore) -> tuple[dict[str, bytes | JobFile], dict[str, object]]:
    """What goes into the lab, and the order with the names that things have there."""
    raw = plain(order)
    if isinstance(order, Boot):
        image, initrd = f"{_INSIDE}/Image", f"{_INSIDE}/initrd"
        files: dict[str, bytes | JobFile] = {image: Path(order.image).read_bytes()}
        raw["image"] = image
        if order.initrd:
            files[initrd] = Path(order.initrd).read_bytes()
            raw["initrd"] = initrd
        return files, raw
    packed = runs.folder() / f"given-{os.getpid()}.pack"
    packed.parent.mkdir(parents=True, exist_ok=True)
    try:
        snapshot.pack(Path(order.folder), packed)
        data = packed.read_bytes()
    finally:
        packed.unlink(missing_ok=True)
    inside = f"{_INSIDE}/given.pack"
    return {inside: data}, {**raw, "folder": _GIVEN, "unpack": inside}


def _result(done: JobResult, order: Boot | Restore) -> dict[str, Any]:
    """What the VMM in the lab wrote.

    :raises PrefaultError: it ended with an error of its own, raised here again by its exit code
    """
    try:
        raw = json.loads(done.files[_RESULT])
    except (KeyError, ValueError):
        last = "\n".join(done.stderr.decode(errors="replace").strip().splitlines()[-8:])
        raise LabError(
            f"the VMM ended with status {done.status} and no result; see {done.run_dir}\n{last}"
        ) from None
    assert isinstance(raw, dict)
    if "error" not in raw:
        return raw
    message = str(raw["error"]["message"])
    if raw["error"]["type"] == "BadSnapshot" and isinstance(order, Restore):
        raise BadSnapshot(order.folder, message.partition("cannot be restored: ")[2] or message)
    kinds: dict[int, type[PrefaultError]] = {
        ExitCode.DOES_NOT_HOLD: Mismatch,
        ExitCode.USAGE: UsageError,
        ExitCode.MISSING: CapabilityMissing,
    }
    raise kinds.get(int(raw["error"]["exit_code"]), LabError)(message)


def _judge(outcome: Mapping[str, Any], options: _SharedOptions) -> None:
    """Whether the guest ended as it should have.

    :raises GuestDied: it did not, or before what was waited for
    :raises PrefaultError: the snapshot that was asked for could not be written
    """
    why = outcome["why"]
    if why in ("reset", "crash"):
        what = {"reset": "asked for a reset: it rebooted, or panicked", "crash": "says that it crashed"}[why]
        raise GuestDied(f"the guest {what}; its console says more")
    taken = outcome["snapshot"]
    if taken and "error" in taken:
        raise PrefaultError(f"the guest ended well, but without a snapshot: {taken['error']}")
    for text, missed in (
        (options["snapshot_when"], taken is None),
        (options["stop_when"], why == "shutdown"),
    ):
        if text and missed:
            raise GuestDied(f"the guest powered itself off before it said {text!r}")
