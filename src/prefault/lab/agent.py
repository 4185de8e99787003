# SPDX-License-Identifier: Apache-2.0
"""What runs as process 1 inside the lab: starts the job and reports over the job port.

The job comes in the initial RAM file system as /job.json, beside the files that it needs. Output,
status, collected files and the kernel log go out as frames. Everything is done by one thread that
sleeps in select(), so that a run under --icount executes the same instructions every time.

If this process ends, the kernel panics, and the host sees a lost machine: that is meant.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import select
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from prefault.lab.frames import VERSION, Frame, Kind, encode, split

PORT_NAME = "prefault.job"
JOB_FILE = "/job.json"
WORK_DIR = "/root"
PACKAGE_DIR = "/prefault"
"""Where the prefault package lies inside the lab."""

DRAIN_SECONDS = 0.2
"""How long to wait for more output after the job ended, if a child of it holds the pipe open."""

RB_POWER_OFF = 0x4321FEDC


@dataclass(frozen=True)
class Order:
    """What the host asks the agent to do."""

    argv: tuple[str, ...]
    collect: tuple[str, ...]
    heartbeat: float
    """Seconds of the lab's clock between signs of life."""

    def to_json(self) -> str:
        """The text of JOB_FILE."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Order:
        """Read what ``to_json`` wrote."""
        raw = json.loads(text)
        return cls(tuple(raw["argv"]), tuple(raw["collect"]), float(raw["heartbeat"]))


class Port:
    """The job port, from inside."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, frame: Frame) -> None:
        """Write one frame, whole."""
        data = memoryview(encode(frame))
        while data:
            data = data[os.write(self._descriptor, data) :]

    def send_all(self, frames: Iterator[Frame]) -> None:
        """Write several frames."""
        for frame in frames:
            self.send(frame)


def find_port(ports: Path = Path("/sys/class/virtio-ports"), wait: float = 5) -> Path | None:
    """Device node of the port that the host named PORT_NAME; it may appear late."""
    deadline = time.monotonic() + wait
    while True:
        for entry in ports.glob("*/name"):
            if entry.read_text().strip() == PORT_NAME:
                return Path("/dev") / entry.parent.name
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)


def _start(argv: tuple[str, ...]) -> subprocess.Popen[bytes]:
    environment = {
        "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": WORK_DIR,
        "PYTHONPATH": PACKAGE_DIR,
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PREFAULT_IN_LAB": "1",
    }
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=WORK_DIR,
        start_new_session=True,
    )


def run_command(order: Order, port: Port) -> int:
    """Run the job, pass on what it says, and return its status.

    :returns: exit status, minus the signal's number if a signal ended it, 127 if it cannot be started
    """
    try:
        child = _start(order.argv)
    except OSError as error:
        port.send(Frame(Kind.STDERR, f"{order.argv[0]}: {error.strerror}\n".encode()))
        return 127
    with child:
        assert child.stdout is not None and child.stderr is not None
        streams = {child.stdout.fileno(): Kind.STDOUT, child.stderr.fileno(): Kind.STDERR}
        _pump(child, streams, order.heartbeat, port)
    return child.returncode


def _pump(child: subprocess.Popen[bytes], streams: dict[int, Kind], beat: float, port: Port) -> None:
    ended = os.pidfd_open(child.pid)
    selector = selectors.SelectSelector()  # has no descriptor of its own to close
    for descriptor in (*streams, ended):
        selector.register(descriptor, selectors.EVENT_READ)
    next_beat = time.monotonic() + beat
    stop_at: float | None = None
    while streams:
        now = time.monotonic()
        if now >= next_beat:
            port.send(Frame(Kind.HEARTBEAT))
            next_beat = now + beat
        if stop_at is not None and now >= stop_at:
            break
        until = next_beat if stop_at is None else min(next_beat, stop_at)
        for key, _ in selector.select(max(0, until - now)):
            if key.fd == ended:
                selector.unregister(ended)
                stop_at = time.monotonic() + DRAIN_SECONDS
                continue
            data = os.read(key.fd, 1 << 16)
            if data:
                port.send(Frame(streams[key.fd], data))
            else:
                selector.unregister(key.fd)
                del streams[key.fd]
    if stop_at is None:  # both pipes were closed by a job that still runs
        while not select.select([ended], [], [], beat)[0]:
            port.send(Frame(Kind.HEARTBEAT))
    os.close(ended)


def collected(paths: tuple[str, ...]) -> Iterator[Frame]:
    """Frames of the files at ``paths``; of a folder, every file below it. What is missing is left out."""
    for name in paths:
        path = Path(name)
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if not file.is_file():
                continue
            try:
                data = file.read_bytes()
            except OSError as error:
                print(f"prefault: cannot collect {file}: {error}", file=sys.stderr)
                continue
            yield from split(Kind.FILE, data, prefix=str(file).encode() + b"\0")


def kernel_log(device: str = "/dev/kmsg") -> str:
    """The kernel log from its beginning, all levels, in dmesg's form."""
    lines = []
    descriptor = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
    try:
        while True:
            try:
                record = os.read(descriptor, 8192).decode(errors="replace")
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise
                lines.append("prefault: the kernel log overflowed; records before this line are lost")
                continue
            lines.append(format_record(record))
    finally:
        os.close(descriptor)
    return "\n".join(lines) + "\n"


def format_record(record: str) -> str:
    """One /dev/kmsg record as dmesg prints it.

    The record's first line is the message, whatever it begins with: the lines of a stack trace begin with a
    space, as do the record's other lines, which name the device.

    Source: Documentation/ABI/testing/dev-kmsg
    """
    head, _, rest = record.partition(";")
    text = rest.partition("\n")[0]
    microseconds = int(head.split(",")[2])
    stamp = f"[{microseconds // 1_000_000:5d}.{microseconds % 1_000_000:06d}]"
    text = re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), text)
    return "\n".join(f"{stamp} {line}" for line in text.split("\n"))


def power_off() -> None:
    """End the machine; the host may already have done so."""
    os.sync()
    ctypes.CDLL(None, use_errno=True).reboot(ctypes.c_int(RB_POWER_OFF))


def main() -> None:
    """Run the job that the host put here."""
    device = find_port()
    if device is None:
        print("prefault: no job port; the kernel needs CONFIG_VIRTIO_CONSOLE, and VIRTIO_MMIO or VIRTIO_PCI")
        power_off()
        return
    port = Port(os.open(device, os.O_WRONLY))
    order = Order.from_json(Path(JOB_FILE).read_text())
    port.send(Frame(Kind.HELLO, str(VERSION).encode()))
    status = run_command(order, port)
    port.send_all(collected(order.collect))
    port.send_all(split(Kind.KERNEL_LOG, kernel_log().encode()))
    port.send(Frame(Kind.STATUS, str(status).encode()))
    port.send(Frame(Kind.END))
    power_off()


if __name__ == "__main__":
    main()
