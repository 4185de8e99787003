# SPDX-License-Identifier: Apache-2.0
"""Root file systems of guests, from a root file system of the lab that has only busybox."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefault.errors import LabError
from prefault.lab import cpio, guestfs, rootfs

BASE = cpio.write(
    [cpio.file("bin/busybox", b"busybox", 0o755), cpio.file("init", b"lab"), cpio.file("etc/x", b"")]
)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "base.cpio"
    path.write_bytes(BASE)
    monkeypatch.setattr(rootfs, "base", lambda: path)
    return path


def files(archive: bytes) -> dict[str, bytes]:
    return {entry.name: entry.data for entry in cpio.read(archive)}


def test_a_small_one_has_busybox_the_script_and_what_was_added(base: Path) -> None:
    found = files(guestfs.archive("echo hi\n", {"/a/b": b"c"}))
    assert found["bin/busybox"] == b"busybox"
    assert found["init"].endswith(b"echo hi\n")
    assert found["a/b"] == b"c"
    assert "etc/x" not in found


def test_one_with_python_is_the_labs_with_another_init_and_the_vmm(base: Path) -> None:
    made = guestfs.archive("echo hi\n", python=True)
    assert made.startswith(BASE)
    found = files(made[len(BASE) :])
    assert found["init"].endswith(b"echo hi\n")
    assert {"prefault/prefault/vmm/__main__.py", "prefault/fdt/__init__.py"} <= set(found)


def test_a_lab_without_busybox_is_told(base: Path) -> None:
    base.write_bytes(cpio.write([]))
    with pytest.raises(LabError, match="lacks bin/busybox"):
        guestfs.archive()
