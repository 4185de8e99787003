# SPDX-License-Identifier: Apache-2.0
"""Where the instructions of one call go in the kernel: every one of them, none sampled.

QEMU is told to make a translation block of each instruction, and to write each that it executes at a kernel
address to its log, which is a pipe that is read here. That is slow, so it begins when the job says that it is
ready, and ends with the call. Nothing is needed but the QEMU that the lab has.

Besides functions, the stream of addresses tells how long the mmu_lock was held, for how long interrupts were
masked, and for how long the call could not be preempted because it held a lock that others spin for (what
disables preemption without a lock is not seen). Interrupts that came in between are left out of these.

Failure modes: ``LabError`` if the call was not seen.

Source: QEMU, qemu-options.hx (-d, -dfilter), QMP reference (human-monitor-command); Arm ARM (DDI
0487), C6.2 "MSR"
"""

from __future__ import annotations

import asyncio
import bisect
import gzip
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from qemu.qmp import QMPClient, QMPError

from prefault.bench.cases import Case
from prefault.bench.once import READY
from prefault.errors import LabError
from prefault.lab import build
from prefault.lab.bench import Boot, Settings, machine_of
from prefault.lab.frames import Kind
from prefault.lab.job import Job, run_job
from prefault.lab.quiet import quietly
from prefault.report.profile import INTERRUPTS, MMU_LOCK, SPINNING, Profile

_TRACE = re.compile(rb"^Trace \d+: \S+ \[[0-9a-f]+/([0-9a-f]+)/")
_IMAGE_ALIGNMENT = 2 << 20
_KERNEL = "0xf000000000000000+0x0ffffffffffffff0"
_BEGINS, _ENDS = "kvm_vcpu_ioctl", "ret_to_user"
_VECTORS, _INTERRUPT, _BACK = "vectors", "el1h_64_irq", "ret_to_kernel"
_TAKES = ("_raw_read_lock", "_raw_write_lock")
_GIVES = ("_raw_read_unlock", "_raw_write_unlock")
_SPINS_FOR = re.compile(r"_raw_(?:spin|read|write)_(?:try)?(un)?lock(?:_bh|_irq|_irqsave|_irqrestore)?")
"""Functions that take a lock, or give it back. With one CPU, none that is tried is held by somebody else."""
_SUFFIX = re.compile(r"\.(isra|constprop|part|cold|llvm)\b.*")

_DAIFSET, _DAIFCLR, _IMMEDIATE = 0xD50340DF, 0xD50340FF, 0xF00
_DAIF, _REGISTER = 0xD51B4220, 0x1F
_I = 0x200
"""The bit of the immediate that is for interrupts."""


_SPINS = (80_000_000, 320_000_000, 1_280_000_000)
"""Instructions that the job waits for the log to be on; more if that was too late, as on a busy host."""
_BEGIN_SECONDS = 60.0
"""How long after that the call may begin; as many instructions with the log on take half a minute."""


class _Enough(Exception):
    """The call is over."""


class _Missed(Exception):
    """The call was over before the log was on."""


@dataclass(frozen=True)
class Symbols:
    """Functions of a kernel, by address."""

    addresses: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, lines: Iterable[str]) -> Symbols:
        """From lines of /proc/kallsyms."""
        found: dict[int, str] = {}
        for line in lines:
            address, _, name = line.split()[:3]
            if not name.startswith("$"):
                found.setdefault(int(address, 16), _SUFFIX.sub("", name))
        ordered = sorted(found)
        return cls(ordered, [found[address] for address in ordered])

    @property
    def begin(self) -> int:
        """Where the Image begins. Its head has no functions; it lies at a multiple of 2 MiB."""
        return self.addresses[0] & -_IMAGE_ALIGNMENT if self.addresses else 0

    def __contains__(self, address: int) -> bool:
        """Whether a function begins there."""
        index = bisect.bisect_left(self.addresses, address)
        return self.addresses[index : index + 1] == [address]

    def function(self, address: int) -> str:
        """The function that an address is in."""
        index = bisect.bisect_right(self.addresses, address) - 1
        return self.names[index] if index >= 0 else "?"


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel."""

    image: bytes
    begin: int
    """Address of the first byte."""

    def word(self, address: int) -> int:
        """The instruction at an address; 0 if the Image does not have it."""
        offset = address - self.begin
        if not 0 <= offset <= len(self.image) - 4:
            return 0
        return int.from_bytes(self.image[offset : offset + 4], "little")


def masks(word: int) -> int:
    """What an instruction does to the mask of interrupts: 1 sets it, -1 takes a setting back, 0 neither."""
    if word & ~_IMMEDIATE == _DAIFSET and word & _I:
        return 1
    if word & ~_REGISTER == _DAIF or (word & ~_IMMEDIATE == _DAIFCLR and word & _I):
        return -1
    return 0


def locks(name: str) -> int:
    """What a function does to the number of locks held that others spin for: 1, -1 or 0."""
    match = _SPINS_FOR.fullmatch(name)
    return 0 if not match else -1 if match[1] else 1


class Window:
    """Reads QEMU's log from the entry into the call to the return from it."""

    def __init__(self, symbols: Symbols, code: Code) -> None:
        self.found = Profile()
        self.over = False
        self._symbols, self._code = symbols, code
        self._known: dict[bytes, tuple[str, int, int]] = {}
        self.began = False
        self._last = ""
        self._interrupts = 0
        self._now = 0
        """Instructions so far, without those of interrupts."""
        self._since: dict[str, int] = {}
        self._masks = self._locks = 0

    def take(self, line: bytes) -> None:
        """One line of the log."""
        match = _TRACE.match(line)
        if not match or self.over:
            return
        known = self._known.get(match[1])
        if known is None:
            address = int(match[1], 16)
            name = self._symbols.function(address)
            begun = address in self._symbols
            known = self._known[match[1]] = name, masks(self._code.word(address)), locks(name) if begun else 0
        name, mask, lock = known
        self.began = self.began or name == _BEGINS
        if not self.began:
            return
        self.found.counts[name] += 1
        if not self._in_interrupt(name):
            self._now += 1
            self._stretches(name, mask, lock)
        self._last = name
        self.over = name == _ENDS

    def _in_interrupt(self, name: str) -> bool:
        """Whether an interrupt is being served, or one that came while another was."""
        if name == _INTERRUPT and self._last == _VECTORS:
            self._interrupts += 1
        elif self._interrupts and self._last == _BACK and name != _BACK:
            self._interrupts -= 1
        return self._interrupts > 0

    def _stretches(self, name: str, mask: int, lock: int) -> None:
        if name != self._last:
            if self._last in _TAKES:
                self._since[MMU_LOCK] = self._now
            elif name in _GIVES:
                self._end(MMU_LOCK)
        self._locks = self._nested(SPINNING, self._locks, lock)
        self._masks = self._nested(INTERRUPTS, self._masks, mask)

    def _nested(self, what: str, depth: int, change: int) -> int:
        """The depth after a change; a stretch lasts from the first depth to none."""
        if change > 0:
            self._since.setdefault(what, self._now)
        elif change < 0 and depth == 1:
            self._end(what)
        return max(depth + change, 0)

    def _end(self, what: str) -> None:
        began = self._since.pop(what, None)
        if began is not None:
            self.found.longest[what] = max(self.found.longest[what], self._now - began)


