# SPDX-License-Identifier: Apache-2.0
"""The VMM with a Linux guest: booted once, snapshotted, restored in every way, and ended in every way.

The guest has two vCPUs. It fills a file, and then hashes it, counts and says so until it is spoken to.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefault.errors import BadSnapshot, CapabilityMissing, KvmError
from prefault.machine import Backing
from prefault.vmm import app, snapshot, state
from prefault.vmm.config import MIB, RAM_BASE, UART_BASE, GuestConfig
from prefault.vmm.order import COMMAND_LINE, Boot, How, Outcome, Restore, Watch, Why
from prefault.vmm.run import Session
from tests.lab.inside.checks import Checks, main

checks = Checks()

IMAGE, INITRD = "/guest/Image", "/guest/initrd"
MEMORY = 64 * MIB
WARM = Path("/tmp/warm")
TAKEN_AT = "count 2 "
LDP_X0_X1_FROM_X2 = 0xA940_0440
TIMER_CONTROLS = ("0x603000000013df11", "0x603000000013df19")
LATER = "count 4 "
"""The guest is well on its way again."""

SCRIPT = """dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null
sum=$(sha256sum </tmp/data)
case $(sed 's/.*do=\\([a-z]*\\).*/\\1/' /proc/cmdline) in
panic) exit 1;;
esac
n=0
while [ $n -lt 5 ]; do
    n=$((n+1))
    up=$(cut -d' ' -f1 /proc/uptime)
    [ "$(sha256sum </tmp/data)" = "$sum" ] && echo "count $n up $up cpus $(nproc) same"
