# SPDX-License-Identifier: Apache-2.0
"""Which kernel the lab boots, and how: the options, and what they come to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypedDict, TypeVar

import click

from prefault.cli.values import KernelImage, Real
from prefault.errors import UsageError
from prefault.lab import build
from prefault.lab.arch import ARCHITECTURES, ARM64, Architecture
from prefault.lab.machine import MODES
from prefault.lab.variants import VARIANTS, Variant, of

_Command = TypeVar("_Command", bound=Callable[..., object])


class KernelOptions(TypedDict):
    """What the options give."""

    kernel: Path | None
    variant: str | None


def kernel_options(command: _Command) -> _Command:
    """Give a command the options --kernel and --variant."""
    command = click.option(
        "--variant",
        type=click.Choice(list(VARIANTS)),
        help="Lab: boot this variant of the kernel; `prefault lab build --variant` makes it.",
    )(command)
    return click.option(
        "--kernel",
        type=KernelImage(),
        help="Lab: boot this arm64 Image in place of the one that was built.",
    )(command)


class ArchOptions(TypedDict):
    """What ``arch_option`` gives."""

    arch: str


def arch_option(command: _Command) -> _Command:
    """Give a command the option --arch."""
    return click.option(
        "--arch",
        type=click.Choice(list(ARCHITECTURES)),
        default=ARM64.name,
        show_default=True,
        help="Lab: the machine's architecture; x86_64 boots Debian's own kernel, as it is.",
    )(command)


def cpu_option(command: _Command) -> _Command:
    """Give a command the option --cpu."""
    return click.option(
        "--cpu",
        default="max",
        show_default=True,
        metavar="MODEL",
        help="QEMU's model of the CPU: cortex-a76 has neither FWB nor DIC, neoverse-v1 has no nested guests.",
    )(command)


def arch_of(options: ArchOptions) -> Architecture:
    """The architecture that was chosen."""
    return ARCHITECTURES[options["arch"]]


def refuse_arm64_kernels(options: KernelOptions, arch: Architecture) -> None:
    """Refuse options about arm64's kernels where another architecture is asked for.

    :raises UsageError: one was given
    """
    given = [f"--{name}" for name in ("kernel", "variant") if options[name]]
    if given and arch is not ARM64:
        raise UsageError(
            f"{' and '.join(given)}: on {arch.name} the lab boots Debian's own kernel; leave it out"
        )


def lab_options(command: _Command) -> _Command:
    """Give a command that may run in the lab the options that say how, --dry-run among them."""
    command = click.option("--dry-run", is_flag=True, help="Lab: print QEMU's command line and do nothing.")(
        command
    )
    command = kernel_options(command)
    command = click.option(
        "--timeout",
        type=Real(min=0, min_open=True),
        default=300,
        show_default=True,
        help="Lab: seconds for the whole of it.",
    )(command)
    return click.option(
        "--mode", type=click.Choice(MODES), default="nested", show_default=True, help="Lab: KVM's mode."
    )(command)


def image_of(options: KernelOptions) -> Path | None:
    """The Image to boot; None for the one that was built last.

    :raises UsageError: two are named
    :raises ToolMissing: the variant was not built
    """
    variant = options["variant"]
    if variant and options["kernel"]:
        raise UsageError(f"--kernel and --variant {variant} name two kernels: leave one out")
    return build.kernel_image(variant) if variant else options["kernel"]


def variant_of(options: KernelOptions) -> Variant:
    """What is particular to the kernel that is booted."""
    return of(options["variant"])
