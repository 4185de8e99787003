# SPDX-License-Identifier: Apache-2.0
"""The back end that is an executable specification of arm64 KVM's stage-2 memory path.

Pure Python, no I/O. ``open_spec`` gives what ``prefault.kvm.open_kvm`` gives on a real host. Read it in
this order: ``descriptors``, ``pgtable`` (the tables), ``mm`` (the VMM's memory), ``memslots``, ``faults``
(user_mem_abort and gmem_abort), ``prefault`` (the ioctl), ``unmap`` (MMU notifiers), ``nested``,
``abort`` and ``cpu`` (a guest that faults), ``steps`` (where orders can differ).
"""

from prefault.spec.state import Faults, HostConfig
from prefault.spec.system import SpecKvm, open_spec

__all__ = ["Faults", "HostConfig", "SpecKvm", "open_spec"]
