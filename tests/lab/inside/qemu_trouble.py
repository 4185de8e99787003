# SPDX-License-Identifier: Apache-2.0
"""Inside the lab: what a guest of QEMU's, which checks itself all the time, sees of applying that goes wrong.

``python3 qemu_trouble.py``, with the example's ``qemu_guest.py`` beside it; a line of JSON for each trouble.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from prefault.errors import NotTraceable, PrefaultError, ProcessLost
from prefault.inject.apply import Found, Process

sys.path.insert(0, str(Path(__file__).parent))
from qemu_guest import RAM, RAM_SIZE, Qemu

PLAN = [(RAM, RAM_SIZE)] * 1000
"""More than there is time for."""
KILLED = 25
SLICE_S = 0.02


def tell(name: str, **facts: object) -> None:
    """A line for the test."""
    print(json.dumps({"name": name, **facts}), flush=True)


def in_child(work: Callable[[], object]) -> int:
    """Do something in a process of its own; its id."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return child


class Trouble:
    """A guest that is at work, and ways to disturb who applies a plan to it."""

    def __init__(self, qemu: Qemu, process: Process, found: Found) -> None:
        self._qemu = qemu
        self._process = process
        self._found = found
        self._chances = random.Random(1)

    def _apply(self) -> None:
        self._process.apply(self._found, PLAN, slice_s=SLICE_S)

    def rounds(self) -> int:
        """How often the guest has found all as it must be."""
        return len(re.findall(r"^round \d+ of \w ok", self._qemu.said, re.MULTILINE))

    def goes_on(self, name: str, **facts: object) -> None:
        """Tell how it was, once the guest has gone on for a while."""
        before = self.rounds()
        end = time.monotonic() + 60
        while self.rounds() < before + 4 and time.monotonic() < end:
            time.sleep(0.05)
        tasks = Path(f"/proc/{self._qemu.pid}/task").iterdir()
        status = [line for task in tasks for line in (task / "status").read_text().splitlines()]
        tracers = {line.split()[1] for line in status if line.startswith("TracerPid:")}
        tell(name, rounds=self.rounds() - before, tracers=sorted(tracers), **facts)

    def killed(self) -> None:
        """SIGKILL, again and again."""
        for _ in range(KILLED):
            child = in_child(self._apply)
            time.sleep(0.05 + self._chances.uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        self.goes_on("killed")

    def interrupted(self) -> None:
        """Ctrl-C."""
        threading.Timer(0.5, signal.raise_signal, (signal.SIGINT,)).start()
        done = self._process.apply(self._found, PLAN, slice_s=SLICE_S)
        self.goes_on("interrupted", ended=done.ended, bytes=done.bytes)

    def paused(self) -> None:
        """QEMU pauses its guest, and lets it go on, in the middle."""
        child = in_child(self._apply)
        for _ in range(5):
            time.sleep(0.2)
            self._qemu.command("stop")
            time.sleep(0.2)
            self._qemu.command("cont")
        os.kill(child, signal.SIGINT)
        os.waitpid(child, 0)
        self.goes_on("paused")

    def two(self) -> None:
        """Two at once: one of them is refused now and then, and neither does harm."""
        child = in_child(self._apply)
        refused = 0
        for _ in range(10):
            try:
                self._process.apply(self._found, [(RAM, RAM_SIZE // 8)], slice_s=SLICE_S)
            except NotTraceable:
                refused += 1
        os.kill(child, signal.SIGINT)
        os.waitpid(child, 0)
        self.goes_on("two", refused=refused)

    def stopped(self) -> None:
        """SIGSTOP and SIGCONT for the VMM."""
        child = in_child(self._apply)
        for _ in range(5):
            time.sleep(0.2)
            os.kill(self._qemu.pid, signal.SIGSTOP)
            time.sleep(0.2)
            os.kill(self._qemu.pid, signal.SIGCONT)
        os.kill(child, signal.SIGINT)
        os.waitpid(child, 0)
        self.goes_on("stopped")

    def powered_off(self) -> None:
        """The guest powers itself off in the middle, and QEMU ends by itself."""
        threading.Timer(0.5, self._qemu.type, ("enough\n",)).start()
        try:
            self._process.apply(self._found, PLAN, slice_s=SLICE_S)
            said = ""
        except (ProcessLost, PrefaultError) as error:
            said = f"{type(error).__name__}: {error}"
        status = self._qemu.process.wait(60)
        tell("powered off", said=said, status=status, console=self._qemu.said.replace("\r", ""))


def main() -> None:
    """All of them, one guest."""
    with Qemu() as qemu:
        qemu.wait_for("ready")
        with Process(qemu.pid) as process:
            trouble = Trouble(qemu, process, process.find())
            trouble.goes_on("nothing")
            trouble.killed()
            trouble.interrupted()
            trouble.paused()
            trouble.two()
            trouble.stopped()
            trouble.powered_off()


if __name__ == "__main__":
    main()
