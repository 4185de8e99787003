# SPDX-License-Identifier: Apache-2.0
"""Pre-faulting while everything else goes on at once, on the real KVM.

``ground`` is the guest memory and what may be in it, ``actors`` are those who do things to it, ``check``
is what must hold when they rest, ``run`` is the command that runs inside the lab.

Standard library only: all of it runs inside the lab's root file system.
"""
