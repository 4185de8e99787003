# SPDX-License-Identifier: Apache-2.0
"""Skips the tests that need the lab where there is none, and says so in the last line."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import settings

from prefault.errors import PrefaultError
from prefault.lab import build, rootfs, tools

# A shell starts what runs in the background with SIGINT ignored, and the commands that tests interrupt would
# inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# On a machine that builds kernels meanwhile, any example may take a second.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

SKIPPED = pytest.StashKey[tuple[int, str]]()


def why_no_lab() -> str | None:
    """Why no job can run on this machine, or None if one can."""
    lacking = tools.missing(tools.RUN_TOOLS)
    if lacking:
        return "; ".join(f"{tool.name}: {problem}" for tool, problem in lacking.items())
    if not rootfs.archive().exists():
        return "no root file system: run `prefault lab build`"
    try:
        build.kernel_image()
    except PrefaultError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = [item for item in items if item.get_closest_marker("lab")]
    reason = why_no_lab() if wanted else None
    if reason is None:
        return
    for item in wanted:
        item.add_marker(pytest.mark.skip(reason=f"no lab: {reason}"))
    config.stash[SKIPPED] = (len(wanted), reason)


def pytest_unconfigure(config: pytest.Config) -> None:
    """After pytest's own closing line, so that nobody takes skipped for passed."""
    found = config.stash.get(SKIPPED, None)
    if found is not None:
        count, reason = found
        print(f"lab: {count} tests SKIPPED: {reason}")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for one test; where it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "prefault"
