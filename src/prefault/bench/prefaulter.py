# SPDX-License-Identifier: Apache-2.0
"""A thread that pre-faults a range once, without the binding's own loop around the ioctl."""

from __future__ import annotations

import ctypes
import os
import threading
import time

from prefault.abi import ioctls, structures
from prefault.errors import KvmError
from prefault.kvm.vcpu import Vcpu

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


class PreFaulter(threading.Thread):
    """Pre-faults ``[gpa, gpa + size)`` on one CPU; on the CPUs in turn, if there are not so many.

    :ivar ready: set once the thread is on its CPU and about to call
    :ivar gate: what to wait for between that and the first call
    :ivar ns: when it began and ended, by time.monotonic_ns()
    :ivar cpu_ns: what it took of its CPU
    """

    def __init__(self, vcpu: Vcpu, gpa: int, size: int, cpu: int) -> None:
        super().__init__()
        self._vcpu = vcpu
        self._request = structures.kvm_pre_fault_memory(gpa, size, 0)
        self._cpu = cpu % (os.cpu_count() or 1)
        self._error: KvmError | None = None
        self.ready = threading.Event()
        self.gate: threading.Barrier | None = None
        self.ns = (0, 0)
        self.cpu_ns = 0

    def run(self) -> None:
        """Until all of it is done, or a call fails."""
        os.sched_setaffinity(0, {self._cpu})
        address = ctypes.addressof(self._request)
        self.ready.set()
        if self.gate:
            self.gate.wait()
        start, cpu = time.monotonic_ns(), time.thread_time_ns()
        while self._request.size and not self._error:
            if _libc.ioctl(self._vcpu.fd, ioctls.KVM_PRE_FAULT_MEMORY, address):
                self._error = KvmError("KVM_PRE_FAULT_MEMORY", ctypes.get_errno())
        self.ns = (start, time.monotonic_ns())
        self.cpu_ns = time.thread_time_ns() - cpu

    def finish(self) -> None:
        """Wait for its end.

        :raises KvmError: what the ioctl failed with
        """
        self.join()
        if self._error:
            raise self._error
