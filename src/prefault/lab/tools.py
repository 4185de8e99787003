# SPDX-License-Identifier: Apache-2.0
"""Programs that the lab needs on this machine: is each one here and good enough, and where it comes from.

Nothing is installed unless the caller says so; what would be run can be asked for first. Packages come
from this machine's own suites, and only where one of those is too old from its backports, through the
lab's private apt: the machine's sources stay as they are.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache as cache_calls
from functools import partial

from prefault.errors import LabError, ToolMissing
from prefault.lab import cache, debian, process
from prefault.lab.arch import ARCHITECTURES, ARM64, Architecture

NATIVE = platform.machine() == "aarch64"
CROSS_COMPILE = "" if NATIVE else "aarch64-linux-gnu-"
COMPILER = f"{CROSS_COMPILE}gcc"
QEMU_MAJOR = 9
"""The first QEMU whose EL2 has nested virtualisation (FEAT_NV2)."""


@dataclass(frozen=True)
class Tool:
    """A program, or what a program needs, on this machine."""

    name: str
    packages: tuple[str, ...]
    why: str
    check: Callable[[], str | None]
    """What is wrong with it, or None."""


def _present(program: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(program) else "not installed"


def _ask(argv: list[str], text: str = "") -> tuple[int, str]:
    try:
        done = subprocess.run(argv, input=text.encode(), capture_output=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 127, ""
    return done.returncode, done.stdout.decode(errors="replace")


def qemu_version(arch: Architecture = ARM64) -> str | None:
    """Version of the QEMU that is installed."""
    found = re.search(r"version (\S+)", _ask([arch.qemu, "--version"])[1])
    return found[1] if found else None


def _check_qemu(arch: Architecture) -> str | None:
    # FEAT_NV2 cannot be asked for; the board of a release that has it can.
    status, boards = _ask([arch.qemu, "-machine", "help"])
    if status == 127:
        return "not installed"
    if f"{arch.board}-{QEMU_MAJOR}.0 " not in boards:
        version = qemu_version(arch)
        return f"version {version} has no nested virtualisation; {QEMU_MAJOR}.0 or later is needed"
    return None


def _check_compiler() -> str | None:
    if not shutil.which(COMPILER):
        return "not installed"
    status, _ = _ask([COMPILER, "-x", "c", "-c", "-o", "/dev/null", "-"], "int answer;\n")
    return None if status == 0 else "cannot compile an empty file"


def _check_libc() -> str | None:
    argv = [COMPILER, "-static", "-x", "c", "-o", "/dev/null", "-"]
    status, _ = _ask(argv, "#include <stdio.h>\nint main(void) { return puts(__DATE__) < 0; }\n")
    return None if status == 0 else "a static program cannot be linked"


def _check_host_compiler() -> str | None:
    status, _ = _ask(
        ["gcc", "-x", "c", "-o", "/dev/null", "-"], "#include <elf.h>\nint main(void) { return 0; }"
    )
    return None if status == 0 else "a program for this machine cannot be linked"


def _check_perl() -> str | None:
    modules = ["-MTerm::ANSIColor", "-MEncode", "-MGetopt::Long", "-MPOSIX"]
    return None if _ask(["perl", *modules, "-e", "1"])[0] == 0 else "not installed, or without its modules"


_CROSS = () if NATIVE else ("gcc-aarch64-linux-gnu",)
_CROSS_LIBC = ("libc6-dev",) if NATIVE else ("libc6-dev-arm64-cross",)


@cache_calls  # the same tool each time, so that who asks for one finds what was found out about it
def run_tools(arch: Architecture = ARM64) -> tuple[Tool, ...]:
    """What a run needs once there is a kernel."""
    return (Tool(arch.qemu, (arch.qemu_package,), "the machine", partial(_check_qemu, arch)),)


RUN_TOOLS = run_tools()

BUILD_TOOLS = (
    Tool("gcc", ("gcc", "libc6-dev"), "programs of the kernel's own build", _check_host_compiler),
    Tool(COMPILER, _CROSS or ("gcc",), "the kernel", _check_compiler),
    Tool("static arm64 libc", _CROSS_LIBC, "the in-tree selftests", _check_libc),
    Tool("make", ("make",), "the kernel's build", _present("make")),
    Tool("flex", ("flex",), "Kconfig", _present("flex")),
    Tool("bison", ("bison",), "Kconfig", _present("bison")),
    Tool("bc", ("bc",), "kernel/time", _present("bc")),
    Tool("perl", ("perl",), "checkpatch.pl", _check_perl),
    Tool("git", ("git",), "applying the series", _present("git")),
    Tool("tar", ("tar",), "unpacking the source", _present("tar")),
    Tool("xz", ("xz-utils",), "unpacking the source", _present("xz")),
)
ALL_TOOLS = (*RUN_TOOLS, *BUILD_TOOLS)


def needed_for(arch: Architecture) -> tuple[Tool, ...]:
    """What it takes to have the lab of an architecture, and to run it. Debian's own kernel is not built."""
    return run_tools(arch) if arch.stock else ALL_TOOLS


