# SPDX-License-Identifier: Apache-2.0
"""Tracers of a thread that are killed at work, one by one.

    python3 killed_tracers.py PID ROUNDS [bare] [each]

At any moment; or with ``each`` after their first request of ptrace(2), after their second, and so on. The
call that they run there waits a little, and fails with EINTR when it is interrupted, as KVM's do.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

from prefault.errors import ProcessLost
from prefault.inject import cpu, ptrace
from prefault.inject.tracee import Call, Memory, Tracee, find_end, find_instruction

_EPOLL_CREATE1 = {"x86_64": 291, "aarch64": 20}
_EPOLL_PWAIT = {"x86_64": 281, "aarch64": 22}
_CALL_MS = 1
_LONGEST_S = {"x86_64": 0.012, "aarch64": 0.4}
"""Before a tracer is killed: the time of several calls. The lab's machine is emulated."""


def die_after(requests: int) -> None:
    """Have this process killed by itself when it has made so many requests of ptrace(2)."""
    real, left = ptrace._ptrace, iter(range(requests - 1))

    def counted(request: int, tid: int, address: int = 0, data: int = 0) -> int:
        result = real(request, tid, address, data)
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    ptrace._ptrace = counted


def work(tracee: Tracee) -> None:
    """Run system calls until killed."""
    name = cpu.host().name
    try:
        descriptor = tracee.call(Call(_EPOLL_CREATE1[name], (0,))).result
        nap = Call(_EPOLL_PWAIT[name], (descriptor, 0, 1, _CALL_MS, 0, 8), bytes(16), pointer=1)
        while True:
            tracee.call(nap)
    except ProcessLost:
        os._exit(3)


def main(pid: int, rounds: int, *, bare: bool, each: bool) -> int:
    """Kill ``rounds`` tracers."""
    chances = random.Random(pid)
    with Memory(pid) as memory:
        end = 0 if bare else find_end(memory)
        tracee = Tracee(memory, pid, find_instruction(memory), end=end)
        for number in range(1, rounds + 1):
            child = os.fork()
            if not child:
                if each:
                    die_after(number)
                work(tracee)
            if not each:
                time.sleep(0.003 + chances.uniform(0, _LONGEST_S[cpu.host().name]))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                return os.WEXITSTATUS(status)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), bare="bare" in sys.argv, each="each" in sys.argv))
