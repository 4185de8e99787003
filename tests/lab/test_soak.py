# SPDX-License-Identifier: Apache-2.0
"""Whatever goes on at once with a pre-fault, every byte and every leaf is right afterwards (M12)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefault.cli.main import main

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]


def test_every_byte_and_leaf_is_right_after_a_soak(capsys: pytest.CaptureFixture[str]) -> None:
    # With the check for an invalidation taken out of the kernel, the first round fails.
    status = main(["lab", "soak", "--minutes", "0.5", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["wrong"], found["splats"], found["problem"]) == ([], [], "")
    assert status == 0
    assert found["operations"]["pre-fault: done"] > 200, f"too few to mean anything: {found['operations']}"
    assert found["operations"]["MADV_DONTNEED"] > 50, f"too few to mean anything: {found['operations']}"


def test_a_kernel_that_is_none_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "Image").write_bytes(b"no kernel")
    assert main(["lab", "soak", "--kernel", str(tmp_path / "Image")]) == 2
