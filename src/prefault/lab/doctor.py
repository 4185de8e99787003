# SPDX-License-Identifier: Apache-2.0
"""What the lab has on this machine, what it lacks, and how to get that."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from prefault.errors import Missing, PrefaultError
from prefault.lab import build, cache, rootfs, tools
from prefault.lab.machine import QEMU

_BUILD = "prefault lab build"
_INSTALL = "prefault lab build --yes"
_FIRST_BUILD_MIB = 4000
"""What a first build takes at its peak."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    present: bool
    needed_to: str
    """``run`` or ``build``."""
    detail: str
    remedy: str = ""


def _tool(tool: tools.Tool, problem: str | None, needed_to: str) -> Finding:
    remedy = f"{_INSTALL} (package {', '.join(tool.packages)})" if problem else ""
    detail = problem or tool.why
    if tool.name == QEMU and problem is None:
        detail = f"version {tools.qemu_version()}"
    return Finding(tool.name, problem is None, needed_to, detail, remedy)


def _kernel() -> Finding:
    try:
        built = build.current()
    except Missing as error:
        return Finding("kernel", False, "run", str(error).partition(":")[0], _BUILD)
    record = built.record
    try:
        recipe = build.recipe_for(record.version)
    except PrefaultError as error:
        return Finding("kernel", True, "run", f"{record.version}; {error}")
    if recipe.series.sha256 != record.series_sha256:
        return Finding(
            "kernel", True, "run", f"{record.version}, of another series than the one here", _BUILD
        )
    return Finding("kernel", True, "run", f"{record.version} with {len(record.series)} patches")


def _root_file_system() -> Finding:
    archive = rootfs.archive()
    if archive.exists():
        size = archive.stat().st_size >> 20
        return Finding("root file system", True, "run", f"Debian {rootfs.SUITE} arm64, {size} MiB")
    return Finding("root file system", False, "run", "not made yet", _BUILD)


def _space() -> Finding:
    existing = cache.root()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free >> 20
    enough = free >= _FIRST_BUILD_MIB or (cache.root() / "kernel/current").exists()
    remedy = "" if enough else "free some, or set XDG_CACHE_HOME to a bigger file system"
    return Finding("disk space", enough, "build", f"{free} MiB free for {cache.root()}", remedy)


def examine() -> tuple[Finding, ...]:
    """Look at everything; nothing is changed."""
    lacking = tools.missing()
    found = [_tool(tool, lacking.get(tool), "run") for tool in tools.RUN_TOOLS]
    found += [_kernel(), _root_file_system()]
    found += [_tool(tool, lacking.get(tool), "build") for tool in tools.BUILD_TOOLS]
    return (*found, _space())


def can_run(findings: tuple[Finding, ...]) -> bool:
    """Whether a job can run now."""
    return all(finding.present for finding in findings if finding.needed_to == "run")
