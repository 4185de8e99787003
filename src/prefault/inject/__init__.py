# SPDX-License-Identifier: Apache-2.0
"""One system call in a thread of a process that knows nothing of it, and a plan applied to a VMM that way.

    ptrace.py   the requests of ptrace(2), as functions
    cpu.py      registers and system call numbers of arm64 and x86-64
    frame.py    a signal frame that takes a thread back if nobody else can
    tracee.py   stop one thread, run one system call in it, put all back
    vcpus.py    the vCPUs of a process, and the threads that run them
    refusal.py  whether a process may be touched, and if not, why
    apply.py    a plan, slice by slice

Standard library only: this runs inside the lab, too.
"""
