# SPDX-License-Identifier: Apache-2.0
"""System calls in threads of arm64 processes that check themselves; a line of JSON for each."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from prefault.inject.tracee import Answer, Call, Memory, Tracee, find_end, find_instruction

GETPID, GETTIME, NANOSLEEP = 172, 113, 101
STOPS = 15
KILLED = 30
REQUESTS = 90
"""Of ptrace(2), of two calls and more: a tracer is killed after each of them."""

HEAD = """
import ctypes, json, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def ready(): print("ready", flush=True)
half = (ctypes.c_long * 2)(0, 800000000)
"""
WAIT = """
signal.signal(signal.SIGUSR1, lambda *_: None)
ready()
began = time.monotonic()
result = {call}
error = ctypes.get_errno() if result < 0 else 0
print(json.dumps([result, error, time.monotonic() - began]), flush=True)
"""
COUNT = """
count = 0
def note(*_):
    global count
    count += 1
signal.signal(signal.SIGUSR1, note)
ready()
end = time.monotonic() + 30
while time.monotonic() < end and count < 5:
    pass
time.sleep(0.3)
blocked = [int(l.split()[1], 16) for l in open("/proc/self/status") if l.startswith("SigBlk")]
print(json.dumps([count, blocked]), flush=True)
"""
READ_AND_COUNT = COUNT.replace("ready()\n", "ready(); text = sys.stdin.readline()\n").replace(
    "[count, blocked]", "[count, blocked, text]"
)
WAITS = {
    "nanosleep": (101, "libc.syscall(101, half, None)"),
    "clock_nanosleep": (115, "libc.syscall(115, 1, 0, half, None)"),
    "ppoll": (73, "libc.syscall(73, None, 0, half, None, 0)"),
    "pselect": (72, "libc.syscall(72, 0, None, None, None, half, None)"),
    "futex": (98, "libc.syscall(98, (ctypes.c_int * 1)(7), 128, 7, half)"),
    "read": (63, "libc.syscall(63, 0, ctypes.create_string_buffer(9), 9)"),
    "sigsuspend": (133, "libc.syscall(133, (ctypes.c_ulong * 1)(0), 8)"),
}


def pipe(one: IO[str] | None) -> IO[str]:
    """A pipe that is there."""
    assert one is not None
    return one


def tell(name: str, **facts: object) -> None:
    """A line for the test."""
    print(json.dumps({"name": name, **facts}), flush=True)


class Child:
    """A process that is ready to have system calls run in it."""

    def __init__(self, *argv: str) -> None:
        self._child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert pipe(self._child.stdout).readline() == "ready\n"
        self.pid = self._child.pid
        self._memory = Memory(self.pid)
        instruction, end = find_instruction(self._memory), find_end(self._memory)
        self._tracee = Tracee(self._memory, self.pid, instruction, end=end)

    def call(self, number: int, *arguments: int, memory: bytes = b"", pointer: int = 0) -> Answer:
        """One in its only thread."""
        return self._tracee.call(Call(number, arguments, memory, pointer))

    def signal(self, number: signal.Signals) -> None:
        """Send it one. Popen.send_signal() would wait for it, and take its stops from the tracer."""
        os.kill(self.pid, number)

    def type(self, text: str) -> None:
        """Write to its standard input."""
        pipe(self._child.stdin).write(text)
        pipe(self._child.stdin).flush()

    def said(self) -> str:
        """Its next line; it is ended after that."""
        line = pipe(self._child.stdout).readline()
        self._child.kill()
        self._child.wait()
        self._memory.close()
        return line


def wait(name: str, number: int, call: str) -> None:
    """A system call that waits, stopped again and again."""
    child = Child(sys.executable, "-S", "-c", HEAD + WAIT.format(call=call))
    while not Path(f"/proc/{child.pid}/syscall").read_text().startswith(f"{number} "):
        time.sleep(0.002)
    pids = {child.call(GETPID).result for _ in range(STOPS)}
    again = Path(f"/proc/{child.pid}/syscall").read_text().split()[0]
    if name == "read":
        child.type("abc")
    if name == "sigsuspend":
        child.signal(signal.SIGUSR1)
    tell(name, pids=sorted(pids), pid=child.pid, again=again, told=json.loads(child.said()))


def signals() -> None:
    """Signals that come while a thread is stopped."""
    child = Child(sys.executable, "-S", "-c", HEAD + COUNT)
    results = []
    for _ in range(5):
        timer = threading.Timer(0.05, child.signal, (signal.SIGUSR1,))
        timer.start()
        results.append(child.call(NANOSLEEP, 0, 0, memory=struct.pack("<qq", 0, 300_000_000)).result)
        timer.join()
        time.sleep(0.1)
    tell("signals", results=results, told=json.loads(child.said()))


def registers() -> None:
    """All registers, with a thread that runs in user space all the time."""
    child = Child("/registers")
    results = {child.call(GETTIME, 1, 0, memory=bytes(16), pointer=1).result for _ in range(200)}
    child.signal(signal.SIGTERM)
    tell("registers", results=sorted(results), told=[int(one) for one in child.said().split()])


def kill_tracers(pid: int) -> int:
    """Have tracers of a process killed in the middle of calls; 0, or 3 if that has ended."""
    argv = (sys.executable, "/killed_tracers.py", str(pid))
    return max(
        subprocess.run((*argv, str(KILLED)), check=False).returncode,
        subprocess.run((*argv, str(REQUESTS), "each"), check=False).returncode,
    )


def killed_registers() -> None:
    """All registers, when tracers are killed."""
    child = Child("/registers")
    status = kill_tracers(child.pid)
    child.signal(signal.SIGTERM)
    tell("killed registers", status=status, told=[int(one) for one in child.said().split()])


def killed_wait() -> None:
    """A wait, when tracers are killed, and signals after that."""
    child = Child(sys.executable, "-S", "-c", HEAD + READ_AND_COUNT)
    status = kill_tracers(child.pid)
    child.type("abc\n")
    for _ in range(5):
        time.sleep(0.1)
        child.signal(signal.SIGUSR1)
    tell("killed wait", status=status, told=json.loads(child.said()))


def main() -> None:
    """All of them."""
    for name, (number, call) in WAITS.items():
        wait(name, number, call)
    signals()
    registers()
    killed_registers()
    killed_wait()


if __name__ == "__main__":
    main()
