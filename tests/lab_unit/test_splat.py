# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.lab.splat import find

CLEAN = """\
[    0.000000] Booting Linux on physical CPU 0x0000000000 [0x000f0510]
[    0.000000] Kernel command line: console=ttyAMA0 rdinit=/init loglevel=5 panic=-1 kvm-arm.mode=nested
[    0.000000] rcu: Preemptible hierarchical RCU implementation.
[    0.000000] Calibrating delay loop (skipped), value calculated using timer frequency.. 2000.00 BogoMIPS
[    0.101253] Memory: 1988700K/2097152K available (4160K kernel code, 966K rwdata, 1044K rodata)
[    0.054488] CPU features: detected: Speculative Store Bypassing Safe (SSBS)
[    0.136798] hugetlb: default page size 2.00 MiB; warnings are off, debug: no
[    0.250173] kvm [1]: VHE+NV2 mode initialized successfully
[    0.500359] Run /init as init process
[    3.204395] reboot: Power down
"""
SPLATS = (
    "WARNING: CPU: 0 PID: 63 at arch/arm64/kvm/mmu.c:1714 user_mem_abort+0x8c/0x9f0",
    "WARNING: possible circular locking dependency detected",
    "WARNING: arch/arm64/kvm/nested.c:100 at kvm_vcpu_init_nested+0x10/0x20, CPU#0: python3/63",
    "BUG: KASAN: slab-use-after-free in kvm_handle_guest_abort+0x1c/0x40",
    "BUG: KCSAN: data-race in kvm_mmu_notifier / kvm_pre_fault",
    "UBSAN: shift-out-of-bounds in arch/arm64/kvm/hyp/pgtable.c:77:10",
    "kernel BUG at arch/arm64/kvm/hyp/pgtable.c:1004!",
    "BUG: sleeping function called from invalid context at mm/gup.c:2123",
    "BUG: scheduling while atomic: python3/63/0x00000002",
    "BUG: soft lockup - CPU#1 stuck for 26s! [python3:63]",
    "INFO: task python3:63 blocked for more than 120 seconds.",
    "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
    "rcu: INFO: rcu_preempt self-detected stall on CPU",
    "Unable to handle kernel NULL pointer dereference at virtual address 0000000000000008",
    "Internal error: Oops: 0000000096000004 [#1]  SMP",
    "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000000",
    "list_add corruption. next->prev should be prev (ffff0000), but was ffff0001.",
    "refcount_t: underflow; use-after-free.",
    "Call trace:",
    "BUG: Bad page state in process python3  pfn:4a2b3",
)


def test_a_clean_boot_has_no_splat() -> None:
    assert find(CLEAN) == ()


@pytest.mark.parametrize("splat", SPLATS)
def test_a_splat_is_found_and_its_stamp_taken_off(splat: str) -> None:
    assert find(f"{CLEAN}[   12.345678] {splat}\n") == (splat,)
    assert find(f"[   12.345678][   T63] {splat}\n") == (splat,)


@given(st.lists(st.sampled_from((*SPLATS, *CLEAN.splitlines()))))
def test_splats_and_only_they_are_found_in_any_order(lines: list[str]) -> None:
    log = "\n".join(line if line.startswith("[") else f"[    1.000000] {line}" for line in lines)
    assert find(log) == tuple(line for line in lines if line in SPLATS)
