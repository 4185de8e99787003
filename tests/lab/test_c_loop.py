# SPDX-License-Identifier: Apache-2.0
"""The documentation's loop for other languages, compiled and run on the real kernel."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from prefault.lab import build
from prefault.lab.job import Job, run_job

pytestmark = [pytest.mark.lab, pytest.mark.timeout(200)]

PAGE = Path(__file__).parents[2] / "docs/apply.md"
INSIDE = Path(__file__).parent / "inside/c_loop.py"
COMPILER = shutil.which("aarch64-linux-gnu-gcc") or "aarch64-linux-gnu-gcc"
END = 0x1_0000_0000 + (4 << 20)


def test_the_loop_in_c_pre_faults_all_and_says_where_memory_ends(tmp_path: Path) -> None:
    found = re.search(r"^```c\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    source, library = tmp_path / "loop.c", tmp_path / "loop.so"
    source.write_text(found[1])
    flags = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-nostartfiles")
    subprocess.run([COMPILER, *flags, "-I", build.current().headers, "-o", library, source], check=True)
    files = {"/c_loop.py": INSIDE.read_bytes(), "/loop.so": library.read_bytes()}
    result = run_job(Job(("python3", "/c_loop.py"), files, timeout=100))
    assert json.loads(result.stdout) == {"result": -errno.ENOENT, "gpa": END, "faults": 0}
