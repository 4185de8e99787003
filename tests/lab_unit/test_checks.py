# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from prefault.errors import BuildFailed
from prefault.lab import checks, kbuild

OUTPUT = """\
  CC      arch/arm64/kvm/mmu.o
../arch/arm64/kvm/mmu.c:12:5: warning: no previous prototype for 'f' [-Wmissing-prototypes]
/cache/tree/include/linux/kvm_host.h:7: warning: Function parameter 'x' not described in 'y'
Warning: /cache/tree/virt/kvm/kvm_main.c:20 function parameter 'a' not described in 'b'
../arch/arm64/kvm/nested.c:99:5: warning: unused variable 'old' [-Wunused-variable]
ld: warning: orphan section
"""
TOUCHED = ("arch/arm64/kvm/mmu.c", "include/linux/kvm_host.h", "virt/kvm/kvm_main.c")


def test_warnings_count_where_the_series_touches_and_without_their_lines() -> None:
    found = checks.about(OUTPUT, TOUCHED)
    assert {file for file, _ in found} == set(TOUCHED)
    moved = OUTPUT.replace(":12:5:", ":14:9:").replace(":7:", ":70:").replace(":20 ", ":21 ")
    assert checks.about(moved, TOUCHED) == found


def test_every_touched_file_is_compiled() -> None:
    files = ("arch/arm64/kvm/mmu.c", "virt/kvm/kvm_main.c", "mm/gup.c", "tools/testing/x.c", "include/a.h")
    assert checks.targets(files) == ("arch/arm64/kvm/", "mm/gup.o")


def test_a_file_that_warned_is_compiled_again(tmp_path: Path) -> None:
    file = tmp_path / "arch/arm64/kvm/mmu.c"
    file.parent.mkdir(parents=True)
    file.touch()
    old = file.stat().st_mtime_ns
    with pytest.raises(BuildFailed, match="compiling gave 1 warnings"):
        kbuild.fail_on_warnings(OUTPUT.splitlines()[1], tmp_path, "compiling")
    assert file.stat().st_mtime_ns > old


def test_output_without_warnings_passes(tmp_path: Path) -> None:
    kbuild.fail_on_warnings(
        "  CC      arch/arm64/kvm/mmu.o\n  CC      lib/warning.o\n", tmp_path, "compiling"
    )


def test_a_failed_build_quotes_its_last_lines_and_names_the_log(tmp_path: Path) -> None:
    log = tmp_path / "build.log"
    script = "for i in $(seq 50); do echo line $i; done; exit 2"
    with pytest.raises(BuildFailed) as failure:
        kbuild.run_logged(("sh", "-c", script), log)
    text = str(failure.value)
    assert str(log) in text and "line 21\n" in text and "line 50" in text and "line 20\n" not in text
    assert "line 1\n" in log.read_text()


def test_steps_are_told_as_they_come(tmp_path: Path) -> None:
    seen: list[str] = []
    script = "echo '  CC      a/b.o'; echo other; echo '  AR      c.a'"
    kbuild.run_logged(("sh", "-c", script), tmp_path / "log", on_step=seen.append)
    assert seen == ["CC a/b.o", "AR c.a"]
