# SPDX-License-Identifier: Apache-2.0
"""The lab with Debian's own x86 kernel."""

from __future__ import annotations

import json

import pytest

from prefault.cli.main import main
from prefault.conform import peers
from prefault.errors import ExitCode
from prefault.lab.arch import X86_64
from prefault.lab.job import Job, run_job
from prefault.lab.machine import MachineOptions

pytestmark = [pytest.mark.lab, pytest.mark.lab_x86, pytest.mark.timeout(300)]

FACTS = """
import os, platform
assert platform.machine() == "x86_64"
assert open("/sys/module/kvm_amd/parameters/npt").read().strip() == "Y"
assert os.path.isdir("/sys/kernel/tracing/events/kvm/kvm_page_fault")
os.close(os.open("/dev/kvm", os.O_RDWR))
"""


def test_debians_kernel_has_kvm_with_nested_paging() -> None:
    done = run_job(Job(("python3", "-c", FACTS)), MachineOptions(arch=X86_64))
    assert (done.status, done.stderr) == (0, b"")


ABI = (
    "bad_ranges_are_einval",
    "no_memslot_is_enoent_at_any_ipa",
    "deleted_slot_is_enoent",
    "memory_*_efault",
    "range_*",
    "capability_is_reported_where_it_works",
    "vcpu_that_never_ran_can_prefault",
    "pending_device_read_survives",
    "registers_do_not_change",
    "read_only_slots_are_mapped_read_only",
    "a_signal_ends_the_wait_with_progress_or_eintr",
    "a_slot_that_is_going_away_is_eagain",
    "prefaulted_memory_costs_the_guest_no_fault",
    "what_is_not_prefaulted_still_faults",
    "vcpu_that_never_ran_can_prefault_beside_one_that_did",
)
"""Scenarios about the ABI; the last has a case for arm64 alone."""


def test_the_abi_is_ours_but_for_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    differing = [name for entry in peers.X86_64 if not entry.hangs for name in entry.scenarios]
    assert main(["conform", "--arch", "x86_64", "--json", *ABI, *differing]) == ExitCode.DONE
    found = json.loads(capsys.readouterr().out)
    verdicts = {one["name"]: one["verdict"] for one in found["scenarios"]}
    known = {name for name, verdict in verdicts.items() if verdict == "known"}
    assert {name.partition("[")[0] for name in known} == set(differing)
    assert [name for name, verdict in verdicts.items() if verdict == "skipped"] == [
        "vcpu_that_never_ran_can_prefault_beside_one_that_did[True]"
    ]
    assert found["counts"]["equal"] > 40
