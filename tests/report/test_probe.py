# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from prefault.kvm.probe import Facts, VmKind
from prefault.report.probe import can_pre_fault, probe_tables

BARE = Facts(
    machine="x86_64",
    kernel="6.1.0",
    page_size=4096,
    kvm=False,
    kvm_error="/dev/kvm cannot be opened",
    guests=False,
    api_version=0,
    pre_fault_memory=0,
    ipa_limit=0,
    nested=False,
    nested_e2h0=False,
    mmio_sign_extends=False,
    access_flag_by_hardware=False,
    executable_at_once=False,
    vm_kinds=(),
    thp="",
    thp_size=0,
    hugetlb={},
    memfd=True,
    userfaultfd=False,
    stage2_tables=False,
    fault_tracing=False,
)
ABLE = dataclasses.replace(
    BARE,
    machine="aarch64",
    kvm=True,
    guests=True,
    pre_fault_memory=1,
    ipa_limit=48,
    nested=True,
    vm_kinds=(
        VmKind("default", True, pre_fault_memory=1, guest_memfd=1, guest_memfd_flags=3, max_vcpus=512),
        VmKind("protected", False, why_not="Invalid argument"),
    ),
    hugetlb={2 << 20: 7},
)


def text(found: Facts) -> str:
    printed = io.StringIO()
    console = Console(file=printed, width=100)
    for table in probe_tables(found):
        console.print(table)
    return printed.getvalue()


def test_a_host_without_kvm_has_no_table_about_kvm() -> None:
    assert "/dev/kvm" in text(BARE)
    assert "IPA limit" not in text(BARE)
    assert not can_pre_fault(BARE)


def test_each_kind_of_vm_has_its_own_answer() -> None:
    shown = text(ABLE)
    assert "48 bits" in shown
    assert "2 MiB: 7 free" in shown
    assert "no: Invalid argument" in shown
    assert can_pre_fault(ABLE)


def test_the_system_capability_alone_is_not_enough() -> None:
    # In protected mode /dev/kvm may report what no VM has.
    kinds = (dataclasses.replace(ABLE.vm_kinds[0], pre_fault_memory=0),)
    assert not can_pre_fault(dataclasses.replace(ABLE, vm_kinds=kinds))
