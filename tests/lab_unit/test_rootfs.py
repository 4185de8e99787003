# SPDX-License-Identifier: Apache-2.0
"""Byte code for the lab, and what a machine boots from."""

from __future__ import annotations

import importlib.util
import marshal
import py_compile
import stat
from pathlib import Path

import pytest

from prefault.lab import cpio, rootfs

SAME_PYTHON = importlib.util.MAGIC_NUMBER == rootfs.LAB_PYTHON_MAGIC
PROGRAM = """# -*- coding: latin-1 -*-
from __future__ import annotations
def f(x: int = 3) -> str:
    return f"{x} \xe9"
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A module in a folder of its own that nobody may write to."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "one.py").write_bytes(PROGRAM.encode("latin-1"))
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    return folder / "one.py"


@pytest.mark.skipif(not SAME_PYTHON, reason="this Python's byte code is not that of the lab's")
def test_byte_code_is_what_the_compiler_of_python_writes(module: Path, tmp_path: Path) -> None:
    made = rootfs.byte_code("prefault/one.py", module)
    assert made is not None
    assert made.name == "prefault/__pycache__/one.cpython-311.pyc"
    expected = tmp_path / "expected.pyc"
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(module), str(expected), "/prefault/one.py", True, invalidation_mode=mode)
    theirs = expected.read_bytes()
    assert made.data[:16] == theirs[:16]
    # Marshalled bytes depend on what else the interpreter holds references to.
    assert marshal.loads(made.data[16:]) == marshal.loads(theirs[16:])


def test_nothing_is_left_beside_the_source(module: Path) -> None:
    rootfs.byte_code("prefault/one.py", module)
    assert list(module.parent.iterdir()) == [module]


@pytest.mark.parametrize("text", ["def (", "x = '\0'", "\xff"])
def test_a_module_that_does_not_compile_has_no_byte_code(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.py").write_bytes(text.encode("latin-1"))
    assert rootfs.byte_code("bad.py", tmp_path / "bad.py") is None


def test_what_is_no_module_has_no_byte_code(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("x = 1")
    assert rootfs.byte_code("data.txt", tmp_path / "data.txt") is None


def test_a_machine_boots_from_the_root_file_system_and_what_is_put_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rest = tmp_path / "base.cpio", cpio.write([cpio.file("etc/one", b"1")])
    base.write_bytes(cpio.write([cpio.folder("etc")]))
    monkeypatch.setattr(rootfs, "base", lambda arch: base)
    rootfs.put_initrd(tmp_path / "initrd", rest)
    assert (tmp_path / "initrd").read_bytes() == base.read_bytes() + rest
    assert len(base.read_bytes()) % 4 == 0  # the kernel looks for the next archive at a multiple of 4
