# SPDX-License-Identifier: Apache-2.0
"""The protocols that every back end has, and the values that they exchange.

``Kvm`` → ``Vm`` → ``Vcpu`` mirror KVM's system, VM and vCPU file descriptors and keep KVM's verbs.
A scenario is written against these names and cannot tell which back end it has, other than by
asking ``Kvm.name``. Addresses say their space: ``gpa`` is an L1 IPA, ``hva`` an address in the
VMM's memory. Sizes are in bytes unless a name says otherwise.

Standard library only: this module also runs inside the lab's root file system.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from prefault.guest.program import Program

FILE_CONTENTS = bytes(range(256))
"""What memory of Backing.FILE_PRIVATE holds before anybody writes to it, over and over."""


class Backing(enum.Enum):
    """What is behind a memslot."""

    PRIVATE = "private"
    """MAP_PRIVATE anonymous memory, 4 KiB pages only (MADV_NOHUGEPAGE)."""
    SHARED = "shared"
    """MAP_SHARED anonymous memory (shmem), small pages."""
    THP = "thp"
    """MAP_PRIVATE anonymous memory, PMD-aligned, MADV_HUGEPAGE."""
    HUGETLB = "hugetlb"
    """A hugetlb memfd; the page size is ``MemoryRegion.page_size`` (0: the default size)."""
    FILE_PRIVATE = "file-private"
    """MAP_PRIVATE of a memfd that holds FILE_CONTENTS, over and over."""
    FILE_SHARED = "file-shared"
    """MAP_SHARED of a memfd."""
    GUEST_MEMFD = "guest-memfd"
    """A guest_memfd with GUEST_MEMFD_FLAG_MMAP | INIT_SHARED."""
    DEVICE = "device"
    """The machine's NOR flash, mapped through /dev/mem: uncached, and without pages (VM_PFNMAP)."""
    SECRET = "secret"
    """A memfd_secret(2): memory that nobody may access but the VMM itself, and so no guest."""


GUEST_MEMORY = tuple(one for one in Backing if one not in (Backing.DEVICE, Backing.SECRET))
"""What guests can have for memory."""


class Resident(enum.Enum):
    """What the host has done to the memory behind a slot before the guest sees it."""

    NOTHING = "nothing"
    READ = "read"
    """Populated for reading: the zero page behind private memory."""
    WRITE = "write"
    """Populated for writing: a page of its own behind every page."""


class Frames(enum.Enum):
    """Which frames neighbouring pages have. A back end without frames need not care."""

    ANY = "any"
    """Those that the host hands out."""
    SCATTERED = "scattered"
    """Far from each other, as on a host that has been in use for long."""
    CONTIGUOUS = "contiguous"
    """Neighbours, as far as a table of them reaches, and yet pages of their own. Anonymous memory only."""


class Advice(enum.Enum):
    """What ``Vm.advise`` asks of the host about the memory behind a range (madvise(2))."""

    DONTNEED = "dontneed"
    """Forget the pages; private memory reads as zeroes afterwards."""
    REMOVE = "remove"
    """Punch a hole into the file behind shared memory, which reads as zeroes afterwards."""
    ALLOCATE = "allocate"
    """Allocate the pages of a guest_memfd (fallocate(2)): what is in them is made only when they are used."""
    POPULATE_READ = "populate-read"
    POPULATE_WRITE = "populate-write"
    COLLAPSE = "collapse"
    """Make THPs of what is there now."""
    HUGEPAGE = "hugepage"
    NOHUGEPAGE = "nohugepage"
    HWPOISON = "hwpoison"
    """Declare the pages broken, as a memory error would."""
    SOFT_OFFLINE = "soft-offline"
    """Migrate the pages to other frames; those that they had are not used again."""
    MERGEABLE = "mergeable"
    """Let KSM merge equal pages, in its own time."""


class Access(enum.Enum):
    """What ``Vm.protect`` leaves the VMM allowed to do with its own memory (mprotect(2))."""

    NONE = "none"
    READ = "read"
    WRITE = "write"
    """Read and write."""


class UserfaultMode(enum.Enum):
    """Which faults of the VMM's own memory a handler of the VMM serves (userfaultfd(2))."""

    MISSING = "missing"
    """On pages that are not there."""
    MINOR = "minor"
    """On pages of shared memory that are there, but not mapped."""
    WRITE_PROTECT = "write-protect"
    """Writes to pages that ``Userfault.write_protect`` was used on."""


