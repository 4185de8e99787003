# SPDX-License-Identifier: Apache-2.0
"""A system call in a thread of another process, which must not notice."""

from __future__ import annotations

import json
import os
import platform
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prefault.errors import ProcessLost
from prefault.inject import maps, ptrace
from prefault.inject import tracee as module
from prefault.inject.maps import Mapping, mappings
from prefault.inject.tracee import Busy, Call, Memory, Tracee, find_end, let_go_of_late
from tests.inject import children
from tests.inject.children import GETPID, GETTIME, NANOSLEEP, pipe, python, tracee, wait_for_call

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(
        platform.machine() != "x86_64", reason="system call numbers of x86-64; arm64 is tested in the lab"
    ),
]

STOPS = 25
STOPPED = 0.4
"""Seconds for which a thread is stopped again and again: less than its call waits."""
SYSCALL = "libc = ctypes.CDLL(None, use_errno=True)\n"
MEASURE = """
began = time.monotonic()
result = {call}
error = ctypes.get_errno() if result < 0 else 0
ready_ = time.monotonic() - began
print(json.dumps([result, error, ready_]), flush=True)
"""


def sleep_of(seconds: float) -> Call:
    """nanosleep: a system call that takes its time."""
    whole = int(seconds)
    return Call(NANOSLEEP, (0, 0), struct.pack("<qq", whole, int((seconds - whole) * 1e9)))


def test_the_call_is_the_threads_own() -> None:
    with python("ready(); sys.stdin.read()") as child, tracee(child.pid) as one:
        assert one.call(Call(GETPID, ())).result == child.pid
        assert one.call(Call(0, (1000, 0, 0))).errno == 9


def test_a_zombie_has_nothing_mapped() -> None:
    child = subprocess.Popen((sys.executable, "-c", ""))
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert mappings(child.pid) == []
    child.wait()
    assert mappings(child.pid) == []


def test_thread_and_mapped_files_may_have_any_name(tmp_path: Path) -> None:
    file = os.fsencode(tmp_path) + "/\u2028\x0c x".encode() + b"\xff"
    code = (
        f"import mmap; f = open({file!r}, 'wb+'); f.truncate(4096); m = mmap.mmap(f.fileno(), 4096)\n"
        "ctypes.CDLL(None).prctl(15, b'\\xff\\x85', 0, 0, 0); ready(); sys.stdin.read()"
    )
    with python(code) as child, tracee(child.pid) as one:
        assert one.call(Call(GETPID, ())).result == child.pid


def test_memory_goes_in_and_comes_out() -> None:
    with python("ready(); sys.stdin.read()") as child, tracee(child.pid) as one:
        answer = one.call(Call(GETTIME, (1, 0), bytes(16), pointer=1))
        seconds, _ = struct.unpack("<qq", answer.memory)
        assert answer.result == 0
        assert abs(seconds - time.monotonic()) < 2


@pytest.mark.skipif(children.compiler() is None, reason="no C compiler: apt install gcc")
def test_registers_flags_vectors_and_red_zone_are_as_they_were(tmp_path: Path) -> None:
    with children.running(str(children.registers_program(tmp_path))) as child:
        with tracee(child.pid) as one:
            for _ in range(400):
                assert one.call(Call(GETTIME, (1, 0), bytes(16), pointer=1)).result == 0
        child.terminate()
        good, bad, _ = map(int, pipe(child.stdout).readline().split())
        assert bad == 0
        assert good > 100


@pytest.mark.skipif(children.compiler() is None, reason="no C compiler: apt install gcc")
def test_no_signal_of_many_is_lost_or_comes_twice(tmp_path: Path) -> None:
    """Before a thread stops, while it is stopped, and while it is let go."""
    sent = 0
    over = threading.Event()

    def send(pid: int) -> None:
        nonlocal sent
        while not over.wait(0.0003):
            os.kill(pid, signal.SIGRTMIN)  # these are queued, one by one
            sent += 1

    with children.running(str(children.registers_program(tmp_path))) as child:
        thread = threading.Thread(target=send, args=(child.pid,))
        thread.start()
        with tracee(child.pid) as one:
            for _ in range(1000):
                assert one.call(Call(GETTIME, (1, 0), bytes(16), pointer=1)).result == 0
        over.set()
        thread.join()
        time.sleep(0.1)
        child.terminate()
        _, bad, signals = map(int, pipe(child.stdout).readline().split())
        assert bad == 0
        assert signals == sent > 300


