# SPDX-License-Identifier: Apache-2.0
"""A plan applied from outside to a guest of Debian's own QEMU, which must not notice."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prefault.lab import build, guestfs, programs
from prefault.lab.job import Job, JobFile, run_job

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

TROUBLE = Path(__file__).parent / "inside" / "qemu_trouble.py"
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


CHECKS = """\
head -c 4194304 /dev/urandom >/tmp/file
is="$(sha256sum </tmp/file)"
checks() {
    n=0
    while [ ! -e /tmp/enough ]; do
        n=$((n + 1))
        if [ "$(sha256sum </tmp/file)" = "$is" ]; then w=ok; else w=BAD; fi
        echo "round $n of $1 $w"
    done
}
complaints() { dmesg | grep -ciE 'stall|lockup|bug|warn|oops'; }
before=$(complaints)
echo ready
checks a & checks b &
read x
touch /tmp/enough
wait
echo "complaints $(($(complaints) - before))"
poweroff -f
"""
"""A guest whose two CPUs look all the time whether what they compute is right."""


@pytest.fixture(scope="module")
def troubles() -> Mapping[str, Any]:
    inside = example().INSIDE
    files: dict[str, JobFile] = {
        **programs.files(programs.QEMU),
        f"{inside}/Image": JobFile(build.kernel_image().read_bytes()),
        f"{inside}/initrd": JobFile(guestfs.archive(CHECKS)),
        f"{inside}/qemu_guest.py": JobFile(example().GUEST.read_bytes()),
        f"{inside}/qemu_trouble.py": JobFile(TROUBLE.read_bytes()),
    }
    result = run_job(Job(("python3", f"{inside}/qemu_trouble.py"), files, timeout=500))
    assert result.status == 0, result.stderr.decode()
    return {one["name"]: one for one in map(json.loads, result.stdout.splitlines())}


@pytest.mark.parametrize("name", ["nothing", "killed", "interrupted", "paused", "two", "stopped"])
def test_the_guest_goes_on_and_nobody_traces_it(troubles: Mapping[str, Any], name: str) -> None:
    assert troubles[name]["rounds"] >= 4
    assert troubles[name]["tracers"] == ["0"]


def test_an_interrupted_run_says_so(troubles: Mapping[str, Any]) -> None:
    assert troubles["interrupted"]["ended"] == "interrupted"
    assert troubles["interrupted"]["bytes"] > 0


def test_a_guest_that_powers_itself_off_ends_as_ever_and_that_is_told(troubles: Mapping[str, Any]) -> None:
    last = troubles["powered off"]
    assert last["said"].startswith("ProcessLost")
    assert last["status"] == 0
    assert "complaints 0" in last["console"]
    assert "BAD" not in last["console"]
