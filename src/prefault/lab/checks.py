# SPDX-License-Identifier: Apache-2.0
"""What a series must be besides compiling: clean to checkpatch.pl --strict, and without W=1 warnings.

W=1 finds old warnings, too. A warning counts if it is about a file that the series touches and if the same
file without the series does not have it; the second is built only if the first finds something.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from prefault.errors import BuildFailed
from prefault.lab import cache, process, series
from prefault.lab.kbuild import Make
from prefault.lab.series import Series
from prefault.lab.source import Source

KVM_TARGET = "arch/arm64/kvm/"
"""Builds virt/kvm as well, and sees every header that the series may touch."""

_LOCATION = re.compile(  # the compiler's form, then that of kernel-doc
    r"(?P<file>[\w./+~-]+):(?:\d+:)+ *(?P<text>warning: .*)|"
    r"Warning: (?P<documented>[\w./+~-]+):\d+ (?P<remark>.*)"
)


def checkpatch(patches: Series, source: Source) -> None:
    """Run the tree's own checkpatch.pl over each patch.

    :raises BuildFailed: it has an error, a warning or a check to say
    """
    script = source.tree / "scripts/checkpatch.pl"
    # The series is signed off by who sends it, not by who keeps it here.
    command = ["perl", str(script), "--strict", "--no-signoff", "--show-types", "--color=never"]
    failures = []
    for patch in patches.patches:
        status, output = process.run([*command, str(patch.resolve())], cwd=source.tree)
        complaints = re.findall(r"^(?:ERROR|WARNING|CHECK):.*\n(?:#\d+:.*\n)?", output, re.MULTILINE)
        if status != 0 or complaints:
            failures.append(f"{patch.name}:\n{''.join(complaints) or output}".rstrip())
    if failures:
        raise BuildFailed("checkpatch.pl --strict objects:\n" + "\n".join(failures))


def about(output: str, files: tuple[str, ...]) -> set[tuple[str, str]]:
    """W=1 warnings about some files, as (file, text) without line numbers, which a patch moves."""
    found = set()
    for line in output.splitlines():
        match = _LOCATION.match(line)
        if match is not None:
            where = match["file"] or match["documented"]
            name = next((file for file in files if where.endswith(file)), None)
            if name is not None:
                found.add((name, match["text"] or match["remark"]))
    return found


def targets(files: tuple[str, ...]) -> tuple[str, ...]:
    """What make must build so that each touched file is compiled."""
    others = [
        f"{name.removesuffix('.c')}.o"
        for name in files
        if name.endswith(".c") and not name.startswith((KVM_TARGET, "virt/kvm/", "tools/", "samples/"))
    ]
    return (KVM_TARGET, *others)


def extra_warnings(patches: Series, source: Source, main: Make, fragment: Path) -> None:
    """Compile what the series touches with W=1.

    :raises BuildFailed: there is a warning that the base does not have
    """
    files = tuple(name for name in patches.touched() if name.endswith((".c", ".h", ".S")))
    if not files:
        return
    with_series = _w1(Make(source.tree, source.folder / "w1", main.log, main.jobs), files, fragment)
    if not with_series:
        return
    with cache.scratch_folder(source.folder) as scratch:
        series.pristine_copy(patches, source, scratch / "tree")
        base = _w1(Make(scratch / "tree", scratch / "w1", main.log, main.jobs), files, fragment)
    new = sorted(with_series - base)
    if new:
        shown = "\n".join(f"  {name}: {text}" for name, text in new)
        raise BuildFailed(f"the series brings {len(new)} warnings with W=1:\n{shown}")


def _w1(make: Make, files: tuple[str, ...], fragment: Path) -> set[tuple[str, str]]:
    # make says nothing again about what it need not compile again. So the objects are kept only if the
    # check came to its end and found nothing; the marker tells that it did not.
    unfinished = make.output / "unfinished"
    if unfinished.exists():
        shutil.rmtree(make.output)
    make.output.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    make.configure(fragment)
    existing = [name for name in targets(files) if _can_build(make.tree, name)]
    found = about(make.run("W=1", *existing), files)
    if not found:
        unfinished.unlink()
    return found


def _can_build(tree: Path, target: str) -> bool:
    return target.endswith("/") or (tree / target.removesuffix(".o")).with_suffix(".c").exists()