EPOLL = "e = __import__('select').epoll(); e.register(0, 1); epoll = e.fileno()\n"
WAITS = {
    "nanosleep": (35, "libc.syscall(35, (ctypes.c_long * 2)(0, 600000000), None)", 0, 0, 0.6),
    "clock_nanosleep": (
        230,
        "libc.clock_nanosleep(1, 0, (ctypes.c_long * 2)(0, 600000000), None)",
        0,
        0,
        0.6,
    ),
    "poll": (7, "libc.poll(None, 0, 600)", 0, 0, 0.6),
    "ppoll": (271, "libc.ppoll(None, 0, (ctypes.c_long * 2)(0, 600000000), None)", 0, 0, 0.6),
    "select": (23, "libc.syscall(23, 0, None, None, None, (ctypes.c_long * 2)(0, 600000))", 0, 0, 0.6),
    "futex": (
        202,
        "libc.syscall(202, (ctypes.c_int * 1)(7), 128, 7, (ctypes.c_long * 2)(0, 600000000))",
        -1,
        110,
        0.6,
    ),
    "read": (0, "libc.read(0, ctypes.create_string_buffer(9), 9)", 3, 0, 0.0),
    "epoll_wait": (
        232,
        "libc.epoll_wait(epoll, ctypes.create_string_buffer(99), 1, -1)",
        1,
        0,
        0.0,
    ),
    "epoll_pwait2": (
        441,
        "libc.syscall(441, epoll, ctypes.create_string_buffer(99), 1, None, None, 8)",
        1,
        0,
        0.0,
    ),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_goes_on_and_ends_when_it_must(name: str) -> None:
    number, call, result, error, seconds = WAITS[name]
    with python(SYSCALL + EPOLL + "ready()\n" + MEASURE.format(call=call)) as child, tracee(child.pid) as one:
        wait_for_call(child.pid, number)
        end = time.monotonic() + STOPPED
        while time.monotonic() < end:
            assert one.call(Call(GETPID, ())).result == child.pid
            time.sleep(0.005)
        if not seconds:
            pipe(child.stdin).write("abc")
            pipe(child.stdin).flush()
        told = json.loads(pipe(child.stdout).readline())
        assert told[:2] == [result, error]
        if seconds:
            assert seconds <= told[2] < seconds + 0.8 * STOPPED  # one that begins anew ends STOPPED late


def test_a_thread_that_is_asked_goes_on_waiting() -> None:
    call = WAITS["epoll_wait"][1]
    with python(SYSCALL + EPOLL + "ready()\n" + MEASURE.format(call=call)) as child, tracee(child.pid) as one:
        for _ in range(STOPS):
            wait_for_call(child.pid, 232)
            assert one.running() == -1
        pipe(child.stdin).write("abc")
        pipe(child.stdin).flush()
        assert json.loads(pipe(child.stdout).readline())[:2] == [1, 0]


WORK_AND_WAIT = """
libc.epoll_wait.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
broken = rounds = 0
buffer = ctypes.create_string_buffer(99)
ready()
while True:
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        pass
    found = libc.epoll_wait(epoll, buffer, 1, 200)
    if found > 0:
        break
    rounds += 1
    broken += found < 0
print(json.dumps([rounds, broken]), flush=True)
"""


def test_a_thread_that_works_and_then_waits_is_let_go_before_it_waits() -> None:
    """With a time-out, the wait fails with EINTR if it is interrupted; to be asked takes 50 ms of it."""
    asked = 10
    with python(SYSCALL + EPOLL + WORK_AND_WAIT) as child, tracee(child.pid) as one:
        for _ in range(asked):
            wait_for_call(child.pid, 232)
            _until_state(child.pid, "R")
            assert one.running() == -1
        pipe(child.stdin).write("abc")
        pipe(child.stdin).flush()
        rounds, broken = json.loads(pipe(child.stdout).readline())
        assert rounds >= asked - 1
        assert broken <= asked // 2  # of those that begin to wait between the look and the stop


def test_pause_ends_with_the_signal_that_comes_after() -> None:
    code = (
        SYSCALL
        + "signal.signal(signal.SIGUSR1, lambda *_: None)\nready()\n"
        + MEASURE.format(call="libc.pause()")
    )
    with python(code) as child, tracee(child.pid) as one:
        wait_for_call(child.pid, 34)
        for _ in range(STOPS):
            one.call(Call(GETPID, ()))
        wait_for_call(child.pid, 34)
        child.send_signal(signal.SIGUSR1)
        assert json.loads(pipe(child.stdout).readline())[:2] == [-1, 4]


COUNT = """
count = 0
def note(*_):
    global count
    count += 1
signal.signal(signal.SIGUSR1, note)
ready()
end = time.monotonic() + 20
while time.monotonic() < end and count < {want}:
    pass
time.sleep(0.1)
blocked = [int(l.split()[1], 16) for l in open('/proc/self/status') if l.startswith('SigBlk')]
print(json.dumps([count, blocked]), flush=True)
"""


def test_a_signal_that_comes_meanwhile_is_delivered_afterwards_once() -> None:
    with python(COUNT.format(want=5)) as child, tracee(child.pid) as one:
        for _ in range(5):
            # Two that wait at once are one: each has to come within its own call, also on a busy machine.
            timer = threading.Timer(0.03, os.kill, (child.pid, signal.SIGUSR1))
            timer.start()
            answer = one.call(sleep_of(0.5))
            timer.join()
            assert answer.result == 0  # not interrupted
            assert answer.call_s >= 0.5
        assert json.loads(pipe(child.stdout).readline()) == [5, [0]]


def test_a_signal_interrupts_a_wait_as_it_would_have() -> None:
    call = "libc.read(0, ctypes.create_string_buffer(9), 9)"
    code = "libc.signal(10, ctypes.CFUNCTYPE(None, ctypes.c_int)(print)); libc.siginterrupt(10, 1)\n"
    with python(SYSCALL + code + "ready()\n" + MEASURE.format(call=call)) as child, tracee(child.pid) as one:
        wait_for_call(child.pid, 0)
        threading.Timer(0.03, os.kill, (child.pid, signal.SIGUSR1)).start()
        one.call(sleep_of(0.1))
        lines = [pipe(child.stdout).readline(), pipe(child.stdout).readline()]
        assert json.loads(lines[1])[:2] == [-1, 4], lines


def test_a_long_call_is_interrupted_and_the_thread_goes_on() -> None:
    with python(COUNT.format(want=1)) as child, tracee(child.pid) as one:
        answer = one.call(sleep_of(30), limit_s=0.02)
        assert answer.errno == 516  # the kernel's own: to be restarted, had this been the thread's
        assert answer.call_s < 2
        answer = one.call(sleep_of(30), wanted=lambda: True)
        assert answer.stopped_s < 2
        child.send_signal(signal.SIGUSR1)
        assert json.loads(pipe(child.stdout).readline()) == [1, [0]]


def test_death_in_the_middle_of_a_call_is_told() -> None:
    with python("ready(); sys.stdin.read()") as child, tracee(child.pid) as one:
        threading.Timer(0.05, os.kill, (child.pid, signal.SIGKILL)).start()
        with pytest.raises(ProcessLost, match="ended"):
            one.call(sleep_of(20))
        with pytest.raises(ProcessLost, match="ended"):
            one.call(Call(GETPID, ()))


THREAD = """
import sys, threading, time
thread = threading.Thread(target=sys.stdin.readline)
thread.start()
print("ready", thread.native_id, flush=True)
thread.join()
time.sleep(20)
"""


def test_a_process_that_is_killed_while_a_thread_is_stopped_ends_for_its_parent_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if the tracer lives on: a thread that nobody takes note of would keep its process."""
    get = ptrace.get_signal_mask
    with children.running(sys.executable, "-c", THREAD, first_line=False) as child:

        def killed_first(tid: int) -> int:
            child.kill()
            time.sleep(0.05)
            return get(tid)

        monkeypatch.setattr(ptrace, "get_signal_mask", killed_first)
        tid = int(pipe(child.stdout).readline().split()[1])
        with tracee(child.pid, tid) as one, pytest.raises(ProcessLost):
            one.call(Call(GETPID, ()))
        assert child.wait(5) == -signal.SIGKILL


def test_a_thread_that_ends_is_told_and_its_process_lives() -> None:
    with children.running(sys.executable, "-c", THREAD, first_line=False) as child:
        tid = int(pipe(child.stdout).readline().split()[1])
        with tracee(child.pid, tid) as one:
            assert one.call(Call(GETPID, ())).result == child.pid
            pipe(child.stdin).write("\n")
            pipe(child.stdin).flush()
            with pytest.raises(ProcessLost):
                while True:
                    one.call(Call(GETPID, ()))
        assert child.poll() is None


def test_a_process_that_is_stopped_stays_stopped() -> None:
    with python(COUNT.format(want=1)) as child, tracee(child.pid) as one:
        child.send_signal(signal.SIGSTOP)
        _until_state(child.pid, "T")
        assert one.call(Call(GETPID, ())).result == child.pid
        _until_state(child.pid, "T")
        time.sleep(0.1)
        _until_state(child.pid, "T")
        child.send_signal(signal.SIGCONT)
        child.send_signal(signal.SIGUSR1)
        assert json.loads(pipe(child.stdout).readline()) == [1, [0]]


def test_stop_and_go_on_in_the_middle_of_a_call() -> None:
    with python(COUNT.format(want=1)) as child, tracee(child.pid) as one:

        def stop_and_go_on() -> None:
            wait_for_call(child.pid, NANOSLEEP)
            os.kill(child.pid, signal.SIGSTOP)
            time.sleep(0.05)
            os.kill(child.pid, signal.SIGCONT)

        disturbing = threading.Thread(target=stop_and_go_on)
        disturbing.start()
        assert one.call(sleep_of(2)).errno == 516  # interrupted by the stop
        disturbing.join()
        child.send_signal(signal.SIGUSR1)
        assert json.loads(pipe(child.stdout).readline()) == [1, [0]]


SPAWN = """
ready()
os.posix_spawn('/bin/true', ['true'], {{}},
               file_actions=[(os.POSIX_SPAWN_OPEN, 0, {fifo!r}, os.O_RDONLY, 0)])
print('went on', flush=True)
sys.stdin.read()
"""
"""It waits uninterruptibly, as after vfork(2), until somebody opens the FIFO for writing."""


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def test_a_thread_that_does_not_stop_is_given_up_and_let_go_once_it_has(
    fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 1.0)
    with python(SPAWN.format(fifo=str(fifo))) as child, tracee(child.pid) as one:
        _until_state(child.pid, "D")
        began = time.monotonic()
        for _ in range(20):  # of which only the first waits, and only once
            with pytest.raises(Busy, match=f"thread {child.pid} has"):
                one.call(Call(GETPID, ()))
        assert 1.0 <= time.monotonic() - began < 1.9
        os.close(os.open(fifo, os.O_WRONLY))
        _until_state(child.pid, "t")
        let_go_of_late()
        assert pipe(child.stdout).readline() == "went on\n"
        assert _tracer(child.pid) == 0
        assert one.call(Call(GETPID, ())).result == child.pid


def test_who_wants_it_ended_does_not_wait_for_a_thread_that_does_not_stop(
    fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.2)
    with python(SPAWN.format(fifo=str(fifo))) as child, tracee(child.pid) as one:
        _until_state(child.pid, "D")
        began = time.monotonic()
        with pytest.raises(Busy):
            one.running(lambda: time.monotonic() > began + 0.1)
        assert time.monotonic() - began < module.PATIENCE_S / 2
        os.close(os.open(fifo, os.O_WRONLY))
        _until_state(child.pid, "t")
        let_go_of_late()


EXECUTE = """
import os, sys, threading
def other():
    sys.stdin.readline()
    os.execv("/bin/sleep", ["sleep", "60"])
thread = threading.Thread(target=other)
thread.start()
print("ready", thread.native_id, flush=True)
thread.join()
"""


def test_a_thread_that_executes_another_program_is_let_go_with_its_new_number() -> None:
    with children.running(sys.executable, "-c", EXECUTE, first_line=False) as child:
        tid = int(pipe(child.stdout).readline().split()[1])
        with tracee(child.pid, tid) as one:
            with pytest.raises(ProcessLost), module._seized(one, lambda: False) as stop:
                stop.go(ptrace.cont)
                pipe(child.stdin).write("\n")
                pipe(child.stdin).flush()
                while Path(f"/proc/{child.pid}/comm").read_text() != "sleep\n":
                    time.sleep(0.001)
                assert _tracer(child.pid) == threading.get_native_id()
                stop.until_event()
            assert _tracer(child.pid) == 0
            _until_state(child.pid, "S")


def test_only_what_is_in_no_heap_and_no_variable_is_a_stack() -> None:
    library = Mapping(0x1000, 0x2000, "rw-p", "/usr/lib/libc.so.6")
    guard = Mapping(0x1000, 0x2000, "---p", "")
    for name, before, good in (
        ("[stack]", guard, True),
        ("", guard, True),
        ("[anon: glibc: pthread stack: 17]", guard, True),
        ("[anon:stack_and_tls:17]", guard, True),
        ("", library, False),
        ("/usr/lib/libc.so.6", library, False),
        ("[heap]", guard, False),
        ("[anon: Go: heap]", guard, False),
    ):
        for access in ("rw-p", "rwxp"):
            why = maps._why_no_stack(Mapping(0x2000, 0x9000, access, name), before)
            assert (why == "") == good, (name, why)
        assert maps._why_no_stack(Mapping(0x2000, 0x9000, "rw-s", name), before)


ODD_STACKS = """
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
static char variable[1 << 20];
static ucontext_t back, one;
static void work(void) { puts("ready"); fflush(stdout); for (;;) pause(); }
int main(int count, char **words) {
    char *heap = sbrk(1 << 20);
    char *mapped = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    getcontext(&one);
    one.uc_stack.ss_sp = (*words[1] == 'v' ? variable : *words[1] == 'h' ? heap : mapped) + (1 << 19);
    one.uc_stack.ss_size = 1 << 14;
    makecontext(&one, work, 0);
    swapcontext(&back, &one);
}
"""


@pytest.mark.skipif(children.compiler() is None, reason="no C compiler: apt install gcc")
def test_a_stack_among_other_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.c").write_text(ODD_STACKS)
    program = str(tmp_path / "odd")
    subprocess.run([str(children.compiler()), "-o", program, str(tmp_path / "odd.c")], check=True)
    for where, said in (("variable", r"has its stack pointer in .*\.bss"), ("heap", r"in \[heap\]")):
        with children.running(program, where) as child, tracee(child.pid) as one:
            with pytest.raises(Busy, match=said):
                one.call(Call(GETPID, ()))
            assert child.poll() is None
    with children.running(program, "mapped") as child, tracee(child.pid) as one:
        assert one.call(Call(GETPID, ())).result == child.pid


MADE_CODE = """
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p,) + (ctypes.c_long,) * 5
at = 0x10000000
assert libc.mmap(at, 4096, 7, 0x32, -1, 0) == at
ctypes.memmove(at, bytes.fromhex('48c7c00f0000000f05'), 9)
ready()
sys.stdin.readline()
libc.munmap(ctypes.c_void_p(at), 4096)
ready()
sys.stdin.read()
"""


def test_code_made_for_a_moments_use_is_not_returned_to() -> None:
    with python(MADE_CODE) as child, Memory(child.pid) as memory:
        end = find_end(memory)
        assert any(one.start <= end < one.end and one.name.startswith("/") for one in mappings(child.pid))


def test_code_that_is_gone_is_not_used_and_searched_for_again() -> None:
    made = 0x10000000
    with python(MADE_CODE) as child, Memory(child.pid) as memory:
        one = Tracee(memory, child.pid, made + 7, end=made)
        assert one.call(Call(GETPID, ())).result == child.pid
        assert (one.instruction, one.end) == (made + 7, made)
        pipe(child.stdin).write("\n")
        pipe(child.stdin).flush()
        assert pipe(child.stdout).readline() == "ready\n"
        assert one.call(Call(GETPID, ())).result == child.pid
        assert made not in (one.instruction - 7, one.end)
        assert one.end
        assert child.poll() is None


def _tracer(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("TracerPid")))


class Frozen:
    """Stops of a thread in its call are not seen any more, as if it were frozen, after some of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stops: int) -> None:
        self.left = stops
        self.until = float("inf")
        self.began = False
        poll = module._Stop.poll

        def seen(stop: module._Stop) -> int | None:
            if not stop.changed or time.monotonic() > self.until:
                return poll(stop)
            if not self.left:
                self.began = True
                return None
            status = poll(stop)
            self.left -= status is not None
            return status

        monkeypatch.setattr(module._Stop, "poll", seen)

    def has_begun(self) -> bool:
        """Whether a stop was asked for in vain."""
        return self.began


