# SPDX-License-Identifier: Apache-2.0
"""The kernel's own selftests of the ioctl: they pass where they can, and are skipped where they cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prefault.errors import ExitCode

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

SKIP = "1..0 # SKIP - Requirement not met: test_supports_el2()"


@pytest.mark.parametrize(("mode", "nested"), [("nested", "pass"), ("nvhe", "skip")])
def test_selftests_pass_or_say_why_they_are_skipped(mode: str, nested: str) -> None:
    command = (sys.executable, "-m", "prefault", "lab", "selftest", "--mode", mode)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == ExitCode.DONE, ended.stderr
    assert ended.stdout.splitlines() == [
        "pre_fault_memory_test: pass",
        f"arm64/nested_pre_fault_test: {nested}",
    ]
    assert (SKIP in ended.stderr) == (nested == "skip")
