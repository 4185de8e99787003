# SPDX-License-Identifier: Apache-2.0
"""The import rules of the folders, read from the source, not from what happens to be imported."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import prefault
from prefault.lab import payload

ROOT = Path(prefault.__file__).parent
INSIDE_THE_LAB = (
    *("abi", "kvm", "guest", "scenarios", "soak", "bench", "vmm", "machine", "errors", "inject"),
    *("faults/__init__", "faults/capture", "faults/captured", "faults/foreign", "faults/plan"),
)
CARRIED = {"fdt"}
"""Pure-Python libraries that the lab's payload carries."""
FORBIDDEN = {
    "abi": {"*"},
    "spec": {"kvm", "lab"},
    "guest": {"kvm", "lab", "spec", "cli", "report"},
    "kvm": {"lab", "spec", "cli", "report", "scenarios", "vmm"},
    "vmm": {"lab", "spec", "cli", "report", "scenarios", "conform", "soak"},
    "conform": {"cli"},
    "inject": {"lab", "spec", "cli", "report", "scenarios", "conform", "vmm"},
    "faults": {"lab", "spec", "cli", "scenarios", "conform"},
    "machine": {"kvm", "lab", "spec", "cli", "report", "scenarios"},
}
"""Part of the project → parts that it must not import."""


def _imports(file: Path) -> set[str]:
    """Absolute names of the modules that a file imports, in whatever function."""
    package = ["prefault", *file.relative_to(ROOT).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def _part(module: str) -> str | None:
    """The part of the project that a module is in; None if it is in none."""
    names = module.split(".")
    return names[1] if names[0] == "prefault" and len(names) > 1 else None


def _files(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py")) or [file for file in [ROOT / f"{part}.py"] if file.exists()]


def _cases(parts: tuple[str, ...]) -> list[Path]:
    return [file for part in parts for file in _files(part)]


@pytest.mark.parametrize("file", _cases(INSIDE_THE_LAB), ids=lambda file: str(file.relative_to(ROOT)))
def test_what_runs_inside_the_lab_needs_the_standard_library_only(file: Path) -> None:
    outside = {name.split(".")[0] for name in _imports(file)} - {"prefault", ""}
    assert outside <= sys.stdlib_module_names | CARRIED


@pytest.mark.parametrize("file", _cases(INSIDE_THE_LAB), ids=lambda file: str(file.relative_to(ROOT)))
def test_what_runs_inside_the_lab_imports_nothing_that_does_not(file: Path) -> None:
    parts = {_part(name) for name in _imports(file)} - {None}
    assert not parts & {"cli", "lab", "report"}


def test_what_runs_inside_the_lab_is_carried_there() -> None:
    carried = {entry.name.partition("/")[2] for entry in payload.package()}
    missing = {
        name
        for file in _cases(INSIDE_THE_LAB)
        for name in _imports(file)
        if (ROOT.parent / (path := f"{name.replace('.', '/')}.py")).exists() and path not in carried
    }
    assert missing == set()


@pytest.mark.parametrize("file", _cases(tuple(FORBIDDEN)), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_part_does_not_reach_into_what_is_above_it(file: Path) -> None:
    part = file.relative_to(ROOT).parts[0].removesuffix(".py")
    imported = {_part(name) for name in _imports(file)} - {None, part}
    forbidden = FORBIDDEN[part]
    assert not (imported if "*" in forbidden else imported & forbidden)


def test_relative_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "spec" / "one.py"
    file.parent.mkdir()
    file.write_text("from . import two\nfrom ..kvm import vm\nimport os\n")
    assert {"prefault.spec.two", "prefault.kvm.vm", "os"} <= _imports(file)
