# SPDX-License-Identifier: Apache-2.0
"""Skips the tests that need the lab where there is none, and says so in the last line."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from prefault.errors import PrefaultError
from prefault.lab import rootfs, tools
from prefault.lab.arch import ARM64, X86_64, Architecture
from prefault.lab.boot import bootable
from prefault.lab.doctor import make

# A shell starts what runs in the background with SIGINT ignored, and the commands that tests interrupt would
# inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# On a machine that builds kernels meanwhile, any example may take a second.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

SKIPPED = pytest.StashKey[list[str]]()


def why_no_lab(arch: Architecture = ARM64) -> str | None:
    """Why no job can run on this machine, or None if one can."""
    lacking = tools.missing(tools.run_tools(arch))
    if lacking:
        return "; ".join(f"{tool.name}: {problem}" for tool, problem in lacking.items())
    if not rootfs.archive(arch).exists():
        return f"no root file system: run `{make(arch)}`"
    try:
        bootable(arch)
    except PrefaultError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[SKIPPED] = []
    for arch in (ARM64, X86_64):
        wanted = [item for item in items if lab_of(item) is arch]
        reason = why_no_lab(arch) if wanted else None
        if reason is None:
            continue
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason=f"no lab: {reason}"))
        config.stash[SKIPPED].append(f"lab ({arch.name}): {len(wanted)} tests SKIPPED: {reason}")


def lab_of(item: pytest.Item) -> Architecture | None:
    """The lab that a test needs."""
    if item.get_closest_marker("lab_x86"):
        return X86_64
    return ARM64 if item.get_closest_marker("lab") else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist, which alone collects tests and whose output nobody sees."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["skipped"] = session.config.stash[SKIPPED]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """In the process that started the workers: each has skipped the same."""
    skipped = getattr(node, "workeroutput", {}).get("skipped")
    if skipped is not None:
        node.config.stash[SKIPPED] = skipped


def pytest_unconfigure(config: pytest.Config) -> None:
    """After pytest's own closing line, so that nobody takes skipped for passed."""
    for line in config.stash.get(SKIPPED, []):
        print(line)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for one test; where it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "prefault"
