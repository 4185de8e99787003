# SPDX-License-Identifier: Apache-2.0
"""One run of the lab: boot, do the job, bring back its output, status, files and the kernel log.

Failure modes, each told apart from a job that merely ended with a bad status:

- ``JobTimeout``: the machine lives and the job is not done within ``Job.timeout`` seconds of its start;
- ``LabLost``: the machine did not come up, panicked, died, or gave no sign of life for a while;
- ``JobSplat``: all came back, and the kernel log has what a sound kernel never writes. Of a lost machine
  or a job over its time, the message quotes the splat, if there is one on the console.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import BinaryIO

from prefault.errors import JobTimeout, LabLost, Splat
from prefault.lab import machine, payload, process, runs, splat
from prefault.lab.agent import Order
from prefault.lab.boot import Bootable, bootable
from prefault.lab.frames import BadFrame, Decoder, Frame, Kind
from prefault.lab.machine import MachineOptions
from prefault.lab.payload import JobFile

__all__ = ["Job", "JobFile", "JobResult", "JobSplat", "OnOutput", "command_line", "run_job"]

OnOutput = Callable[[Kind, bytes], None]
"""Told each piece of output as it comes; the kind is Kind.STDOUT or Kind.STDERR."""

BOOT_SECONDS = 150.0
"""A kernel with every debug option boots in 66 s on a busy machine."""
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class _Pulse:
    every: float  # seconds of the lab's clock
    lost_after: float  # seconds of the host's


# Under icount a second of the lab's clock is 10^9 instructions, which take many seconds of the host's.
_PULSE = {False: _Pulse(1, 30), True: _Pulse(5, 300)}


@dataclass(frozen=True)
class Job:
    """What to run inside."""

    argv: tuple[str, ...]
    files: Mapping[str, bytes | JobFile] = field(default_factory=dict)
    """Absolute path inside to contents, put there before the job runs."""
    collect: tuple[str, ...] = ()
    """Files and folders inside to bring back; what is not there is left out."""
    timeout: float = 120
    """Seconds from the job's start, boot not included."""


@dataclass(frozen=True)
class JobResult:
    """What came back. ``status`` is the job's own; minus a signal's number if that ended it."""

    status: int
    stdout: bytes
    stderr: bytes
    files: dict[str, bytes]
    kernel_log: str
    seconds: float
    """From power-on to the last frame."""
    run_dir: Path


class JobSplat(Splat):
    """The job came back, and the kernel log has a splat.

    :ivar lines: the offending lines
    :ivar result: what the job gave
    """

    def __init__(self, lines: tuple[str, ...], result: JobResult) -> None:
        self.lines = lines
        self.result = result
        shown = "\n".join(f"  {line}" for line in lines[:10])
        log = result.run_dir / "kernel.log"
        super().__init__(f"the kernel misbehaved during the run ({len(lines)} lines, all in {log}):\n{shown}")


@dataclass
class _Reports:
    """What has come over the job port so far."""

    pieces: dict[Kind, bytearray] = field(default_factory=lambda: {kind: bytearray() for kind in Kind})
    files: dict[str, bytearray] = field(default_factory=dict)
    started: float | None = None
    heard: float = field(default_factory=time.monotonic)
    ended: bool = False

    def take(self, frame: Frame) -> None:
        self.heard = time.monotonic()
        if frame.kind is Kind.HELLO:
            self.started = self.heard
        elif frame.kind is Kind.FILE:
            path, _, piece = frame.payload.partition(b"\0")
            self.files.setdefault(path.decode(), bytearray()).extend(piece)
        elif frame.kind is Kind.END:
            self.ended = True
        else:
            self.pieces[frame.kind] += frame.payload

    def result(self, seconds: float, run_dir: Path) -> JobResult:
        log = self.pieces[Kind.KERNEL_LOG].decode(errors="replace")
        (run_dir / "kernel.log").write_text(log)
        return JobResult(
            status=int(self.pieces[Kind.STATUS]),
            stdout=bytes(self.pieces[Kind.STDOUT]),
            stderr=bytes(self.pieces[Kind.STDERR]),
            files={path: bytes(data) for path, data in self.files.items()},
            kernel_log=log,
            seconds=seconds,
            run_dir=run_dir,
        )


