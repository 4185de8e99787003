# SPDX-License-Identifier: Apache-2.0
"""``prefault map`` on the specification and on files."""

from __future__ import annotations

import errno
import io
import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from prefault.cli import map as command
from prefault.cli.main import main
from prefault.errors import ExitCode, KvmMissing
from prefault.kvm import stage2
from prefault.lab.job import Job, JobResult
from prefault.lab.machine import MachineOptions
from prefault.scenarios.tables import tables
from prefault.scenarios.walk import WalkConfig, read_config
from prefault.spec import open_spec

EMPTY = "---[ Guest IPA ]---\n0x0000000000000000-0x0000001000000000          64G 1\n"
ONE_PAGE = """---[ Guest IPA ]---
0x0000000000000000-0x0000000040000000           1G 1
0x0000000040000000-0x0000000040001000           4K 3   R W px ux  AF
0x0000000040001000-0x0000000040200000        2044K 3
0x0000000040200000-0x0000000080000000        1022M 2
0x0000000080000000-0x0000001000000000          62G 1
"""
SHADOW = "VTCR: 0x0000000080023559 VTTBR: 0x000a000040002000 s2: enabled\n" + ONE_PAGE


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A dump with nothing, and one with a page."""
    for name, text in (("before", EMPTY), ("after", ONE_PAGE)):
        (tmp_path / name).write_text(text)
    return str(tmp_path / "before"), str(tmp_path / "after")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A VM's folder as in debugfs, with one shadow table in use of three."""
    vm = tmp_path / "4711-5"
    (vm / "nested").mkdir(parents=True)
    (vm / "stage2_page_tables").write_text(ONE_PAGE)
    (vm / "nested/nested_mmu0").write_text("")
    (vm / "nested/nested_mmu10").write_text(SHADOW)
    (vm / "nested/nested_mmu9").write_text(SHADOW.replace("0x000a", "0x000b"))
    return vm


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["map", *words]) == 0
    return capsys.readouterr().out


def found(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    text = shown(capsys, "--json", *words)
    read = json.loads(text)
    assert isinstance(read, dict)
    assert (read["version"], read["command"]) == (1, "map")
    return read


def test_without_arguments_a_small_vm_is_drawn_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys)
    assert text.index("before: canonical MMU") < text.index("pre-faulted: canonical MMU (4 MiB mapped)")
    assert "4 MiB mapped by 1,024 pages" in text
    assert "On the real kernel: prefault map --machine lab" in text


def test_the_options_are_those_of_run(capsys: pytest.CaptureFixture[str]) -> None:
    scenes = found(capsys, "--backing", "thp", "--nested", "--prefault", "50", "--size", "8M")["scenes"]
    assert [scene["name"] for scene in scenes] == ["before", "pre-faulted", "walked by L2", "walked"]
    assert [table["leaves"] for table in scenes[1]["tables"]] == [{"2": 2}]
    names = [table["name"] for table in scenes[-1]["tables"]]
    assert names == ["canonical MMU", "shadow MMU 0", "shadow MMU 1"]
    assert [table["shadow"] is None for table in scenes[-1]["tables"]] == [True, False, False]


def test_json_has_every_run(capsys: pytest.CaptureFixture[str], files: tuple[str, str]) -> None:
    (table,) = found(capsys, files[1])["scenes"][0]["tables"]
    runs = table["runs"]
    assert [run["leaves"] for run in runs] == [0, 1, 0, 0, 0]
    assert runs[1] == {
        **dict.fromkeys(("readable", "writable", "px", "ux", "accessed"), True),
        "ipa": 0x4000_0000,
        "size": 0x1000,
        "level": 3,
        "leaves": 1,
        "block": False,
    }
    assert (table["page_size"], table["ipa_bits"], table["tables"]) == (4096, 36, {"1": 1, "2": 1, "3": 1})


def test_a_file_is_drawn_under_its_name(capsys: pytest.CaptureFixture[str], files: tuple[str, str]) -> None:
    text = shown(capsys, files[1])
    assert text.splitlines()[1] == files[1]
    assert "4 KiB mapped by 1 page" in text


def test_standard_input_may_hold_several_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(ONE_PAGE + SHADOW))
    (scene,) = found(capsys, "-")["scenes"]
    assert [table["name"] for table in scene["tables"]] == ["table", "table 1"]
    assert scene["tables"][1]["shadow"] == {"vttbr": 0xA_0000_4000_2000, "vtcr": 0x8002_3559, "enabled": True}


