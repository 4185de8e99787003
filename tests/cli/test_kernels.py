# SPDX-License-Identifier: Apache-2.0
"""Every command that boots the lab takes the same options for the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefault.cli.main import main
from prefault.errors import ExitCode

BOOTING = [
    ["run", "--machine", "lab"],
    ["map", "--machine", "lab"],
    ["conform"],
    ["lab", "run", "-m", "prefault.scenarios"],
    ["lab", "shell", "--dry-run"],
    ["lab", "selftest"],
    ["lab", "soak"],
]
EMPTY = bytes(56) + b"ARM\x64" + bytes(4)


def with_options(words: list[str], *options: str) -> list[str]:
    """The command with options, before the script if there is one."""
    at = words.index("-m") if "-m" in words else len(words)
    return [*words[:at], *options, *words[at:]]


@pytest.mark.parametrize("words", BOOTING, ids=" ".join)
def test_what_is_no_image_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vmlinux").write_bytes(b"\x7fELF" + bytes(60))
    assert main(with_options(words, "--kernel", str(tmp_path / "vmlinux"))) == ExitCode.USAGE
    assert "is not an arm64 Image" in capsys.readouterr().err


@pytest.mark.parametrize("words", BOOTING, ids=" ".join)
def test_two_kernels_are_one_too_many(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "Image").write_bytes(EMPTY)
    options = ("--kernel", str(tmp_path / "Image"), "--variant", "16k")
    assert main(with_options(words, *options)) == ExitCode.USAGE
    assert "--kernel and --variant 16k name two kernels" in capsys.readouterr().err


@pytest.mark.parametrize("words", BOOTING, ids=" ".join)
def test_a_variant_that_was_not_built_is_missing(
    words: list[str], own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(with_options(words, "--variant", "kcsan")) == ExitCode.MISSING
    assert "prefault lab build --variant kcsan" in capsys.readouterr().err
