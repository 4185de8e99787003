# SPDX-License-Identifier: Apache-2.0
"""Debian's own kernel: which of its modules are taken, and what is said where there is none."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from prefault.errors import LabError, ToolMissing
from prefault.lab import boot, cpio, stock
from prefault.lab.arch import X86_64


def module(name: str, *needs: str) -> bytes:
    """What there is of a module, as far as it matters here."""
    return f"\x7fELF\0name={name}\0depends={','.join(needs)}\0retpoline=Y\0".encode()


@pytest.fixture
def modules(tmp_path: Path) -> dict[str, Path]:
    """Modules as Debian has them: some need others."""
    listed = {"kvm-amd": ("kvm", "ccp"), "kvm": ("irqbypass",), "irqbypass": (), "ccp": (), "other": ()}
    for name, needs in listed.items():
        (tmp_path / f"{name}.ko.xz").write_bytes(lzma.compress(module(name, *needs)))
    return stock._modules(tmp_path)


def test_a_module_comes_after_what_it_needs_and_nothing_else_comes(modules: dict[str, Path]) -> None:
    taken = dict(stock.in_order(modules, stock.MODULES))
    assert set(taken) == {"irqbypass", "kvm", "ccp", "kvm_amd"}
    for name, needed in (("kvm", "irqbypass"), ("kvm_amd", "kvm"), ("kvm_amd", "ccp")):
        assert list(taken).index(needed) < list(taken).index(name)
    assert taken["kvm"] == module("kvm", "irqbypass")


def test_init_loads_modules_in_their_order(modules: dict[str, Path]) -> None:
    taken = dict(stock.in_order(modules, stock.MODULES))
    names = [entry.name for entry in cpio.read(stock.archive(taken)) if entry.name.endswith(".ko")]
    assert sorted(names) == names  # the shell's order
    assert [name.split("-", 1)[1].removesuffix(".ko") for name in names] == list(taken)


def test_a_kernel_without_a_module_is_refused(modules: dict[str, Path]) -> None:
    del modules["irqbypass"]
    with pytest.raises(LabError, match="no module irqbypass"):
        dict(stock.in_order(modules, stock.MODULES))


def test_modules_packed_in_an_unknown_way_are_refused(tmp_path: Path) -> None:
    (tmp_path / "kvm.ko.zst").write_bytes(b"?")
    with pytest.raises(LabError, match="packed"):
        dict(stock.in_order(stock._modules(tmp_path), ("kvm",)))


@pytest.mark.usefixtures("own_cache")
def test_where_there_is_none_the_message_says_how_to_get_one() -> None:
    with pytest.raises(ToolMissing, match="prefault lab build --arch x86_64"):
        boot.bootable(X86_64)


def test_what_is_half_there_is_not_taken_for_a_kernel(own_cache: Path) -> None:
    folder = own_cache / "stock/x86_64"
    folder.mkdir(parents=True)
    (folder / "vmlinuz").write_bytes(b"?")
    with pytest.raises(ToolMissing):
        stock.current(X86_64)


def test_a_kernel_of_ones_own_comes_without_modules(tmp_path: Path) -> None:
    assert boot.bootable(X86_64, tmp_path / "mine").modules is None
