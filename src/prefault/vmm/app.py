# SPDX-License-Identifier: Apache-2.0
"""Does an order: boots or restores, and runs to the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from prefault.errors import CapabilityMissing, PrefaultError, UsageError
from prefault.kvm import hugepages
from prefault.kvm.system import Kvm, open_kvm
from prefault.kvm.vm import host_page_size
from prefault.machine import Backing
from prefault.vmm import image, ranges, saved, snapshot, state
from prefault.vmm.config import RAM_BASE
from prefault.vmm.machine import Machine
from prefault.vmm.order import Boot, How, Outcome, Restore, Watch
from prefault.vmm.pager import Pager
from prefault.vmm.run import Session, say, write_stdout
from prefault.vmm.snapshot import Snapshot

Out = Callable[[bytes], None]


def boot(
    order: Boot, *, out: Out = write_stdout, remark: Callable[[str], None] = say, stdin: int = -1
) -> Outcome:
    """Boot a kernel and run it to its end.

    :raises UsageError: the files are not what they should be, or the guest is too small for them
    :raises Missing: there is no KVM here, or it lacks something
    :raises PrefaultError: the guest cannot go on
    """
    kernel = image.parse(image.read(Path(order.image)), order.image)
    initrd = image.read(Path(order.initrd)) if order.initrd else b""
    image.place(kernel, len(initrd), order.guest.memory)
    _refuse_bad_watch(order.watch)
    with open_kvm() as kvm, Machine(kvm, order.guest, out) as machine:
        machine.load_linux(kernel, initrd, order.command_line)
        return Session(machine, order.watch, remark).run(stdin)


def _refuse_bad_watch(watch: Watch) -> None:
    if watch.snapshot_to:
        snapshot.refuse_existing(Path(watch.snapshot_to))
    if watch.snapshot and not watch.snapshot_to:
        raise UsageError("a snapshot needs a folder to go to")


def restore(
    order: Restore, *, out: Out = write_stdout, remark: Callable[[str], None] = say, stdin: int = -1
) -> Outcome:
    """Let a guest go on from a snapshot and run it to its end.

    :raises BadSnapshot: it is truncated, damaged, or of another kind of machine; nothing has run
    :raises Missing: there is no KVM here, or it lacks something
    :raises PrefaultError: the guest cannot go on
    """
    _refuse_bad_watch(order.watch)
    began = time.monotonic()
    source = Snapshot(Path(order.folder))
    try:
        whole = saved.Saved.from_snapshot(source, order.guest)
        saved.check_host(source, whole)
        with open_kvm() as kvm:
            return _restored(kvm, order, source, whole, began, out, remark, stdin)
    finally:
        source.close()


def _restored(
    kvm: Kvm,
    order: Restore,
    source: Snapshot,
    whole: saved.Saved,
    began: float,
    out: Out,
    remark: Callable[[str], None],
    stdin: int,
) -> Outcome:
    check_seconds = _check(order, source)
    contents = source.descriptor if order.how is How.MAP else -1
    with Machine(kvm, whole.guest, out, contents=contents) as machine:
        session = Session(machine, order.watch, remark)
        pager = _bring_memory(order, machine, source, session)
        try:
            saved.restore(machine, source, whole)
            if pager:
                pager.start()
                pager.wait_for_first()
            outcome = session.outcome
            outcome.check_seconds = check_seconds
            outcome.pre_fault_seconds, outcome.pre_faulted = _pre_fault(order, machine)
            state.restore_counters(machine.vcpus[0], whole.counters)
            outcome.restore_seconds = round(time.monotonic() - began, 6)
            return session.run(stdin)
        finally:
            if pager:
                pager.close()


def _check(order: Restore, source: Snapshot) -> float:
    """Check all of the memory if that is wanted; seconds. An eager restore checks what it reads."""
    began = time.monotonic()
    if order.check and order.how is not How.EAGER:
        source.check()
    return round(time.monotonic() - began, 6)


def _bring_memory(order: Restore, machine: Machine, source: Snapshot, session: Session) -> Pager | None:
    if order.how is How.EAGER:
        for offset, chunk in source.pieces():
            machine.vm.write_memory(RAM_BASE + offset, chunk)
        return None
    if order.how is How.MAP:
        return None
    session.pager = _pager(order, machine, source, session)
    return session.pager


def _pager(order: Restore, machine: Machine, source: Snapshot, session: Session) -> Pager:
    guest = machine.guest
    huge = guest.backing is Backing.HUGETLB
    try:
        return Pager(
            machine.vm,
            source,
            page_size=(guest.huge_page_size or hugepages.default_size()) if huge else host_page_size(),
            first=ranges.fitted(order.first, RAM_BASE, guest.memory, host_page_size()),
            checked=order.check,
            zero_pages=not huge,
            on_failure=session.fail,
        )
    except CapabilityMissing:
        raise
    except PrefaultError as error:
        raise CapabilityMissing(
            f"this kernel does not let userfaultfd bring {guest.backing.value} memory: use another backing, "
            f"or another way to restore; {error}"
        ) from error


def _pre_fault(order: Restore, machine: Machine) -> tuple[float, int]:
    """Seconds and bytes."""
    size = machine.guest.memory
    wanted = [(RAM_BASE, size)] if order.pre_fault_all else order.pre_fault
    began = time.monotonic()
    done = machine.pre_fault(ranges.fitted(wanted, RAM_BASE, size, host_page_size()))
    return round(time.monotonic() - began, 6), done
