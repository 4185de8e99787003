# SPDX-License-Identifier: Apache-2.0
"""The device tree, read back with the library's own parser."""

from __future__ import annotations

import fdt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.vmm import devicetree
from prefault.vmm.config import MAX_MEMORY, MAX_VCPUS, MIB, RAM_BASE, UART_BASE, GuestConfig


def built(guest: GuestConfig, initrd: tuple[int, int] | None = None, line: str = "quiet") -> fdt.FDT:
    return fdt.parse_dtb(devicetree.build(guest, line, initrd, b"seed"))


def words(tree: fdt.FDT, path: str, name: str) -> list[int]:
    return list(tree.get_property(name, path).data)


@given(st.integers(1, MAX_VCPUS), st.integers(8, MAX_MEMORY // (2 * MIB)))
def test_the_guest_is_told_what_it_has(vcpus: int, double_mib: int) -> None:
    memory = double_mib * 2 * MIB
    tree = built(GuestConfig(memory=memory, vcpus=vcpus))
    assert words(tree, f"/memory@{RAM_BASE:x}", "reg") == [0, RAM_BASE, memory >> 32, memory & 0xFFFF_FFFF]
    cpus = [node for node in tree.get_node("/cpus").nodes if node.name.startswith("cpu@")]
    assert [node.get_property("reg").value for node in cpus] == list(range(vcpus))
    assert {node.get_property("enable-method").value for node in cpus} == {"psci"}


def test_redistributors_of_all_vcpus_are_in_the_gics_frame() -> None:
    for vcpus in range(1, MAX_VCPUS + 1):
        reg = words(built(GuestConfig(vcpus=vcpus)), "/interrupt-controller@8000000", "reg")
        assert reg[-1] == vcpus * 0x2_0000


@pytest.mark.parametrize(("el2", "method"), [(False, "hvc"), (True, "smc")])
def test_psci_is_called_by_what_reaches_kvm(el2: bool, method: str) -> None:
    assert built(GuestConfig(el2=el2)).get_property("method", "/psci").value == method


def test_the_initial_ram_disk_is_named_only_if_there_is_one() -> None:
    assert not built(GuestConfig()).exist_property("linux,initrd-start", "/chosen")
    tree = built(GuestConfig(), (0x1_4000_0000, 0x1_4000_1000))
    assert words(tree, "/chosen", "linux,initrd-start") == [1, 0x4000_0000]
    assert words(tree, "/chosen", "linux,initrd-end") == [1, 0x4000_1000]


def test_the_command_line_and_the_console_are_there() -> None:
    tree = built(GuestConfig(), line="console=ttyAMA0 panic=-1 quiet")
    assert tree.get_property("bootargs", "/chosen").value == "console=ttyAMA0 panic=-1 quiet"
    assert tree.exist_node(tree.get_property("stdout-path", "/chosen").value)
    assert words(tree, f"/serial@{UART_BASE:x}", "reg") == [0, UART_BASE, 0, 0x1000]
