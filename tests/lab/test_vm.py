# SPDX-License-Identifier: Apache-2.0
"""The VMM in the lab: the checks of tests/lab/inside/checks_vmm.py, in one boot, and the command itself."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from prefault.lab import build, guestfs
from prefault.lab.machine import MachineOptions
from tests.lab.inside.checks_vmm import IMAGE, INITRD, SCRIPT
from tests.lab.inside_job import Outcomes, judge, names, outcomes

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]


@functools.cache
def _outcomes() -> Outcomes:
    """The lab's own kernel is the guest's, too."""
    files = {IMAGE: build.kernel_image().read_bytes(), INITRD: guestfs.archive(SCRIPT)}
    return outcomes("checks_vmm", MachineOptions(memory_mib=2048), files)


@pytest.mark.parametrize("name", names("checks_vmm"))
def test_inside(name: str) -> None:
    judge(_outcomes(), name)


def prefault(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = (sys.executable, "-m", "prefault", *arguments)
    return subprocess.run(argv, capture_output=True, text=True, timeout=280, check=False)


def test_a_snapshot_is_taken_in_one_lab_and_restored_in_another(tmp_path: Path) -> None:
    initrd, warm = tmp_path / "guest.cpio", tmp_path / "warm"
    script = tmp_path / "script"
    script.write_text(
        'echo one; echo two; sleep 0.5; echo "name?"; read name; echo "hello $name"; poweroff -f\n'
    )
    assert prefault("vm", "initrd", str(initrd), "--script", str(script)).returncode == 0
    image = str(build.kernel_image())
    asked = ("--machine", "lab", "--append", "quiet", "--memory", "64M", "--initrd", str(initrd))
    take = ("--snapshot", str(warm), "--snapshot-when", "two", "--stop-after-snapshot")
    taken = prefault("vm", "boot", image, *asked, *take)
    assert taken.returncode == 0, taken.stderr
    assert "two" in taken.stdout
    shown = prefault("vm", "show", str(warm))
    assert "whole; 1 vCPUs" in shown.stdout
    back = prefault("vm", "restore", str(warm), "--machine", "lab", "--how", "map", "--type", "name?", "Ada")
    assert back.returncode == 0, back.stderr
    assert "hello Ada" in back.stdout
    assert "one" not in back.stdout


def test_a_guest_has_a_guest(tmp_path: Path) -> None:
    """This same VMM, in a Linux that it booted, boots a Linux."""
    folder = tmp_path
    image = str(build.kernel_image())
    order = {"do": "boot", "image": "/l2/Image", "initrd": "/l2/initrd", "guest": {"memory": 64 << 20}}
    texts = {
        "l2.sh": "echo hello from L2; sleep 1; echo L2 ends; poweroff -f\n",
        "l1.sh": "python3 -S -m prefault.vmm /l2/order /tmp/result; cat /tmp/result; poweroff -f\n",
        "order": json.dumps({**order, "command_line": "console=ttyAMA0 panic=-1 quiet"}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    l1, l2 = folder / "l1.cpio", folder / "l2.cpio"
    assert prefault("vm", "initrd", str(l2), "--script", str(folder / "l2.sh")).returncode == 0
    added = {"/l2/Image": image, "/l2/initrd": str(l2), "/l2/order": str(folder / "order")}
    adding = [word for inside, file in added.items() for word in ("--add", f"{inside}={file}")]
    made = prefault("vm", "initrd", str(l1), "--python", "--script", str(folder / "l1.sh"), *adding)
    assert made.returncode == 0, made.stderr
    asked = ("--machine", "lab", "--lab-memory", "3G", "--append", "quiet", "--memory", "512M")
    nested = prefault("vm", "boot", image, "--el2", "--initrd", str(l1), *asked)
    assert nested.returncode == 0, nested.stderr
    assert "hello from L2" in nested.stdout
    assert "L2 ends" in nested.stdout
    assert '"why": "shutdown"' in nested.stdout
