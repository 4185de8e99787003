# SPDX-License-Identifier: Apache-2.0
"""A plan applied from outside to a guest of Debian's own QEMU, which must not notice."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "qemu.py"


def example() -> ModuleType:
    """The example, as a module."""
    spec = importlib.util.spec_from_file_location("qemu_example", EXAMPLE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> Mapping[str, Any]:
    _, found = example().run()
    return dict(found)


def total(row: Mapping[str, Any]) -> int:
    """Its stage-2 faults."""
    return sum(row["faults"][kind] for kind in ("read", "write", "execute"))


@pytest.mark.parametrize("name", ["nothing", "paused", "running"])
def test_the_guest_computes_what_it_must_and_complains_of_nothing(rows: Mapping[str, Any], name: str) -> None:
    said = example().fields(rows[name]["said"])
    assert said["hash"] == said["was"]
    assert said["counts"].split() == ["20000", "20000"]
    assert said["complaints"] == "0"
    assert rows[name]["status"] == "running"


def test_a_guest_that_is_pre_faulted_before_it_goes_on_takes_few_faults(rows: Mapping[str, Any]) -> None:
    assert total(rows["nothing"]) > 6000
    assert total(rows["paused"]) < total(rows["nothing"]) / 10
    assert rows["paused"]["faults"]["read"] < 50


def test_a_guest_that_is_pre_faulted_while_it_works_takes_fewer(rows: Mapping[str, Any]) -> None:
    assert total(rows["running"]) < total(rows["nothing"])


@pytest.mark.parametrize(("name", "when"), [("paused", "before"), ("running", "during")])
def test_all_of_the_plan_is_done_by_both_vcpus(rows: Mapping[str, Any], name: str, when: str) -> None:
    done = rows[name][when]
    assert (done["bytes"], done["failed"], done["ended"]) == (done["size"], [], "done")
    assert all(one["bytes"] > 0 for one in done["vcpus"])
    assert [one["index"] for one in done["vcpus"]] == [0, 1]
