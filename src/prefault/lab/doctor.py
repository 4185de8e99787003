# SPDX-License-Identifier: Apache-2.0
"""What the lab has on this machine, what it lacks, and how to get that."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from prefault.errors import Missing, PrefaultError
from prefault.lab import build, cache, rootfs, stock, tools
from prefault.lab.arch import ARM64, Architecture

_FIRST_BUILD_MIB = 4000
"""What a first build takes at its peak."""


def make(arch: Architecture = ARM64) -> str:
    """The command that makes the lab of an architecture."""
    return "prefault lab build" if arch is ARM64 else f"prefault lab build --arch {arch.name}"


def install(arch: Architecture = ARM64) -> str:
    """The same, and it may install what it needs."""
    return f"{make(arch)} --yes"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    present: bool
    needed_to: str
    """``run`` or ``build``."""
    detail: str
    remedy: str = ""


def _tool(tool: tools.Tool, problem: str | None, needed_to: str, arch: Architecture) -> Finding:
    remedy = f"{install(arch)} (package {', '.join(tool.packages)})" if problem else ""
    detail = problem or tool.why
    if tool.name == arch.qemu and problem is None:
        detail = f"version {tools.qemu_version(arch)}"
    return Finding(tool.name, problem is None, needed_to, detail, remedy)


def _stock(arch: Architecture) -> Finding:
    try:
        record = stock.current(arch).record
    except Missing as error:
        return Finding("kernel", False, "run", str(error).partition(":")[0], make(arch))
    return Finding("kernel", True, "run", f"Debian's own {record.version}, as it is")


def _kernel() -> Finding:
    try:
        built = build.current()
    except Missing as error:
        return Finding("kernel", False, "run", str(error).partition(":")[0], make())
    record = built.record
    try:
        recipe = build.recipe_for(record.version)
    except PrefaultError as error:
        return Finding("kernel", True, "run", f"{record.version}; {error}")
    if recipe.series.sha256 != record.series_sha256:
        return Finding(
            "kernel", True, "run", f"{record.version}, of another series than the one here", make()
        )
    return Finding("kernel", True, "run", f"{record.version} with {len(record.series)} patches")


def _root_file_system(arch: Architecture) -> Finding:
    archive = rootfs.archive(arch)
    if archive.exists():
        size = archive.stat().st_size >> 20
        return Finding("root file system", True, "run", f"Debian {rootfs.SUITE} {arch.debian}, {size} MiB")
    return Finding("root file system", False, "run", "not made yet", make(arch))


def _space() -> Finding:
    existing = cache.root()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free >> 20
    enough = free >= _FIRST_BUILD_MIB or (cache.root() / "kernel/current").exists()
    remedy = "" if enough else "free some, or set XDG_CACHE_HOME to a bigger file system"
    return Finding("disk space", enough, "build", f"{free} MiB free for {cache.root()}", remedy)


def examine(arch: Architecture = ARM64) -> tuple[Finding, ...]:
    """Look at everything that the lab of an architecture needs; nothing is changed."""
    lacking = tools.missing(tools.needed_for(arch))
    found = [_tool(tool, lacking.get(tool), "run", arch) for tool in tools.run_tools(arch)]
    found += [_stock(arch) if arch.stock else _kernel(), _root_file_system(arch)]
    if arch.stock:
        return tuple(found)
    found += [_tool(tool, lacking.get(tool), "build", arch) for tool in tools.BUILD_TOOLS]
    return (*found, _space())


def can_run(findings: tuple[Finding, ...]) -> bool:
    """Whether a job can run now."""
    return all(finding.present for finding in findings if finding.needed_to == "run")