class SlotFlags(enum.IntFlag):
    """Flags of a memslot (KVM_MEM_*)."""

    NONE = 0
    LOG_DIRTY_PAGES = 1
    READONLY = 2


@dataclass(frozen=True)
class MemoryRegion:
    """One memslot as the VMM asks for it. ``size`` 0 deletes the slot."""

    slot: int
    gpa: int
    size: int
    backing: Backing = Backing.PRIVATE
    resident: Resident = Resident.NOTHING
    flags: SlotFlags = SlotFlags.NONE
    page_size: int = 0
    """Huge page size for HUGETLB; 0 is the host's default."""
    hva_offset: int = 0
    """Bytes by which the HVA is shifted against block alignment, to make misaligned slots."""
    frames: Frames = Frames.ANY
    """Where the pages lie that the host populates for writing, or writes a file of."""


@dataclass(frozen=True)
class VmConfig:
    """What ``Kvm.create_vm`` takes."""

    ipa_bits: int = 0
    """Size of the IPA space; 0 is KVM's default of 40 bits."""
    protected: bool = False
    gic: bool = True
    """An in-kernel GICv3; needed for nested vCPUs."""
    mte: bool = False
    """KVM_CAP_ARM_MTE: the guest has memory tags."""
    dirty_ring: int = 0
    """KVM_CAP_DIRTY_LOG_RING_ACQ_REL: entries of each vCPU's ring; 0 leaves memslots their bitmaps."""


@dataclass(frozen=True)
class VcpuConfig:
    """What ``Vm.create_vcpu`` takes."""

    el2: bool = False
    """KVM_ARM_VCPU_HAS_EL2: the vCPU boots at virtual EL2 and can run an L2."""
    e2h0: bool = False
    """With el2: KVM_ARM_VCPU_HAS_EL2_E2H0, that is HCR_EL2.E2H is RES0."""
    initialised: bool = True
    """False leaves KVM_ARM_VCPU_INIT out, to see what KVM says to that."""


@dataclass(frozen=True)
class Exit:
    """Why KVM_RUN returned."""


@dataclass(frozen=True)
class MmioExit(Exit):
    """KVM_EXIT_MMIO. A read waits for ``Vcpu.complete_mmio(value)`` before the next run.

    ``data`` is the value written, or 0 for a read, zero-extended from ``width`` bytes.
    """

    gpa: int
    width: int
    is_write: bool
    data: int = 0


@dataclass(frozen=True)
class MemoryFault(Exit):
    """KVM_EXIT_MEMORY_FAULT, with the errno that KVM_RUN returned."""

    gpa: int
    size: int
    flags: int
    errno: int


@dataclass(frozen=True)
class Interrupted(Exit):
    """KVM_RUN was interrupted by a signal (EINTR)."""


@dataclass(frozen=True)
class Failed(Exit):
    """KVM_RUN returned an errno without an exit that would explain it."""

    errno: int


@dataclass(frozen=True)
class OtherExit(Exit):
    """Any other exit reason, by number and name."""

    reason: int
    name: str
    details: tuple[int, ...] = ()


@dataclass(frozen=True, order=True)
class Leaf:
    """A run of equal, adjacent leaves of one stage-2 table, without host addresses."""

    ipa: int
    size: int
    level: int
    """Architectural level of the leaves, -1 to 3."""
    readable: bool = True
    writable: bool = False
    px: bool = False
    """Executable at EL1."""
    ux: bool = False
    """Executable at EL0."""
    accessed: bool = True
    block: bool = False


@dataclass(frozen=True)
class PreFaultProgress:
    """What one KVM_PRE_FAULT_MEMORY call left, and its errno (0 for success)."""

    gpa: int
    size: int
    errno: int = 0


@dataclass
class FaultCounts:
    """Stage-2 faults seen in an interval, by kind. Filled when ``Vm.count_faults`` closes."""

    read: int = 0
    write: int = 0
    execute: int = 0
    permission: int = 0
    """Faults on a present leaf; they are also counted in read, write or execute."""
    mmio: int = 0
    """Faults outside of any memslot. Not counted in the other fields."""
    ipas: list[int] = field(default_factory=list)
    """IPA of each fault in order; L2 IPAs for faults taken in a nested context."""

    @property
    def total(self) -> int:
        """All stage-2 faults on memory, that is without MMIO."""
        return self.read + self.write + self.execute


