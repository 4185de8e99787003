# SPDX-License-Identifier: Apache-2.0
"""The lab with Debian's own x86 kernel."""

from __future__ import annotations

import pytest

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