def test_a_folder_gives_the_vms_tables_in_order(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (scene,) = found(capsys, str(folder))["scenes"]
    assert [table["name"] for table in scene["tables"]] == [
        "stage2_page_tables",
        "nested_mmu9",
        "nested_mmu10",
    ]


def test_a_process_is_looked_up_in_debugfs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(stage2, "DEBUGFS_KVM", folder.parent)
    assert "4711-5: nested_mmu9, VTTBR 0xb000040002000" in shown(capsys, "--pid", "4711")
    assert main(["map", "--pid", "471"]) == ExitCode.USAGE
    assert "process 471 has no VM on this host; these have: 4711" in capsys.readouterr().err
    (folder / "stage2_page_tables").unlink()
    assert main(["map", "--pid", "4711"]) == ExitCode.MISSING
    assert "CONFIG_PTDUMP_STAGE2_DEBUGFS" in capsys.readouterr().err
    monkeypatch.setattr(stage2, "DEBUGFS_KVM", folder / "none")
    assert main(["map", "--pid", "4711"]) == ExitCode.MISSING


@pytest.mark.parametrize(("granule", "block"), [("4K", "2 MiB"), ("16K", "32 MiB"), ("64K", "512 MiB")])
def test_the_host_of_the_specification_has_any_granule(
    capsys: pytest.CaptureFixture[str], granule: str, block: str
) -> None:
    words = ("--page-size", granule, "--backing", "thp", "--size", block.replace(" ", ""), "--width", "120")
    assert f"{block} mapped by 1 level-2 block" in shown(capsys, *words)


def test_a_diff_says_what_changed(capsys: pytest.CaptureFixture[str], files: tuple[str, str]) -> None:
    text = shown(capsys, "--diff", *files, "--width", "240")
    assert f"{files[0]} to {files[1]} (4 KiB mapped)" in text
    assert "+  0x0000_4000_0000-0x0000_4000_1000  4 KiB  hole  page RWX" in text
    (difference,) = found(capsys, "--diff", *files)["changes"]
    (change,) = difference["changes"]
    assert (change["ipa"], change["before"], change["after"]["level"]) == (0x4000_0000, None, 3)


def test_a_diff_without_files_is_from_moment_to_moment(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--diff")
    assert "before to pre-faulted: canonical MMU (4 MiB mapped)" in text
    assert "1,024 × page RWX" in text
    changes = found(capsys, "--diff", "--nested")["changes"]
    assert [one["table"] for one in changes].count("canonical MMU") == 3
    assert {one["table"] for one in changes} == {"canonical MMU", "shadow MMU 0", "shadow MMU 1"}


def test_all_lists_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--resident", "nothing", "--size", "256K")
    assert len(shown(capsys, *words, "--all").splitlines()) > len(shown(capsys, *words).splitlines()) + 50


def test_the_picture_is_whole_or_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    picture = tmp_path / "map.svg"
    shown(capsys, "--svg", str(picture))
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    before = picture.read_bytes()

    def full(path: Path, text: str) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["map", "--svg", str(picture)]) == ExitCode.OPERATING_ERROR
    assert f"No space left on device: {picture}" in capsys.readouterr().err
    assert picture.read_bytes() == before
    assert list(tmp_path.iterdir()) == [picture]


def test_the_picture_in_the_docs_is_what_the_command_in_the_docs_draws(tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs"
    match = re.search(r"This is from `prefault (map .*) --svg map.svg`", (docs / "cli.md").read_text())
    assert match
    assert main([*match[1].split(), "--svg", str(tmp_path / "map.svg")]) == 0
    _, _, drawn = (docs / "map.svg").read_text().partition("\n")  # a line with the licence
    assert (tmp_path / "map.svg").read_text() == drawn


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--svg", "{}/none/map.svg"], "the folder must be there"),
        (["--svg", "-"], "it must be a file"),
        (["--svg", "/dev/full"], "it must be a file"),
        (["/proc/self/mem"], "/proc/self/mem: Input/output error"),
        (["{}/none"], "No such file"),
        (["{}/noise"], "noise, line 2: "),
        (["{}/cut"], "cut, line 4: the row 0x40200000-0x80000000 stands where one from 0x40001000"),
        (["{}/nothing"], "there is no table in it"),
        (["{}/binary"], "binary, line 1: "),
        (["{}/after", "--size", "4M"], "--size"),
        (["{}/after", "--machine", "lab", "--nested"], "--nested, --machine"),
        (["{}/after", "--pid", "1"], "--pid"),
        (["{}/after", "--page-size", "64K"], "do not fit 64 KiB; they fit 4 KiB"),
        (["--page-size", "64K", "--machine", "lab"], "--page-size"),
        (["--diff", "{}/after"], "--diff compares two FILES, not 1"),
        (["--diff", "{}/after", "{}/two"], "there are several"),
        (["--mode", "nvhe"], "add --machine lab"),
        (["--size", "4097"], "not a multiple"),
        (["--pid", "0"], "--pid"),
        (["--pid", "1", "--diff"], "--diff"),
        (["--width", "5"], "--width"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, files: tuple[str, str], words: list[str], message: str
) -> None:
    (tmp_path / "noise").write_text("---[ Guest IPA ]---\nhello\n")
    (tmp_path / "cut").write_text("".join(ONE_PAGE.splitlines(keepends=True)[i] for i in (0, 1, 2, 4, 5)))
    (tmp_path / "nothing").write_text("")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "two").write_text(ONE_PAGE + ONE_PAGE)
    assert main(["map", *(word.format(tmp_path) for word in words)]) == ExitCode.USAGE
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_terminal_without_utf_8_gets_ascii(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, files: tuple[str, str]
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["map", "--nested"]) == 0
    assert main(["map", "--diff", *files]) == 0
    assert b"W page, writable" in raw.getvalue()


def test_machine_kvm_needs_kvm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_kvm() -> None:
        raise KvmMissing("/dev/kvm is not there")

    monkeypatch.setattr(command, "open_kvm", no_kvm)
    assert main(["map", "--machine", "kvm"]) == ExitCode.MISSING
    assert "/dev/kvm" in capsys.readouterr().err


def test_in_the_lab_the_same_program_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[WalkConfig] = []

    def run_job(job: Job, options: MachineOptions, *, kernel: Path | None) -> JobResult:
        asked.append(read_config(job.argv[-1]))
        with open_spec() as kvm:
            text = json.dumps(tables(kvm, asked[0]).to_json())
        return JobResult(0, text.encode(), b"", {}, "", 1.5, Path("runs/1"))

    monkeypatch.setattr(command, "run_job", run_job)
    text = shown(capsys, "--machine", "lab", "--size", "8M")
    assert asked[0].size == 8 << 20
    assert "On the real kernel" not in text
    assert "8 MiB mapped by 2,048 pages" in text