class _Run:
    """A machine at work."""

    def __init__(
        self, job: Job, options: MachineOptions, kernel: Bootable, run_dir: Path, on_output: OnOutput | None
    ) -> None:
        self._job = job
        self._pulse = _PULSE[options.icount]
        self._dir = run_dir
        self._on_output = on_output
        self._reports = _Reports()
        self._decoder = Decoder()
        self.argv = machine.job_command(
            options,
            kernel.image,
            run_dir / "initrd.cpio",
            console=run_dir / "console.log",
            port=run_dir / "job.frames",
        )
        order = Order(job.argv, job.collect, self._pulse.every)
        kernel.put_initrd(run_dir / "initrd.cpio", payload.archive(order, job.files))
        (run_dir / "command").write_text(shlex.join(self.argv) + "\n")

    def follow(self) -> JobResult:
        """Run the machine until the job is done or there is a reason to give up."""
        (self._dir / "job.frames").touch()
        power_on = time.monotonic()
        with (
            (self._dir / "qemu.log").open("wb") as messages,
            (self._dir / "job.frames").open("rb") as port,
            process.running(self.argv, stdout=messages.fileno(), stderr=messages.fileno()) as qemu,
        ):
            while not self._reports.ended:
                died = qemu.poll() is not None  # asked before reading: nothing comes after that
                if self._read(port):
                    continue
                self._give_up_if_due(qemu, died, power_on)
                time.sleep(_POLL_SECONDS)
        return self._reports.result(time.monotonic() - power_on, self._dir)

    def _read(self, port: BinaryIO) -> bool:
        data = port.read(1 << 20)
        try:
            for frame in self._decoder.feed(data):
                self._reports.take(frame)
                if self._on_output is not None and frame.kind in (Kind.STDOUT, Kind.STDERR):
                    self._on_output(frame.kind, frame.payload)
        except BadFrame as error:
            raise self._lost(f"sent something that is not a report ({error})") from error
        return bool(data)

    def _give_up_if_due(self, qemu: Popen[bytes], died: bool, power_on: float) -> None:
        now = time.monotonic()
        started = self._reports.started
        if died:
            raise self._lost(f"ended with QEMU's status {qemu.returncode} before the job reported")
        if started is None:
            if now - power_on > BOOT_SECONDS:
                raise self._lost(f"did not come up within {BOOT_SECONDS:.0f} s")
        elif now - self._reports.heard > self._pulse.lost_after:
            raise self._lost(f"gave no sign of life for {self._pulse.lost_after:.0f} s: it hangs")
        elif now - started > self._job.timeout:
            raise JobTimeout(
                f"the job `{shlex.join(self._job.argv)}` is not done after {self._job.timeout:g} s: "
                f"give it more time or see {self._dir}{self._console()}"
            )

    def _lost(self, what: str) -> LabLost:
        return LabLost(f"the lab's machine {what}; see {self._dir}{self._console()}", self._splats())

    def _splats(self) -> tuple[str, ...]:
        return splat.find(self._console_log.read_text(errors="replace"))

    def _console(self) -> str:
        texts = [path.read_text(errors="replace") for path in (self._dir / "qemu.log", self._console_log)]
        splats = self._splats()
        lines = splats[:10] or tuple("\n".join(texts).strip().splitlines()[-10:])
        heading = "splats on the console" if splats else "last lines of the console"
        return "".join([f"\n{heading}:", *(f"\n  {line}" for line in lines)]) if lines else ""

    @property
    def _console_log(self) -> Path:
        path = self._dir / "console.log"
        path.touch()
        return path


def run_job(
    job: Job,
    options: MachineOptions | None = None,
    *,
    kernel: Path | None = None,
    on_output: OnOutput | None = None,
) -> JobResult:
    """Boot the lab, run the job, and bring back what it gave.

    :param kernel: an image; None is the one that `prefault lab build` made
    :param on_output: told output as it comes; it is in the result as well
    :returns: the result, whatever the job's own status
    :raises ToolMissing: QEMU, the kernel or the root file system is not here and cannot be made
    :raises JobTimeout: the job ran over its time
    :raises LabLost: the machine hung, panicked or died
    :raises JobSplat: the kernel log has a splat; .result has what came back
    """
    options = options or MachineOptions()
    booted = bootable(options.arch, kernel)
    run_dir = runs.new()
    try:
        with runs.held(run_dir):
            result = _Run(job, options, booted, run_dir, on_output).follow()
    finally:
        for name in ("initrd.cpio", "job.frames"):  # big, and made again from the same inputs
            (run_dir / name).unlink(missing_ok=True)
    lines = splat.find(result.kernel_log)
    if lines:
        raise JobSplat(lines, result)
    return result


def command_line(
    job: Job, options: MachineOptions | None = None, *, kernel: Path | None = None
) -> tuple[str, ...]:
    """QEMU's command line for a job, its files in place so that it can be run as printed."""
    options = options or MachineOptions()
    return _Run(job, options, bootable(options.arch, kernel), runs.dry(), None).argv
