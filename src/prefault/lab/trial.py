# SPDX-License-Identifier: Apache-2.0
"""Kernels for one trial: the lab's source with other patches than the whole series, or with more.

They are built in the lab's own tree, so that only what differs is compiled; the tree is brought back after
each one, and the lab's own kernel is not touched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from prefault.lab import build, cache, kbuild, series, source
from prefault.lab.kbuild import Make
from prefault.lab.progress import Progress, Silent
from prefault.lab.series import Series


def lab_series() -> Series:
    """The series of the lab's kernel."""
    return build.recipe_for(source.version_of(source.packaged().tree)).series


def image(
    patches: Sequence[Path],
    name: str,
    *,
    variant: str | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Build the base with some patches.

    :param name: for the progress
    :param variant: the variant of the lab's kernel to build; None is the ordinary one
    :param strict: take warnings for errors
    :returns: its Image, which the next call replaces
    :raises ToolMissing: the lab has no kernel to begin with
    :raises BuildFailed: a patch does not apply, or the kernel does not compile
    """
    progress = progress or Silent()
    folder = build.current(variant).folder
    with cache.locked("kernel"):
        origin = source.packaged()
        make = Make(origin.tree, folder / "build", folder / "trial.log", os.cpu_count() or 1)
        try:
            progress.stage(f"compiling {name}")
            series.apply(Series(tuple(patches)), origin)
            output = make.run("Image", on_step=progress.step)
            if strict:
                kbuild.fail_on_warnings(output, make.tree, f"compiling {name}")
            made = folder / "trial-Image"
            cache.write_file(made, (make.output / "arch/arm64/boot/Image").read_bytes())
        finally:
            series.apply(lab_series(), origin)
    return made
