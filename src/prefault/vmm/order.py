# SPDX-License-Identifier: Apache-2.0
"""What the VMM is asked to do, as data that can go into the lab, and what came of it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefault.vmm.config import GuestConfig

COMMAND_LINE = "console=ttyAMA0 panic=-1"


class How(enum.Enum):
    """How a snapshot's memory comes back."""

    EAGER = "eager"
    """Read before the guest runs."""
    MAP = "map"
    """The file is mapped privately, and its pages are read as they are touched."""
    USERFAULTFD = "userfaultfd"
    """We bring each page when it is touched, and the others meanwhile."""


@dataclass(frozen=True)
class Watch:
    """What to do when the guest says something."""

    snapshot: str = ""
    """Console text at which a snapshot is taken, the first time that it comes."""
    snapshot_to: str = ""
    """Folder of the snapshot."""
    stop_after_snapshot: bool = False
    stop: str = ""
    """Console text at which the VM ends, as asked."""
    type: tuple[tuple[str, str], ...] = ()
    """(console text, what to type then)"""
    count_faults: bool = False
    """Whether to count the guest's stage-2 faults, which takes root and costs time."""


@dataclass(frozen=True)
class Boot:
    """Boot a kernel."""

    image: str
    initrd: str
    guest: GuestConfig
    command_line: str = COMMAND_LINE
    watch: Watch = field(default_factory=Watch)


@dataclass(frozen=True)
class Restore:
    """Let a guest go on from a snapshot."""

    folder: str
    how: How = How.EAGER
    check: bool = True
    """Whether all of the memory file is checked before the guest runs."""
    guest: Mapping[str, object] = field(default_factory=dict)
    """What to have differently from the snapshot: backing, huge_page_size, resident."""
    first: tuple[tuple[int, int], ...] = ()
    """With How.USERFAULTFD: (ipa, size) ranges that are brought before all others."""
    pre_fault: tuple[tuple[int, int], ...] = ()
    """(ipa, size) ranges that are pre-faulted before the guest runs."""
    pre_fault_all: bool = False
    """Pre-fault all of its memory in place of ranges."""
    watch: Watch = field(default_factory=Watch)


class Why(enum.Enum):
    """Why a VM ended."""

    SHUTDOWN = "shutdown"
    """The guest powered itself off."""
    RESET = "reset"
    """The guest asked to be started again: reboot, or a panic with panic=…."""
    CRASH = "crash"
    """The guest said that it crashed (SYSTEM_EVENT crash)."""
    STOPPED = "stopped"
    """It was asked for: the console text came, or the snapshot was taken."""


@dataclass
class Outcome:
    """How it went. Times are seconds of the host's clock."""

    why: Why
    run_seconds: float = 0
    """From the first instruction to the end."""
    ready_seconds: float | None = None
    """From the first instruction to the text of ``Watch.stop``."""
    restore_seconds: float = 0
    """Until the guest could run: checking, reading, pre-faulting."""
    check_seconds: float = 0
    pre_fault_seconds: float = 0
    pre_faulted: int = 0
    """Bytes."""
    snapshot: dict[str, object] | None = None
    """Of the snapshot that was taken: folder, seconds, bytes; or error."""
    pager: dict[str, object] | None = None
    """Of userfaultfd: chunks by who asked for them."""
    mmio_exits: int = 0
    console_bytes: int = 0
    faults: dict[str, int] | None = None
    """Stage-2 faults of the guest, by kind, if they were counted; permission faults are among the others."""
    strays: list[int] = field(default_factory=list)
    """Addresses that the guest used and where there is nothing."""

    def to_json(self) -> dict[str, object]:
        """A form for JSON."""
        return {**dataclasses.asdict(self), "why": self.why.value}


def boot_from(raw: Mapping[str, Any]) -> Boot:
    """A ``Boot`` from JSON. What is left out is as the class has it."""
    guest = GuestConfig.from_json(raw.get("guest", {}))
    return Boot(**{**raw, "guest": guest, "watch": _watch(raw.get("watch"))})


def restore_from(raw: Mapping[str, Any]) -> Restore:
    """A ``Restore`` from JSON. What is left out is as the class has it."""
    ranges = {name: tuple((ipa, size) for ipa, size in raw.get(name, ())) for name in ("first", "pre_fault")}
    return Restore(
        **{**raw, **ranges, "how": How(raw.get("how", How.EAGER)), "watch": _watch(raw.get("watch"))}
    )


def _watch(raw: Mapping[str, Any] | None) -> Watch:
    if raw is None:
        return Watch()
    return Watch(**{**raw, "type": tuple((text, typed) for text, typed in raw.get("type", ()))})


def plain(order: Boot | Restore) -> dict[str, object]:
    """What ``boot_from`` and ``restore_from`` read."""
    raw = dataclasses.asdict(order)
    if isinstance(order, Boot):
        return {**raw, "do": "boot", "guest": order.guest.to_json()}
    return {**raw, "do": "restore", "how": order.how.value}
