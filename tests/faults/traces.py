# SPDX-License-Identifier: Apache-2.0
"""Generated traces, and their text in each format that people have.

The formats are those of kernel/trace/trace_output.c, of trace-cmd 3.1 and of perf's builtin-script.c.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st

TEXT_FORMATS = (
    "tracefs",
    "tracefs with process ids",
    "tracefs with process ids, before Linux 5.9",
    "trace-cmd",
    "perf",
    "perf with process ids",
)


@dataclass(frozen=True)
class Line:
    """One event."""

    time_us: int
    tid: int
    pid: int
    comm: str
    cpu: int
    event: str
    payload: str
    ipa: int = 0
    syndrome: int = 0
    vcpu: int = -1


def guest_fault(ipa: int, esr: int, far: int, pc: int) -> str:
    """As arch/arm64/kvm/trace_arm.h prints it: zero has no 0x."""
    return f"ipa {c_hex(ipa)}, hsr {c_hex(esr, 8)}, hxfar {c_hex(far, 8)}, pc {c_hex(pc, 16)}"


def c_hex(value: int, width: int = 0) -> str:
    """What C's %#0*lx prints."""
    return f"{value:#0{width}x}" if value else "0".zfill(width)


def page_fault(vcpu: int, rip: int, address: int, code: int) -> str:
    """As arch/x86/kvm/trace.h prints it."""
    return f"vcpu {vcpu} rip {rip:#x} address 0x{address:016x} error_code {code:#x}"


def old_page_fault(address: int, code: int) -> str:
    """The same before Linux 6.2."""
    return f"address {address:x} error_code {code:x}"


def render(line: Line, form: str) -> str:
    """A line of a trace."""
    time = f"{line.time_us // 10**6:5d}.{line.time_us % 10**6:06d}"
    if form.startswith("tracefs"):
        places = 5 if "before" in form else 7
        pid = f"({line.pid:{places}d}) " if "process" in form else ""
        head = f"{line.comm:>16}-{line.tid:<7d} {pid}[{line.cpu:03d}] d..1. {time}: "
        return f"{head}{line.event}: {line.payload}"
    if form == "trace-cmd":
        head = f"{line.comm:>16}-{line.tid:<5d} [{line.cpu:03d}] {time:>12}: "
        return f"{head}{line.event + ':':<21} {line.payload}"
    ids = f"{line.pid:7d}/{line.tid:<7d}" if "process" in form else f"{line.tid:7d}"
    name = f"kvm:{line.event}"
    return f"{line.comm:>16} {ids} [{line.cpu:03d}] {time}: {name:>27}: {line.payload}"


def heading(form: str) -> str:
    """What such a trace begins with."""
    if form.startswith("tracefs"):
        return "# tracer: nop\n#\n#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION\n"
    return "cpus=4\n" if form == "trace-cmd" else ""


_HEX64 = st.integers(0, 2**64 - 1)
_COMMS = st.one_of(
    st.sampled_from(
        ["CPU 0/KVM", "fc_vcpu 11", "vcpu3", "a b-c [1]", "x: y", "<...>", "1.5: z", "kvm_exit: 1"]
    ),
    st.text(string.ascii_letters + string.digits + " -:[]()./<>_", min_size=1, max_size=15).filter(
        lambda text: text.strip() == text and not text.startswith(("#", "CPU:", "cpus=", "Warning:"))
    ),
)
_ARM64 = st.tuples(_HEX64, _HEX64, _HEX64, _HEX64).map(
    lambda all_: ("kvm_guest_fault", guest_fault(*all_), all_[0], all_[1], -1)
)
_X86 = st.tuples(st.integers(0, 4095), _HEX64, _HEX64, _HEX64).map(
    lambda all_: ("kvm_page_fault", page_fault(*all_), all_[2], all_[3], all_[0])
)
_OLD_X86 = st.tuples(_HEX64, _HEX64).map(
    lambda all_: ("kvm_page_fault", old_page_fault(*all_), all_[0], all_[1], -1)
)
_MMIO = st.tuples(st.sampled_from(["read", "write", "unsatisfied-read"]), st.integers(1, 8), _HEX64).map(
    lambda all_: ("kvm_mmio", f"mmio {all_[0]} len {all_[1]} gpa {all_[2]:#x} val 0x0", all_[2], 0, -1)
)
_PLAIN = st.sampled_from(
    [
        ("kvm_entry", "PC: 0x0000000040000000", 0, 0, -1),
        ("kvm_entry", 'CAN\'T FIND FIELD "vcpu_id"<CANT FIND FIELD rip>PC: 0x0000000040000000', 0, 0, -1),
        ("kvm_exit", "TRAP: HSR_EC: 0x0024 (DABT_LOW), PC: 0x0000000040000000", 0, 0, -1),
        ("kvm_exit", "vcpu 0 reason npf rip 0x1234 info1 0x0000000100000014 info2 0x0", 0, 0, -1),
        ("kvm_nested_vmexit_inject", "reason: npf ext_inf1: 0x0", 0, 0, -1),
    ]
)
KERNELS = {"arm64": st.one_of(_ARM64, _MMIO, _PLAIN), "x86": st.one_of(_X86, _OLD_X86, _MMIO, _PLAIN)}


def traces(kernel: str) -> st.SearchStrategy[list[Line]]:
    """Traces of a kernel, in order of time, that are not empty."""
    make: Callable[..., Line] = lambda time, tid, pid, comm, cpu, what: Line(  # noqa: E731
        time, tid, pid, comm, cpu, *what
    )
    line = st.builds(
        make,
        st.integers(0, 10**13),
        st.integers(1, 4194304),
        st.integers(1, 4194304),
        _COMMS,
        st.integers(0, 1023),
        KERNELS[kernel],
    )
    return st.lists(line, min_size=1, max_size=20).map(
        lambda lines: sorted(lines, key=lambda one: one.time_us)
    )
