# SPDX-License-Identifier: Apache-2.0
"""The kernel that the lab boots."""

from __future__ import annotations

import os
from pathlib import Path

from prefault.errors import ToolMissing, UsageError


def kernel_image() -> Path:
    """The Image to boot: $PREFAULT_LAB_KERNEL, or what `prefault lab build` made."""
    override = os.environ.get("PREFAULT_LAB_KERNEL")
    if override:
        if not Path(override).is_file():
            raise UsageError(f"PREFAULT_LAB_KERNEL={override}: no such file")
        return Path(override)
    raise ToolMissing("the lab has no kernel yet: run `prefault lab build`")
