# SPDX-License-Identifier: Apache-2.0
"""A mutant whose kernel does not come up is caught, if the kernel says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefault.cli import mutants
from prefault.cli.main import main
from prefault.errors import ExitCode, LabLost
from prefault.lab import trial

NAME = "pkvm-shared-over-what-the-guest-has"


def lose(monkeypatch: pytest.MonkeyPatch, splats: tuple[str, ...]) -> None:
    def lost(*_: object, **__: object) -> None:
        raise LabLost("the lab's machine did not come up", splats)

    monkeypatch.setattr(trial, "image", lambda *_, **__: Path("Image"))
    monkeypatch.setattr(mutants, "judge", lost)


def test_a_kernel_that_complains_while_it_boots_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lose(monkeypatch, ("kvm [1]: nVHE hyp BUG",))
    assert main(["lab", "mutants", NAME]) == ExitCode.DONE
    assert "caught by boot" in capsys.readouterr().err


def test_a_machine_that_is_lost_without_a_word_catches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lose(monkeypatch, ())
    assert main(["lab", "mutants", NAME]) == ExitCode.LAB_LOST
