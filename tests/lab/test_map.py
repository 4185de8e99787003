# SPDX-License-Identifier: Apache-2.0
"""The tables of the specification as text are those of the kernel, letter for letter, and can be drawn."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from prefault.kvm import stage2
from prefault.lab.job import Job, run_job
from prefault.report.map import TableMap, fitting
from prefault.scenarios.tables import TablesResult, tables
from prefault.scenarios.walk import WalkConfig
from prefault.spec import open_spec

pytestmark = pytest.mark.lab

MIB = 1 << 20
CONFIGS: list[Mapping[str, object]] = [
    {"size": 4 * MIB},
    {"size": 4 * MIB, "backing": "thp", "prefault_permille": 500},
    {"size": 4 * MIB, "backing": "hugetlb"},
    {"size": 4 * MIB, "backing": "file-private", "resident": "nothing", "when": "while-running"},
    {"size": 1 * MIB, "resident": "nothing", "write_permille": 300},
    {"size": 4 * MIB, "backing": "guest-memfd", "vcpus": 2, "prefault_permille": 250},
    {"size": 4 * MIB, "nested": True},
    {"size": 4 * MIB, "nested": True, "backing": "thp", "resident": "nothing", "when": "while-running"},
]


@pytest.fixture(scope="module")
def real() -> list[TablesResult]:
    commands = [
        f"python3 -m prefault.scenarios.tables --json {shlex.quote(json.dumps(config))}" for config in CONFIGS
    ]
    result = run_job(Job(argv=("sh", "-ec", "; ".join(commands)), timeout=300))
    assert result.status == 0, result.stderr.decode()
    return [TablesResult.from_json(json.loads(line)) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(CONFIGS)), ids=[json.dumps(config) for config in CONFIGS])
def test_the_text_is_that_of_the_kernel(real: list[TablesResult], number: int) -> None:
    with open_spec() as kvm:
        expected = tables(kvm, WalkConfig.from_json(dict(CONFIGS[number])))
    assert real[number] == expected


def test_what_is_read_back_fits_the_granule_of_the_kernel(real: list[TablesResult]) -> None:
    for result in real:
        for stage in result.stages:
            dumps = [dump for text in stage.tables for dump in stage2.read(text.splitlines())]
            assert fitting(dumps) == [result.page_size]
            for text, dump in zip(stage.tables, dumps, strict=True):
                table = TableMap("table", dump, result.page_size)
                assert stage2.parse(text) == stage2.merge(dump.leaves)
                assert sum(leaf.size for leaf in dump.leaves) == table.mapped


COPY = """
import pathlib, shutil
from prefault.kvm import open_kvm, stage2
from prefault.scenarios.walk_result import WalkConfig
from prefault.scenarios.walker import Walker

with open_kvm() as kvm, Walker(kvm, WalkConfig(4 << 20, nested=True, stride=kvm.page_size), 1000) as walker:
    for _ in walker.stages():
        pass
    (folder,) = [one for one in stage2.DEBUGFS_KVM.iterdir() if one.is_dir()]
    nested = [f"nested/{one.name}" for one in (folder / "nested").iterdir()]
    for name in ("stage2_page_tables", "ipa_range", *nested):
        copy = pathlib.Path("/tmp/vm", name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((folder / name).read_text())
"""


def test_a_vms_folder_copied_from_debugfs_is_drawn(tmp_path: Path) -> None:
    result = run_job(
        Job(("python3", "/copy_folder.py"), {"/copy_folder.py": COPY.encode()}, collect=("/tmp/vm",))
    )
    assert result.status == 0, result.stderr.decode()
    for name, data in result.files.items():
        copy = tmp_path / name.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data)
    argv = (sys.executable, "-m", "prefault", "map", "--json", str(tmp_path / "tmp/vm"))
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    (scene,) = json.loads(ended.stdout)["scenes"]
    with open_spec() as kvm:
        expected = tables(kvm, WalkConfig(4 * MIB, nested=True)).stages[-1].tables
    assert len(scene["tables"]) == len(expected) == 3
    assert (tmp_path / "tmp/vm/ipa_range").read_text().split() == [str(scene["tables"][0]["ipa_bits"])]
    leaves = [sum(leaf.size for leaf in stage2.parse(text)) for text in expected]
    assert [table["mapped_bytes"] for table in scene["tables"]] == leaves


def test_the_command_draws_tables_of_the_lab() -> None:
    argv = (sys.executable, "-m", "prefault", "map", "--machine", "lab", "--backing", "thp", "--width", "120")
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "pre-faulted: canonical MMU (4 MiB mapped)" in ended.stdout
    assert "4 MiB mapped by 2 level-2 blocks" in ended.stdout


def test_under_pkvm_the_leaves_are_drawn_and_no_tables() -> None:
    argv = (sys.executable, "-m", "prefault", "map", "--machine", "lab", "--mode", "protected", "--json")
    ended = subprocess.run(
        (*argv, "--backing", "thp"), capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    before, prefaulted, walked = (scene["tables"][0] for scene in json.loads(ended.stdout)["scenes"])
    assert [before["leaves"], prefaulted["leaves"], walked["leaves"]] == [{}, {"2": 2}, {"2": 2, "3": 1}]
    assert (walked["tables"], walked["ipa_bits"], walked["start_level"]) == (None, 48, 0)