@pytest.mark.skipif(children.compiler() is None, reason="no C compiler: apt install gcc")
@pytest.mark.parametrize("stops", [0, 1, 2], ids=["before the call", "in it", "after it"])
def test_who_wants_it_ended_leaves_a_frozen_thread_to_its_net(
    stops: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with children.running(str(children.registers_program(tmp_path))) as child:
        with tracee(child.pid) as one:
            for _ in range(5):
                with monkeypatch.context() as patch:
                    patch.setattr(module, "GRACE_S", 0.05)
                    frozen = Frozen(patch, stops)
                    began = time.monotonic()
                    with pytest.raises(Busy, match="goes on by itself"):
                        one.call(
                            Call(GETTIME, (1, 0), bytes(16), pointer=1),
                            wanted=frozen.has_begun,
                        )
                    assert time.monotonic() - began < module.PATIENCE_S / 2
                _until_state(child.pid, "t")
                let_go_of_late()
                assert _tracer(child.pid) == 0
                time.sleep(0.01)
            assert one.call(Call(GETTIME, (1, 0), bytes(16), pointer=1)).result == 0
        child.terminate()
        good, bad, _ = map(int, pipe(child.stdout).readline().split())
        assert bad == 0
        assert good > 10


def test_a_frozen_thread_without_a_net_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else would put it back."""
    monkeypatch.setattr(module, "GRACE_S", 0.05)
    with python("ready(); sys.stdin.read()") as child, tracee(child.pid) as one:
        bare = Tracee(one.memory, child.pid, one.instruction)
        frozen = Frozen(monkeypatch, 1)
        frozen.until = time.monotonic() + 0.5
        assert bare.call(Call(GETPID, ()), wanted=lambda: True).result == child.pid
        assert time.monotonic() > frozen.until


def _until_state(pid: int, state: str) -> None:
    end = time.monotonic() + 5
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != state:
        assert time.monotonic() < end
        time.sleep(0.001)


FILTER = """
class F(ctypes.Structure):
    _fields_ = [('code', ctypes.c_ushort), ('jt', ctypes.c_ubyte), ('jf', ctypes.c_ubyte),
                ('k', ctypes.c_uint)]
class P(ctypes.Structure):
    _fields_ = [('len', ctypes.c_ushort), ('filter', ctypes.POINTER(F))]
f = (F * 4)(F(0x20, 0, 0, 0), F(0x15, 0, 1, 39), F(6, 0, 0, 0x80000000), F(6, 0, 0, 0x7fff0000))
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, ctypes.byref(P(4, f)), 0, 0) == 0
ready()
sys.stdin.read()
"""
"""A seccomp filter that kills the process for getpid."""


def test_a_seccomp_filter_kills_unless_it_is_suspended() -> None:
    with python(FILTER) as child:
        if os.geteuid() == 0:
            with tracee(child.pid, suspend_seccomp=True) as one:
                assert one.call(Call(GETPID, ())).result == child.pid
        with tracee(child.pid) as one, pytest.raises(ProcessLost):
            while True:  # it dies after the call
                one.call(Call(GETPID, ()))


def test_another_tracer_is_an_error_and_changes_nothing() -> None:
    with python("ready(); sys.stdin.read()") as child, traced(child.pid), tracee(child.pid) as one:
        with pytest.raises(PermissionError):
            one.call(Call(GETPID, ()))
        assert child.poll() is None


class traced:  # a context manager
    """Another process traces this one."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def __enter__(self) -> None:
        code = (
            f"from prefault.inject import ptrace; import sys; ptrace.seize({self._pid}, 0); "
            "print('ready', flush=True); sys.stdin.read()"
        )
        self._running = children.running(sys.executable, "-c", code)
        self._running.__enter__()

    def __exit__(self, *_: object) -> None:
        self._running.__exit__(None, None, None)
