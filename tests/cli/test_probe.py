# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json

import pytest

from prefault.cli import probe as command
from prefault.cli.main import main
from prefault.kvm.probe import Facts, VmKind, facts

FOUND = dataclasses.replace(
    facts("/dev/null/kvm"), kvm=True, vm_kinds=(VmKind("default", True, pre_fault_memory=1),), missing=()
)


def plant(monkeypatch: pytest.MonkeyPatch, found: Facts) -> None:
    monkeypatch.setattr(command, "facts", lambda: found)


def test_a_kvm_that_can_pre_fault_is_exit_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, FOUND)
    assert main(["probe"]) == 0
    assert "KVM_CAP_PRE_FAULT_MEMORY" in capsys.readouterr().out


def test_no_kvm_is_exit_77_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, facts("/dev/null/kvm"))
    assert main(["probe"]) == 77
    printed = capsys.readouterr()
    assert "missing: /dev/null/kvm" in printed.err
    assert "page size" in printed.out


def test_json_is_one_object_whether_or_not_something_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, facts("/dev/null/kvm"))
    assert main(["probe", "--json"]) == 77
    found = json.loads(capsys.readouterr().out)
    assert (found["version"], found["command"]) == (1, "probe")
    assert found["facts"]["kvm"] is False
    assert found["facts"]["missing"]


def test_a_missing_extra_is_named_but_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, dataclasses.replace(FOUND, missing=("no nested guests",)))
    assert main(["probe"]) == 0
    assert "missing: no nested guests" in capsys.readouterr().err
