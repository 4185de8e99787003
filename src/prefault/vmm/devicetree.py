# SPDX-License-Identifier: Apache-2.0
"""The device tree that tells a guest what it has.

Source: Documentation/devicetree/bindings (arm/cpus.yaml, arm/psci.yaml, timer/arm,arch_timer.yaml,
interrupt-controller/arm,gic-v3.yaml, serial/pl011.yaml, chosen.yaml of dt-schema)
"""

from __future__ import annotations

import fdt

from prefault.abi import arm64
from prefault.kvm.device import GIC_DISTRIBUTOR, GIC_REDISTRIBUTORS
from prefault.vmm.config import RAM_BASE, UART_BASE, UART_SIZE, UART_SPI, GuestConfig

_SPI, _PPI = 0, 1
_LEVEL_HIGH = 4
_GIC, _CLOCK = 1, 2  # phandles
_VERSION = 17
_TIMERS = (13, 14, 11, 10, 12)
"""PPIs of the timers: secure, physical, virtual, hypervisor physical, hypervisor virtual."""
_MAINTENANCE = 9
_CLOCK_HZ = 24_000_000


def _node(name: str, *properties: fdt.Property) -> fdt.Node:
    made = fdt.Node(name)
    for one in properties:
        made.append(one)
    return made


def _words(name: str, *values: int) -> fdt.Property:
    return fdt.PropWords(name, *values)


def _pairs(name: str, *values: int) -> fdt.Property:
    """64-bit values as two cells each."""
    return fdt.PropWords(name, *(half for value in values for half in (value >> 32, value & 0xFFFF_FFFF)))


def _strings(name: str, *values: str) -> fdt.Property:
    return fdt.PropStrings(name, *values)


def _cpus(guest: GuestConfig) -> fdt.Node:
    cpus = _node("cpus", _words("#address-cells", 1), _words("#size-cells", 0))
    for number in range(guest.vcpus):
        cpus.append(
            _node(
                f"cpu@{number}",
                _strings("device_type", "cpu"),
                _strings("compatible", "arm,armv8"),
                _strings("enable-method", "psci"),
                _words("reg", number),
            )
        )
    return cpus


def _gic(guest: GuestConfig) -> fdt.Node:
    redistributors = guest.vcpus * arm64.KVM_VGIC_V3_REDIST_SIZE
    frames = (GIC_DISTRIBUTOR, arm64.KVM_VGIC_V3_DIST_SIZE, GIC_REDISTRIBUTORS, redistributors)
    return _node(
        f"interrupt-controller@{GIC_DISTRIBUTOR:x}",
        _strings("compatible", "arm,gic-v3"),
        _words("#interrupt-cells", 3),
        fdt.Property("interrupt-controller"),
        _pairs("reg", *frames),
        _words("interrupts", _PPI, _MAINTENANCE, _LEVEL_HIGH),
        _words("phandle", _GIC),
    )


def _timer(guest: GuestConfig) -> fdt.Node:
    interrupts = [cell for number in _TIMERS for cell in (_PPI, number, _LEVEL_HIGH)]
    return _node(
        "timer",
        _strings("compatible", "arm,armv8-timer"),
        _words("interrupts", *interrupts),
        fdt.Property("always-on"),
    )


def _uart() -> fdt.Node:
    return _node(
        f"serial@{UART_BASE:x}",
        _strings("compatible", "arm,pl011", "arm,primecell"),
        _pairs("reg", UART_BASE, UART_SIZE),
        _words("interrupts", _SPI, UART_SPI, _LEVEL_HIGH),
        _words("clocks", _CLOCK, _CLOCK),
        _strings("clock-names", "uartclk", "apb_pclk"),
    )


def _chosen(command_line: str, initrd: tuple[int, int] | None, seed: bytes) -> fdt.Node:
    chosen = _node(
        "chosen",
        _strings("bootargs", command_line),
        _strings("stdout-path", f"/serial@{UART_BASE:x}"),
        fdt.PropBytes("rng-seed", data=seed),
    )
    if initrd:
        chosen.append(_pairs("linux,initrd-start", initrd[0]))
        chosen.append(_pairs("linux,initrd-end", initrd[1]))
    return chosen


def build(guest: GuestConfig, command_line: str, initrd: tuple[int, int] | None, seed: bytes) -> bytes:
    """The device tree as the kernel takes it.

    :param initrd: guest physical addresses of the initial RAM disk's first byte and of its end
    :param seed: random bytes for the guest, which has no other source of them
    """
    root = _node(
        "/",
        _words("#address-cells", 2),
        _words("#size-cells", 2),
        _strings("compatible", "linux,dummy-virt"),
        _strings("model", "prefault-vmm"),
        _words("interrupt-parent", _GIC),
    )
    memory = _node(
        f"memory@{RAM_BASE:x}", _strings("device_type", "memory"), _pairs("reg", RAM_BASE, guest.memory)
    )
    # At virtual EL2, hvc is the guest's own.
    psci = _node(
        "psci",
        _strings("compatible", "arm,psci-1.0", "arm,psci-0.2"),
        _strings("method", "smc" if guest.el2 else "hvc"),
    )
    clock = _node(
        "apb-pclk",
        _strings("compatible", "fixed-clock"),
        _words("#clock-cells", 0),
        _words("clock-frequency", _CLOCK_HZ),
        _words("phandle", _CLOCK),
    )
    nodes = (_cpus(guest), memory, psci, _timer(guest), _gic(guest), clock, _uart())
    for node in (_chosen(command_line, initrd, seed), *nodes):
        root.append(node)
    tree = fdt.FDT()
    tree.root = root
    return bytes(tree.to_dtb(version=_VERSION))
