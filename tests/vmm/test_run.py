# SPDX-License-Identifier: Apache-2.0
"""Snapshots of a session, with a machine that has nothing to save."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from prefault.errors import KvmError, PrefaultError
from prefault.vmm import run, saved, state
from prefault.vmm.console import Console
from prefault.vmm.machine import Machine
from prefault.vmm.order import Watch, Why
from prefault.vmm.run import Session
from prefault.vmm.snapshot import Written


class Rests:
    """vCPU threads that only remember what was wanted of them."""

    def __init__(self, *_: object) -> None:
        self.paused = False
        self.error: PrefaultError | None = None

    def pause(self) -> None:
        self.paused = True
        if self.error:
            raise self.error

    def resume(self) -> None:
        self.paused = False


class Fixture:
    """A session whose snapshots are folders with nothing in them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.remarks: list[str] = []
        self.error: PrefaultError | None = None
        self.counters: Callable[[object], dict[int, int]] = lambda vcpu: {1: 77}
        self.restored: list[object] = []
        monkeypatch.setattr(run, "Runner", Rests)
        monkeypatch.setattr(saved, "save", self.save)
        monkeypatch.setattr(state, "save_counters", lambda vcpu: self.counters(vcpu))
        monkeypatch.setattr(state, "restore_counters", lambda vcpu, values: self.restored.append(values))
        machine = SimpleNamespace(vcpus=[None], bus=None, console=Console(lambda piece: None))
        watch = Watch(snapshot="ready", snapshot_to=str(folder))
        self.session = Session(cast(Machine, machine), watch, self.remarks.append)
        self.runner = cast(Rests, self.session._runner)

    def save(self, machine: object, folder: Path, counters: object) -> Written:
        assert self.runner.paused
        if self.error:
            raise self.error
        folder.mkdir()
        return Written(folder, 64 << 20, 1 << 20)

    def ask(self) -> Why | None:
        """As SIGUSR2 does."""
        why = self.session._snapshot()
        assert why or not self.runner.paused
        return why

    @property
    def outcome(self) -> dict[str, Any]:
        assert self.session.outcome.snapshot
        return self.session.outcome.snapshot


@pytest.fixture
def fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fixture]:
    made = Fixture(tmp_path / "warm", monkeypatch)
    yield made
    os.close(made.session._woken)
    os.close(made.session._wake)


def test_a_second_request_leaves_the_first_snapshot_what_it_is(fixture: Fixture) -> None:
    fixture.ask()
    first = dict(fixture.outcome)
    assert first["stored"] == 1 << 20
    fixture.ask()
    assert fixture.outcome == first
    assert "there already" in fixture.remarks[-1]
    assert "the guest goes on" in fixture.remarks[-1]


def test_nobody_is_stopped_for_a_snapshot_that_has_no_place(fixture: Fixture) -> None:
    fixture.folder.mkdir()
    fixture.runner.error = PrefaultError("it was stopped")
    fixture.ask()
    assert "there already" in fixture.outcome["error"]


def test_a_snapshot_after_one_that_failed_counts(fixture: Fixture) -> None:
    fixture.error = PrefaultError("the disk is full")
    fixture.ask()
    assert fixture.outcome["error"] == "the disk is full"
    fixture.error = None
    fixture.ask()
    assert "error" not in fixture.outcome


def test_the_guest_goes_on_if_it_cannot_be_stopped(fixture: Fixture) -> None:
    fixture.runner.error = PrefaultError("a vCPU did not leave the guest")
    fixture.ask()
    assert fixture.outcome["error"] == "a vCPU did not leave the guest"
    assert fixture.restored == [{}]


def test_the_guest_goes_on_if_its_counters_cannot_be_read(fixture: Fixture) -> None:
    def refuse(vcpu: object) -> dict[int, int]:
        raise KvmError("KVM_GET_ONE_REG", 5)

    fixture.counters = refuse
    fixture.ask()
    assert "KVM_GET_ONE_REG" in fixture.outcome["error"]


def test_the_guest_goes_on_if_its_counters_cannot_be_set_back(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(vcpu: object, values: object) -> None:
        raise KvmError("KVM_SET_ONE_REG", 5)

    monkeypatch.setattr(state, "restore_counters", refuse)
    fixture.ask()
    assert "error" not in fixture.outcome
    assert "sees how long it was stopped" in fixture.remarks[-1]