done
echo "name?"
read name
sleep 0.1
echo "hello $name"
poweroff -f
"""
"""What the guest does: a test puts it into the initial RAM disk."""


class Said:
    """What the guest said, and what the VMM remarked."""

    def __init__(self) -> None:
        self.text = b""
        self.remarks: list[str] = []

    def out(self, piece: bytes) -> None:
        self.text += piece

    @property
    def counts(self) -> list[int]:
        """The numbers that came with an unchanged file, on two CPUs."""
        return [int(number) for number in re.findall(rb"count (\d+) up \S+ cpus 2 same", self.text)]

    @property
    def uptimes(self) -> dict[int, float]:
        """Seconds that the guest took for its age, by count."""
        found = re.findall(rb"count (\d+) up (\S+)", self.text)
        return {int(number): float(seconds) for number, seconds in found}


GREETED = ("name?", "Ada\n")


def booted(watch: Watch, *, arguments: str = "") -> tuple[Outcome, Said]:
    said = Said()
    guest = GuestConfig(memory=MEMORY, vcpus=2)
    order = Boot(IMAGE, INITRD, guest, f"{COMMAND_LINE} quiet {arguments}", watch)
    return app.boot(order, out=said.out, remark=said.remarks.append), said


def restored(folder: Path = WARM, stop: str = LATER, **options: Any) -> tuple[Outcome, Said]:
    taken()
    said = Said()
    count = bool(options.pop("count_faults", False))
    order = Restore(str(folder), watch=Watch(stop=stop, type=(GREETED,), count_faults=count), **options)
    return app.restore(order, out=said.out, remark=said.remarks.append), said


@functools.cache
def taken() -> tuple[Outcome, Said]:
    """The run in which the snapshot was taken; the guest went on to its end."""
    return booted(Watch(snapshot=TAKEN_AT, snapshot_to=str(WARM), type=(GREETED,)))


@checks
def a_guest_boots_talks_listens_and_powers_itself_off() -> None:
    outcome, said = taken()
    assert outcome.why is Why.SHUTDOWN, said.text
    assert b"hello Ada" in said.text
    assert outcome.strays == []


@checks
def a_guest_goes_on_after_a_snapshot_as_if_nothing_had_been() -> None:
    outcome, said = taken()
    assert said.counts == [1, 2, 3, 4, 5], said.text
    assert outcome.snapshot and "error" not in outcome.snapshot
    assert 0 < int(str(outcome.snapshot["stored"])) < MEMORY
    assert WARM.is_dir()


@checks
def a_restored_guest_goes_on_where_it_was_to_its_end() -> None:
    outcome, said = restored(stop="")
    assert outcome.why is Why.SHUTDOWN
    assert said.counts[-1] == 5 and min(said.counts) >= 2, said.text
    assert b"hello Ada" in said.text


@checks
def time_goes_on_from_where_it_stood() -> None:
    before, after = taken()[1].uptimes, restored()[1].uptimes
    assert before[2] <= after[3] < before[2] + 20
    # The pauses are not in it: it would be the time from the snapshot until now.
    assert after[3] < before[2] + 0.5 * sum(after.values())


@checks.each((How.MAP, How.USERFAULTFD))
def a_guest_comes_back(how: How) -> None:
    outcome, said = restored(how=how)
    assert outcome.why is Why.STOPPED
    assert said.counts[-1] >= 3, said.text
    assert outcome.ready_seconds is not None and outcome.restore_seconds > 0


@checks.each((Backing.SHARED, Backing.THP, Backing.HUGETLB, Backing.FILE_SHARED, Backing.GUEST_MEMFD))
def a_guest_comes_back_on_another_backing(backing: Backing) -> None:
    assert restored(guest={"backing": backing.value})[1].counts[-1] >= 3


@checks.each((Backing.SHARED, Backing.HUGETLB))
def userfaultfd_serves_other_backings(backing: Backing) -> None:
    outcome, said = restored(how=How.USERFAULTFD, guest={"backing": backing.value})
    assert said.counts[-1] >= 3
    # Who was first is chance: the background copy has few huge pages to bring.
    assert outcome.pager and any(outcome.pager.values())


@checks
def userfaultfd_says_which_backings_it_cannot_serve() -> None:
    try:
        outcome, _ = restored(how=How.USERFAULTFD, guest={"backing": "guest-memfd"})
    except CapabilityMissing as error:
        assert "does not let userfaultfd bring guest-memfd memory" in str(error), error
    else:
        assert outcome.pager and outcome.pager["asked"]


@checks
def what_is_wanted_first_is_there_before_the_guest_runs() -> None:
    first = ((RAM_BASE, 32 * MIB),)
    outcome, said = restored(how=How.USERFAULTFD, first=first, check=False)
    assert said.counts[-1] >= 3
    assert outcome.pager and outcome.pager["first"] == 32 * MIB // snapshot.CHUNK


@checks
def a_guest_that_was_pre_faulted_takes_no_faults() -> None:
    without, _ = restored(count_faults=True, guest={"resident": "write"})
    outcome, said = restored(count_faults=True, guest={"resident": "write"}, pre_fault_all=True)
    assert said.counts[-1] >= 3
    assert outcome.pre_faulted == MEMORY
    assert without.faults and without.faults["read"] + without.faults["write"] > 500
    assert outcome.faults == {"read": 0, "write": 0, "execute": 0, "permission": 0}


@checks
def a_mapped_guest_that_was_pre_faulted_faults_to_write_only() -> None:
    outcome, _ = restored(how=How.MAP, count_faults=True, pre_fault_all=True)
    assert outcome.faults
    assert outcome.faults["permission"] > 0  # the file must not change
    # While a page is exchanged for one that may be written, another vCPU may find it gone.
    assert outcome.faults["read"] + outcome.faults["execute"] < outcome.faults["write"] / 10


@checks
def ranges_are_pre_faulted_as_far_as_there_is_memory() -> None:
    outcome, _ = restored(pre_fault=((0, RAM_BASE + 2 * MIB), (RAM_BASE + MEMORY - 5000, 1 << 30)))
    assert outcome.pre_faulted == 2 * MIB + 8192


@checks
def a_restored_guest_can_be_snapshotted_again() -> None:
    again = Path("/tmp/again")
    watch = Watch(snapshot="count 3 ", snapshot_to=str(again), stop_after_snapshot=True)
    taken()
    order = Restore(str(WARM), How.USERFAULTFD, watch=watch)
    outcome = app.restore(order, out=Said().out, remark=Said().remarks.append)
    assert outcome.why is Why.STOPPED and outcome.snapshot and outcome.snapshot["stored"]
    assert restored(again, "count 5 ")[1].counts == [4]


@checks
def a_signal_takes_a_snapshot_at_any_time() -> None:
    asked = Path("/tmp/asked")
    watch = Watch(stop="count 5 ", snapshot_to=str(asked))
    said = Said()

    def out(piece: bytes) -> None:
        said.out(piece)
        if b"count 3 " in said.text and not asked.exists():
            os.kill(os.getpid(), signal.SIGUSR2)

    outcome = app.restore(Restore(str(WARM), watch=watch), out=out, remark=said.remarks.append)
    assert outcome.snapshot and outcome.snapshot["folder"] == str(asked)
    assert said.counts[-1] >= 4, said.text
    assert restored(asked, "count 5 ")[1].counts[-1:] in ([4], [])


# What is refused, and that nothing runs then.


def refused(folder: Path, why: str, how: How = How.EAGER) -> None:
    try:
        _, said = restored(folder, how=how)
    except BadSnapshot as error:
        assert why in str(error), error
        return
    raise AssertionError(f"it ran, and said {said.text!r}")


@contextlib.contextmanager
def changed(change: Any) -> Iterator[Path]:
    """The snapshot with another state, as whole as before."""
    taken()
    copy = Path("/tmp/changed")
    shutil.copytree(WARM, copy)
    try:
        body = json.loads((WARM / snapshot.STATE).read_bytes().partition(b"\n")[2])
        change(body)
        text = json.dumps(body).encode()
        head = f"prefault-snapshot 1 {len(text)} {zlib.crc32(text):08x}\n".encode()
        (copy / snapshot.STATE).write_bytes(head + text)
        yield copy
    finally:
        shutil.rmtree(copy)


def _registers(body: Any) -> dict[str, str]:
    found: dict[str, str] = body["vcpus"][0]["registers"]
    return found


@checks
def registers_that_this_kernel_lacks_are_named() -> None:
    with changed(lambda body: _registers(body).update({"0x603000000013ffff": "00" * 8})) as folder:
        refused(folder, "lack registers that the guest's had: S3_7_C15_C15_7")


@checks
def registers_that_the_snapshot_lacks_are_named() -> None:
    with changed(lambda body: _registers(body).pop("0x603000000013c080")) as folder:
        refused(folder, "the snapshot knows nothing: sctlr_el1", How.MAP)


@checks
def another_cpu_is_refused() -> None:
    with changed(lambda body: _registers(body).update({"0x603000000013c000": "01" * 8})) as folder:
        refused(folder, "does not take midr_el1", How.USERFAULTFD)


@checks
def another_gic_is_refused() -> None:
    def change(body: Any) -> None:
        body["gic_identity"][0][2] = 0xDEAD

    with changed(change) as folder:
        refused(folder, "GIC refuses 0xdead")


@checks.each(How)
def damaged_memory_is_refused(how: How) -> None:
    with changed(lambda body: None) as folder:
        with (folder / snapshot.MEMORY).open("r+b") as file:
            file.seek(MEMORY - 5)
            file.write(b"x")
        refused(folder, "damaged at byte 0x3ff0000", how)


@checks
def damaged_memory_that_is_brought_later_never_reaches_the_guest() -> None:
    with changed(lambda body: None) as folder:
        with (folder / snapshot.MEMORY).open("r+b") as file:
            file.seek(MEMORY - 5)
            file.write(b"x")
        try:
            restored(folder, "never", how=How.USERFAULTFD, check=False)
        except BadSnapshot as error:
            assert "damaged at byte 0x3ff0000" in str(error)
        else:
            raise AssertionError("nobody noticed")


@checks
def a_full_disk_leaves_the_guest_running() -> None:
    small = Path("/tmp/small")
    small.mkdir()
    assert os.system(f"mount -t tmpfs -o size=4M small {small}") == 0
    try:
        said = Said()
        watch = Watch(stop="count 5 ", snapshot="count 3 ", snapshot_to=str(small / "warm"))
        outcome = app.restore(Restore(str(WARM), watch=watch), out=said.out, remark=said.remarks.append)
        assert said.counts[-1] >= 4, said.text
        assert outcome.snapshot and "No space left on device" in str(outcome.snapshot["error"])
        assert "No space left on device; the guest goes on" in said.remarks[0]
        assert list(small.iterdir()) == []
    finally:
        assert os.system(f"umount {small}") == 0


# Ends.


def vcpu_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vcpu")]


@checks
def a_guest_that_panics_ends() -> None:
    outcome, said = booted(Watch(), arguments="do=panic")
    assert outcome.why is Why.RESET, said.text
    assert b"Kernel panic" in said.text
    assert vcpu_threads() == []


@checks
def ctrl_c_ends_the_vm() -> None:
    interrupt = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    interrupt.start()
    try:
        booted(Watch())
    except KeyboardInterrupt:
        assert vcpu_threads() == []
    else:
        raise AssertionError("it went on")


@checks
def a_vcpu_that_cannot_go_on_ends_the_vm_with_where_it_was() -> None:
    before = Session.run

    def run(self: Session, stdin: int = -1) -> Outcome:
        # A pair from a device: the CPU does not say what was to be read, and KVM does not guess.
        machine = self._machine
        machine.vm.write_memory(RAM_BASE, LDP_X0_X1_FROM_X2.to_bytes(4, "little"))
        machine.vcpus[0].set_register("x2", UART_BASE)
        machine.vcpus[0].set_register("pc", RAM_BASE)
        return before(self, stdin)

    Session.run = run  # type: ignore[method-assign]
    try:
        booted(Watch())
    except KvmError as error:
        assert "vCPU 0" in str(error) and "at pc 0x40000000" in str(error), error
    else:
        raise AssertionError("it ran")
    finally:
        Session.run = before  # type: ignore[method-assign]
    assert vcpu_threads() == []


@checks
def a_state_that_was_restored_is_what_was_saved() -> None:
    """All registers and the GIC, read back before the first vCPU runs."""
    found: list[tuple[Any, Any]] = []

    def run(self: Session, stdin: int = -1) -> Outcome:
        machine = self._machine
        vcpus = [state.save_vcpu(vcpu).to_json() for vcpu in machine.vcpus]
        gic = [list(one) for one in state.save_gic(machine.vm.gic, 2, el2=False)]
        found.append((vcpus, gic))
        return self.outcome

    before = Session.run
    Session.run = run  # type: ignore[method-assign]
    try:
        restored()
    finally:
        Session.run = before  # type: ignore[method-assign]
    source = snapshot.Snapshot(WARM)
    source.close()
    (vcpus, gic) = found[0]
    for there, here in zip(source.state["vcpus"], vcpus, strict=True):
        registers = there.pop("registers")
        now = here.pop("registers")
        for one in (registers, now):
            for name in TIMER_CONTROLS:  # whether the timer has fired is not state
                one[name] = f"{int(one[name][:2], 16) & ~4:02x}{one[name][2:]}"
        differing = {name: (registers[name], now[name]) for name in now if registers[name] != now[name]}
        assert (there, {}) == (here, differing), differing
    assert [pair for pair in zip(source.state["gic"], gic, strict=True) if pair[0] != pair[1]] == []


if __name__ == "__main__":
    main(checks)