def missing(wanted: Iterable[Tool] = ALL_TOOLS) -> dict[Tool, str]:
    """Tools that are not here or not good enough, and what is wrong with each."""
    found = {tool: tool.check() for tool in wanted}
    return {tool: problem for tool, problem in found.items() if problem is not None}


@dataclass(frozen=True)
class Plan:
    """Command lines that install what is missing."""

    commands: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        return "\n".join(shlex.join(command) for command in self.commands)

    def run(self, on_line: Callable[[str], None]) -> None:
        """Install.

        :raises ToolMissing: this is not root
        :raises LabError: apt ended with an error
        """
        if os.geteuid() != 0:
            raise ToolMissing(f"only root can install packages; run as root:\n{self}")
        for command in self.commands:
            status, output = process.run(
                command, environment={"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}, on_line=on_line
            )
            if status != 0:
                tail = "\n".join(output.rstrip().splitlines()[-10:])
                raise LabError(f"`{shlex.join(command)}` ended with status {status}:\n{tail}")


def _host_apt() -> debian.PrivateApt:
    suite = debian.codename()
    name = debian.architecture()
    mirror = debian.main_mirror()
    security = debian.mirror_of(f"{suite}-security")
    sources = [debian.Source(mirror, suite, name), debian.Source(mirror, f"{suite}-backports", name)]
    if security is not None:
        sources.append(debian.Source(security, f"{suite}-security", name))
    return debian.PrivateApt(cache.root() / "apt" / "tools", tuple(sources))


def _install(apt: debian.PrivateApt, packages: Iterable[str], *options: str) -> tuple[str, ...]:
    waiting = ("-o", "DPkg::Lock::Timeout=300")
    fixed = ("install", "--yes", "--no-install-recommends", *waiting, *options)
    return tuple(apt.command("apt-get", *fixed, *packages))


def plan(tools: Iterable[Tool]) -> Plan:
    """How to install ``tools``. Reads package lists; installs nothing.

    :raises ToolMissing: this is not Debian, or no suite has a QEMU that is new enough
    """
    apt = _host_apt()
    with cache.locked("apt-tools"):
        apt.update()
    tools = tuple(tools)
    emulators = {arch.qemu for arch in ARCHITECTURES.values()}
    plain = sorted({name for tool in tools if tool.name not in emulators for name in tool.packages})
    commands = [_install(apt, plain)] if plain else []
    for tool in tools:
        if tool.name in emulators:
            commands.append(_install(apt, tool.packages, *_qemu_suite(apt, tool.packages[0])))
    return Plan(tuple(commands))


def _qemu_suite(apt: debian.PrivateApt, package: str) -> tuple[str, ...]:
    """Options that choose the suite QEMU comes from: the machine's own if that is new enough."""
    own, backports = debian.codename(), f"{debian.codename()}-backports"
    offers = apt.offers(package)
    for suite, options in ((own, ()), (backports, ("--target-release", backports))):
        if any(_major(version) >= QEMU_MAJOR for version in offers.get(suite, ())):
            return options
    raise ToolMissing(f"neither {own} nor {backports} has QEMU {QEMU_MAJOR}: use Debian 12 or later")


def _major(version: str) -> int:
    found = re.match(r"(?:\d+:)?(\d+)", version)
    return int(found[1]) if found else 0


def compiler_version() -> str:
    """First line of what the compiler says of itself."""
    return _ask([COMPILER, "--version"])[1].split("\n", 1)[0]