class Scope(Protocol):
    """What a ``with`` statement opens and closes."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Vcpu(Protocol):
    """A vCPU file descriptor."""

    def load(self, program: Program, arguments: Sequence[int] = ()) -> None:
        """Point the vCPU at ``program``, which ``Vm.install`` has put into guest memory."""

    def run(self, *, immediate_exit: bool = False) -> Exit:
        """KVM_RUN once; with ``immediate_exit`` it completes a pending exit and returns."""

    def complete_mmio(self, value: int) -> None:
        """Give the pending MMIO read its value; the next ``run`` delivers it to the guest."""

    def reset(self) -> None:
        """KVM_ARM_VCPU_INIT again, as a VMM does when its guest reboots; ``load`` gives it a program."""

    def pre_fault_memory_once(self, gpa: int, size: int, flags: int = 0) -> PreFaultProgress:
        """One KVM_PRE_FAULT_MEMORY call; never raises for what the kernel answers."""

    def pre_fault_memory(self, gpa: int, size: int) -> None:
        """Pre-fault ``[gpa, gpa+size)``, calling again while the kernel reports progress."""

    def get_register(self, name: str) -> int:
        """A general register (x0…x30, sp, pc, pstate) or system register by architectural name."""

    def set_register(self, name: str, value: int) -> None:
        """Set what ``get_register`` reads."""

    def registers(self) -> dict[str, bytes]:
        """All registers that user space can read, but for counters, which never rest.

        By architectural name, as assemblers have it where it is not a common one, or by KVM's id.
        """

    def close(self) -> None:
        """Close the descriptor. Safe to call again."""


class Userfault(Scope, Protocol):
    """A range of guest memory whose faults a handler serves, in a thread of its own.

    Whoever faults there, be it the VMM, the guest or a pre-fault, waits until one of the verbs has
    served the page. The host must not touch a page before that: Python would wait for itself.
    Addresses are page-aligned.
    """

    def copy(self, gpa: int, data: bytes) -> None:
        """UFFDIO_COPY: the pages from ``gpa`` on hold ``data``, whole pages of it."""

    def zero(self, gpa: int, size: int) -> None:
        """UFFDIO_ZEROPAGE: the pages hold zeroes."""

    def proceed(self, gpa: int, size: int) -> None:
        """UFFDIO_CONTINUE: map what shared memory has there."""

    def poison(self, gpa: int, size: int) -> None:
        """UFFDIO_POISON: the pages are lost, as if memory had failed."""

    def write_protect(self, gpa: int, size: int, *, protect: bool) -> None:
        """UFFDIO_WRITEPROTECT: ask before pages that are there are written, or no more."""

    def interrupt(self) -> None:
        """Send a signal to the thread whose fault the handler was asked about last."""

    def close(self) -> None:
        """Serve no more; who waits goes on as if nobody had served.

        :raises Exception: what the handler raised, if it did
        """


class Held(Scope, Protocol):
    """An invalidation of the VMM's memory that does not come to its end until it is released.

    MMU notifiers have been told that it begins, and are not told that it ends: whoever would map what it
    finds there has to wait. Make and close it in the same thread.
    """

    def interrupt(self) -> None:
        """Send a signal to the thread that has made this, for the call that it is in."""

    def release(self) -> None:
        """Let the invalidation end. Any thread may, again, too."""


class Preemption(Scope, Protocol):
    """Takes the CPU away from calls."""

    def run(self, call: Callable[[], object], meanwhile: Callable[[], None]) -> None:
        """Make a call, and another, ``meanwhile``, at some moment of it.

        The call does not go on before ``meanwhile`` returns, unless one waits for the other.
        """


class Child(Scope, Protocol):
    """A child process of the VMM, which has its memory as it was at the fork."""

    def read_memory(self, gpa: int, size: int) -> bytes:
        """Guest memory as the child sees it."""

    def close(self) -> None:
        """Let the child end. Safe to call again."""


UserfaultHandler = Callable[[Userfault, int, bool], None]
"""Called with the gpa of the page and whether it was to be written, once or more for each fault."""


class Vm(Scope, Protocol):
    """A VM file descriptor."""

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on this VM."""

    def set_user_memory_region(self, region: MemoryRegion) -> None:
        """Create, change or (size 0) delete a memslot. Its mapping outlives it."""

    def create_vcpu(self, config: VcpuConfig = ...) -> Vcpu:
        """KVM_CREATE_VCPU and, unless asked otherwise, KVM_ARM_VCPU_INIT."""

    def install(self, program: Program) -> None:
        """Write the code and data of a guest program into guest memory."""

    def program_size(self, program: Program) -> int:
        """How much guest memory a program takes, from its base on."""

    def read_memory(self, gpa: int, size: int) -> bytes:
        """Guest memory as the host sees it."""

    def write_memory(self, gpa: int, data: bytes) -> None:
        """Write guest memory from the host."""

    def advise(self, gpa: int, size: int, advice: Advice) -> None:
        """madvise(2) on the host's mapping of ``[gpa, gpa+size)``, which lies in one memslot."""

    def protect(self, gpa: int, size: int, access: Access) -> None:
        """mprotect(2) on the host's mapping of ``[gpa, gpa+size)``, which lies in one memslot."""

    def unmap(self, gpa: int, size: int) -> None:
        """munmap(2) the host's mapping of ``[gpa, gpa+size)``; the memslot stays."""

    def map_anew(self, gpa: int, size: int, *, secret: bool = False) -> None:
        """mmap(2) over the host's mapping of ``[gpa, gpa+size)``; the memslot stays.

        :param secret: not private memory, but a memfd_secret(2) (Backing.SECRET)
        """

    def fork(self) -> Child:
        """fork(2) of the VMM: it shares its private memory with the child, copied on write."""

    def merge(self, gpa: int, size: int) -> None:
        """Have KSM make one page of the pages of ``[gpa, gpa+size)``, which are equal."""

    def age(self, gpa: int, size: int) -> None:
        """Have the host take note that nobody has used ``[gpa, gpa+size)`` lately."""

    def drop_caches(self) -> None:
        """Have the host drop pages of files that are neither mapped nor, as far as it knows, written."""

    def handle_userfaults(
        self, gpa: int, size: int, mode: UserfaultMode, handler: UserfaultHandler
    ) -> Userfault:
        """Have the faults of the VMM on ``[gpa, gpa+size)``, which lies in one memslot, served."""

    def hold_invalidation(self, gpa: int, size: int) -> Held:
        """Drop the pages of ``[gpa, gpa+size)`` as Advice.DONTNEED does, and stay in the middle of it.

        The range lies in one memslot of private memory, and is large: tens of thousands of pages.

        :raises CapabilityMissing: the host cannot be made to stay there
        """

    def preempt(self) -> Preemption:
        """Make calls that are interrupted by somebody with a higher priority.

        :raises CapabilityMissing: nobody can have one
        """

    def get_dirty_log(self, slot: int) -> list[int]:
        """Page numbers, relative to the slot, written since the last call."""

    def harvest_dirty_rings(self) -> list[tuple[int, int]]:
        """(slot, page) of each write that vCPUs had noted since the last call. Call it while none runs."""

    def stage2(self) -> list[Leaf]:
        """Leaves of the canonical stage-2 table, by IPA."""

    def nested_stage2(self) -> list[list[Leaf]]:
        """Leaves of every shadow stage-2 table in use, by index."""

    def ptdump(self) -> list[str]:
        """The canonical table, then every shadow table in use, as text in the form of debugfs."""

    def count_faults(self) -> AbstractContextManager[FaultCounts]:
        """Count this VM's stage-2 faults while the returned context is open."""

    def close(self) -> None:
        """Close the VM and its vCPUs. Safe to call again."""


class Kvm(Protocol):
    """The system file descriptor, /dev/kvm."""

    @property
    def name(self) -> str:
        """Which back end this is: ``kvm`` or ``spec``."""

    @property
    def page_size(self) -> int:
        """The host's page size."""

    @property
    def shows_stage2(self) -> bool:
        """Whether VMs have ``stage2`` and what goes with it; on x86 they do not."""

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on the system descriptor."""

    def create_vm(self, config: VmConfig = ...) -> Vm:
        """KVM_CREATE_VM."""

    def close(self) -> None:
        """Close the descriptor. Safe to call again."""
