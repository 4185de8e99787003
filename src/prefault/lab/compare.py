# SPDX-License-Identifier: Apache-2.0
"""The page-at-a-time version of the ioctl: the lab's kernel with the beginning of the series only.

Its first part is the ioctl, complete, with a walk and a call of the fault handlers for each page; the rest
makes it cheap. Where the first part ends is said by the file ``page-at-a-time`` beside the series. The
Image is kept until what it was made of changes.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from prefault.errors import UsageError
from prefault.lab import build, cache, trial
from prefault.lab.progress import Progress
from prefault.lab.series import Series

_NUMBER = re.compile(r"^\d+-")
MARK = "page-at-a-time"


def first_part(whole: Series) -> Series:
    """The page-at-a-time part of a series.

    :raises UsageError: the file that says where it ends is not there, or names none of the patches
    """
    mark = whole.patches[0].parent / MARK if whole.patches else Path(MARK)
    lines = mark.read_text().splitlines() if mark.is_file() else []
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    last = _NUMBER.sub("", names[0]) if names else ""
    for count, patch in enumerate(whole.patches, 1):
        if last and _NUMBER.sub("", patch.name) == last:
            return Series(whole.patches[:count])
    raise UsageError(
        f"{mark} must name the last patch of the page-at-a-time version; it names {last or 'nothing'}, which "
        "is not in the series: mend it, or leave the comparison out (--no-compare)"
    )


def page_at_a_time(variant: str | None, progress: Progress) -> Path:
    """The Image of the page-at-a-time version, built if it is not there.

    :param variant: of the lab's kernel; None is the ordinary one
    :raises ToolMissing: the lab has no kernel to begin with
    :raises BuildFailed: it does not compile
    :raises UsageError: the series does not say where that version ends
    """
    part = first_part(trial.lab_series())
    kernel = build.current(variant)
    record = kernel.record
    parts = [part.sha256, record.identity, record.config_sha256, record.compiler]
    made_of = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    folder = kernel.folder / MARK
    made, stamp = folder / "Image", folder / "made-of"
    if made.is_file() and stamp.is_file() and stamp.read_text() == made_of:
        return made
    image = trial.image(part.patches, "the page-at-a-time version", variant=variant, progress=progress)
    stamp.unlink(missing_ok=True)
    cache.write_file(made, image.read_bytes())
    cache.write_file(stamp, made_of.encode())
    return made