def profile(case: Case, call: str, boot: Boot, settings: Settings) -> Profile:
    """Profile one call.

    :param call: one of ``prefault.bench.once.CALLS``
    :raises LabError: the call was not seen, or the lab failed
    """
    image = (boot.kernel or build.kernel_image()).read_bytes()
    image = gzip.decompress(image) if image[:2] == b"\x1f\x8b" else image
    for spin in _SPINS:
        try:
            return _profile(case, call, boot, settings, image, spin)
        except _Missed:
            continue
    raise LabError(f"{case.name}: the host is too busy to see the call begin; try again when it is less so")


def _profile(case: Case, call: str, boot: Boot, settings: Settings, image: bytes, spin: int) -> Profile:
    with tempfile.TemporaryDirectory(prefix="prefault-profile-") as folder:
        watch = _Watch(Path(folder), image, settings.timeout)
        argv = ("python3", "-m", "prefault.bench.once", json.dumps(case.to_json()), call, str(spin))
        job = Job(quietly(argv), timeout=settings.timeout)
        options = machine_of(boot, settings, qemu=watch.arguments)
        try:
            done = run_job(job, options, kernel=boot.kernel, on_output=watch)
        except _Enough:
            assert watch.window
            return watch.window.found
    last = "\n".join(done.stderr.decode(errors="replace").strip().splitlines()[-8:])
    raise LabError(f"{case.name} ended before it could be profiled; see {done.run_dir}\n{last}")


class _Watch:
    """Switches QEMU's log on when the job is ready, and reads it."""

    def __init__(self, folder: Path, image: bytes, patience: float) -> None:
        self._socket, self._log = folder / "qmp", folder / "log"
        os.mkfifo(self._log)
        self._image = image
        self._patience = patience
        self._text = b""
        self.window: Window | None = None

    @property
    def arguments(self) -> tuple[str, ...]:
        """For QEMU."""
        return ("-qmp", f"unix:{self._socket},server=on,wait=off", "-dfilter", _KERNEL)

    def __call__(self, kind: Kind, piece: bytes) -> None:
        if kind is not Kind.STDOUT:
            return
        self._text += piece
        head, found, _ = self._text.partition(f"\n{READY}\n".encode())
        if not found:
            return
        symbols = Symbols.read(head.decode().splitlines())
        self.window = Window(symbols, Code(self._image, symbols.begin))
        # A pipe is opened from both ends at once, and QEMU has one end.
        reader = threading.Thread(target=self._read, args=(self.window,), daemon=True)
        reader.start()
        try:
            asyncio.run(self._switch_on())
        except (QMPError, OSError) as error:
            raise LabError(f"QEMU's monitor does not answer: {error}") from error
        reader.join(_BEGIN_SECONDS)
        if not self.window.began:
            raise _Missed
        reader.join(self._patience)
        if not self.window.over:
            raise LabError(f"the call that was to be profiled was not seen within {self._patience:g} s")
        raise _Enough

    async def _switch_on(self) -> None:
        client = QMPClient("prefault")
        await client.connect(str(self._socket))
        for line in ("stop", f"logfile {self._log}", "one-insn-per-tb on", "log exec,nochain", "cont"):
            answer = await client.execute("human-monitor-command", {"command-line": line})
            if answer:
                raise LabError(f"QEMU's monitor refuses `{line}`: {answer}")
        await client.disconnect()

    def _read(self, window: Window) -> None:
        with self._log.open("rb") as lines:
            for line in lines:
                window.take(line)
                if window.over:
                    return
