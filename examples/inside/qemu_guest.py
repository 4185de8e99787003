# SPDX-License-Identifier: Apache-2.0
"""Inside the lab: a Linux guest of QEMU's, put into a file, restored, and pre-faulted from outside.

``python3 qemu_guest.py take``, or ``python3 qemu_guest.py restore PLAN``; a line of JSON for each thing that
was done. QEMU is started as anybody would, and knows nothing of prefault.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from prefault.errors import PrefaultError
from prefault.faults.plan import load
from prefault.inject.apply import Applied, Process
from prefault.kvm import tracing
from prefault.machine import FaultCounts

HERE = Path(__file__).parent
RAM, RAM_SIZE = 0x4000_0000, 256 << 20
TAKEN, CAPTURE = "/tmp/state", "/tmp/capture"
VCPUS = 2
MOST_FAULTS = 100_000
SLICE_S = 0.05
"""Stopping a thread takes the emulated machine a hundred times what it takes a real one."""
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Qemu:
    """A QEMU that runs. Ends with the block.

    :param arguments: more than the usual ones
    """

    def __init__(self, *arguments: str) -> None:
        for name in ("console.in", "console.out"):
            Path(f"/tmp/{name}").unlink(missing_ok=True)
            os.mkfifo(f"/tmp/{name}")
        argv = (
            *("qemu-system-aarch64", "-machine", "virt,gic-version=3", "-accel", "kvm", "-cpu", "host"),
            *("-smp", str(VCPUS), "-m", f"{RAM_SIZE >> 20}M", "-nodefaults", "-display", "none"),
            *("-name", "guest=warm,debug-threads=on", "-qmp", "stdio", "-serial", "chardev:console"),
            *("-chardev", "pipe,id=console,path=/tmp/console"),
            *("-kernel", str(HERE / "Image"), "-initrd", str(HERE / "initrd")),
            *("-append", "console=ttyAMA0 quiet panic=-1", "-no-reboot", *arguments),
        )
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        self._console = os.open("/tmp/console.out", os.O_RDWR | os.O_CLOEXEC)
        self._input = os.open("/tmp/console.in", os.O_RDWR | os.O_CLOEXEC)
        self.said = ""
        self._heard = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()
        assert self.process.stdout
        self.process.stdout.readline()  # its greeting
        self.command("qmp_capabilities")

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._console, 4096):
                with self._heard:
                    self.said += data.decode(errors="replace")
                    self._heard.notify_all()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until the guest has said something.

        :raises PrefaultError: it has not
        """
        with self._heard:
            if not self._heard.wait_for(lambda: text in self.said, seconds):
                raise PrefaultError(f"the guest has not said {text!r}, but: {self.said[-500:]}")

    def type(self, text: str) -> None:
        """Type into the guest's console."""
        os.write(self._input, text.encode())

    def command(self, name: str, **arguments: object) -> dict[str, object]:
        """A command over QMP, and its answer."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            answer = json.loads(line)
            if "return" in answer:
                return dict(answer["return"])
            if "error" in answer:
                raise PrefaultError(f"QEMU refuses {name}: {answer['error']}")
        raise PrefaultError(f"QEMU ended at {name}")

    def until(self, name: str, status: str) -> None:
        """Wait until a query answers with a status."""
        while (found := self.command(name).get("status")) != status:
            if found == "failed":
                raise PrefaultError(f"{name}: failed")
            time.sleep(0.02)

    def __enter__(self) -> Qemu:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self._input)
        os.close(self._console)


def restored(state: str) -> Qemu:
    """A QEMU whose guest is restored, and paused."""
    qemu = Qemu("-S", "-incoming", f"exec:cat {state}")
    qemu.until("query-status", "paused")
    return qemu


def answer(qemu: Qemu) -> str:
    """Wait until the guest has done its work, and for what came of it."""
    qemu.wait_for("the end")
    return qemu.said.replace("\r", "")


def tell(name: str, **facts: object) -> None:
    """A line for the host."""
    print(json.dumps({"name": name, **facts}), flush=True)


def take() -> None:
    """Boot the guest, put it into a file, restore it, and capture its faults."""
    with Qemu() as qemu:
        qemu.wait_for("ready")
        qemu.command("stop")
        qemu.command("migrate", uri=f"exec:cat >{TAKEN}")
        qemu.until("query-migrate", "completed")
    argv = (sys.executable, "-m", "prefault.faults.capture", "--output", CAPTURE, "--pid")
    with restored(TAKEN) as qemu:
        recorder = subprocess.Popen((*argv, str(qemu.pid)), stderr=subprocess.PIPE)
        assert recorder.stderr
        recorder.stderr.readline()  # it says how far it is once it has begun
        qemu.command("cont")
        qemu.type("go\n")
        said = answer(qemu)
        recorder.send_signal(signal.SIGINT)
        recorder.communicate()
    tell("take", said=said)


@contextlib.contextmanager
def counted(counts: FaultCounts) -> Iterator[None]:
    """Count the stage-2 faults on memory of all guests that are started in the block."""
    trace = tracing.TraceInstance(tracing.ARM64, MOST_FAULTS)
    try:
        trace.start()
        yield
        for _, ipa, syndrome in tracing.ARM64.parse(trace.stop()):
            if RAM <= ipa < RAM + RAM_SIZE:
                tracing.add(counts, ipa, syndrome)
    finally:
        trace.close()


def applied(pid: int, ranges: list[tuple[int, int]]) -> dict[str, object]:
    """Apply the plan, as ``prefault apply --pid`` does."""
    with Process(pid) as process:
        found = process.find()
        done: Applied = process.apply(found, ranges, slice_s=SLICE_S)
    return {**asdict(done), "longest_stop_s": done.longest_stop_s}


def restore_and(
    name: str,
    before: Callable[[Qemu], object] = lambda _: None,
    during: Callable[[Qemu], object] = lambda _: None,
) -> None:
    """Restore the guest, do something before it goes on and while it works, and see what it says."""
    counts = FaultCounts()
    with counted(counts), restored(str(HERE / "state")) as qemu:
        first = before(qemu)
        began = time.monotonic()
        qemu.command("cont")
        qemu.type("go\n")
        second = during(qemu)
        said = answer(qemu)
        seconds = time.monotonic() - began
        status = qemu.command("query-status")["status"]
    faults = {kind: getattr(counts, kind) for kind in ("read", "write", "execute", "permission")}
    tell(name, said=said, faults=faults, before=first, during=second, seconds=seconds, status=status)


def restore(plan: str) -> None:
    """Restore the guest in several ways."""
    ranges = [(one.ipa, one.size) for one in load(Path(plan)).ranges]
    restore_and("nothing")
    restore_and("paused", before=lambda qemu: applied(qemu.pid, ranges))
    restore_and("running", during=lambda qemu: applied(qemu.pid, ranges))


def main(*words: str) -> None:
    """Do what the module says."""
    THP.write_text("never")  # each page a fault, as on a host whose memory is fragmented
    if words[0] == "take":
        take()
    else:
        restore(words[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
