# SPDX-License-Identifier: Apache-2.0
"""Running the kernel's own build: configure, compile, headers, selftests, W=1.

Everything is built out of tree. Output goes to one log per build; of a failure the message has the last
lines of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefault.errors import BuildFailed
from prefault.lab import config, process
from prefault.lab.tools import CROSS_COMPILE

_STEP = re.compile(r"  ([A-Z]+(?:\[M\])?) +(\S+)$")
_LAST_LINES = 30


@dataclass(frozen=True)
class Make:
    """make on a tree, building into ``output``."""

    tree: Path
    output: Path
    log: Path
    jobs: int

    def command(self, *arguments: str) -> tuple[str, ...]:
        """The command line for some targets and variables."""
        fixed = (f"-j{self.jobs}", "ARCH=arm64", f"CROSS_COMPILE={CROSS_COMPILE}", "KBUILD_BUILD_TIMESTAMP=0")
        return ("make", "-C", str(self.tree), f"O={self.output}", *fixed, *arguments)

    def run(self, *arguments: str, on_step: Callable[[str], None] | None = None) -> str:
        """Build some targets.

        :returns: what make said
        :raises BuildFailed: make ended with an error
        """
        self.output.mkdir(parents=True, exist_ok=True)
        return run_logged(self.command(*arguments), self.log, on_step=on_step)

    def configure(self, fragment: Path) -> None:
        """Make a .config of nothing but what ``fragment`` asks for; leave an equal one as it is.

        :raises BuildFailed: Kconfig dropped an option of the fragment
        """
        done = self.output / ".config.fragment"
        if done.exists() and (self.output / ".config").exists() and done.read_text() == fragment.read_text():
            self.run("olddefconfig")
        else:
            self.run(f"KCONFIG_ALLCONFIG={fragment}", "allnoconfig")
        refused = config.refused(fragment.read_text(), (self.output / ".config").read_text())
        if refused:
            listed = "\n".join(f"  {entry}" for entry in refused)
            raise BuildFailed(f"Kconfig refused what {fragment} asks for; check dependencies:\n{listed}")
        done.write_text(fragment.read_text())


def run_logged(
    command: tuple[str, ...],
    log: Path,
    *,
    environment: dict[str, str] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> str:
    """Run a program with its output added to ``log``.

    :raises BuildFailed: it ended with an error; the message has the log's last lines
    """

    def follow(line: str) -> None:
        stream.write(line + "\n")
        step = _STEP.match(line)
        if step is not None and on_step is not None:
            on_step(f"{step[1]} {step[2]}")

    with log.open("a") as stream:
        stream.write(f"$ {' '.join(command)}\n")
        status, output = process.run(
            command, environment={**(environment or {}), "LC_ALL": "C"}, on_line=follow
        )
    if status != 0:
        tail = "\n".join(output.rstrip().splitlines()[-_LAST_LINES:])
        raise BuildFailed(f"the build failed with status {status}; whole log: {log}\n{tail}")
    return output


def _selftest_folder(make: Make) -> Path:
    return make.output / "kselftest-kvm"


def selftest_command(make: Make, names: tuple[str, ...]) -> tuple[str, ...]:
    """The command line that builds some KVM selftests; static with LDFLAGS=-static in the environment."""
    folder = _selftest_folder(make)
    headers = make.output / "usr/include"
    return (
        "make",
        "-C",
        str(make.tree / "tools/testing/selftests/kvm"),
        f"-j{make.jobs}",
        "ARCH=arm64",
        f"CROSS_COMPILE={CROSS_COMPILE}",
        f"OUTPUT={folder}",
        f"abs_objdir={folder}",  # generated headers go here and not into the source
        f"KHDR_INCLUDES=-isystem {headers}",
        f"LINUX_HDR_PATH={headers}",
        *(str(folder / name) for name in names),
    )


def build_selftests(make: Make, names: tuple[str, ...]) -> None:
    """Build KVM selftests as static programs, into kselftest-kvm/ of the build.

    :raises BuildFailed: they do not compile, or not without warnings
    """
    # Their makefile does not make this folder.
    (_selftest_folder(make) / "tools").mkdir(parents=True, exist_ok=True)
    # In the environment: the makefile adds to it, and a variable of make's command line would stop that.
    output = run_logged(selftest_command(make, names), make.log, environment={"LDFLAGS": "-static"})
    fail_on_warnings(output, make.tree, "building the selftests")


def warnings(output: str) -> tuple[str, ...]:
    """Warning lines in what a build said."""
    return tuple(line for line in output.splitlines() if re.search(r"\bwarning: ", line, re.IGNORECASE))


def fail_on_warnings(output: str, tree: Path, doing: str) -> None:
    """Take warnings for errors. Files that gave one are touched, so that the next build says it again.

    :raises BuildFailed: there is one
    """
    found = warnings(output)
    for line in found:
        for file in _files_named(line, tree):
            file.touch()
    if found:
        shown = "\n".join(f"  {line}" for line in found[:20])
        raise BuildFailed(f"{doing} gave {len(found)} warnings:\n{shown}")


def _files_named(line: str, tree: Path) -> list[Path]:
    """Files of the tree that begin a compiler's message, whatever folder their names are relative to."""
    name = line.partition(":")[0].strip()
    parts = Path(name).parts
    candidates = [
        tree.joinpath(*parts[start:]) for start in range(len(parts)) if parts[start] not in ("..", "/")
    ]
    return [path for path in candidates if path.is_file()][:1]
