# SPDX-License-Identifier: Apache-2.0
"""Which kernel the lab boots: the options, and what they come to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypedDict, TypeVar

import click

from prefault.cli.values import KernelImage
from prefault.errors import UsageError
from prefault.lab import build
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
