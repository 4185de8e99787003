# SPDX-License-Identifier: Apache-2.0
"""Debian packages of any suite and architecture, signatures checked, the machine's apt untouched.

A ``PrivateApt`` has its own lists, cache and sources in the lab's cache folder and knows the mirror from
the machine's own configuration (proxies and credentials are taken from there as well). What it trusts is
Debian's archive keyring, named in ``signed-by``.

Failure modes: ``ToolMissing`` where there is no apt, no Debian mirror set up, or no way to get what it
should offer (no network, a wrong signature), with apt's own last lines; ``LabError`` for anything else.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from prefault.errors import ToolMissing
from prefault.lab import cache, process

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@dataclass(frozen=True)
class Source:
    """A suite of a mirror, for one architecture."""

    mirror: str
    suite: str
    architecture: str

    def line(self) -> str:
        """The line of sources.list."""
        return f"deb [arch={self.architecture} signed-by={KEYRING}] {self.mirror} {self.suite} main"


def codename() -> str:
    """Codename of the Debian that this machine runs.

    :raises ToolMissing: it is not Debian
    """
    try:
        text = Path("/etc/os-release").read_text()
    except OSError:
        text = ""
    fields: dict[str, str] = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', text, re.MULTILINE))
    if fields.get("ID") != "debian" or "VERSION_CODENAME" not in fields:
        name = fields.get("PRETTY_NAME", "an unknown system")
        raise ToolMissing(
            f"the lab's packages come from Debian's apt and this is {name}: use Debian 12 or 13"
        )
    return fields["VERSION_CODENAME"]


def architecture() -> str:
    """This machine's architecture in Debian's words."""
    return process.check(["dpkg", "--print-architecture"]).strip()


def mirror_of(suite: str) -> str | None:
    """Address of the mirror that this machine's apt has for one of Debian's suites, if it has one."""
    if shutil.which("apt-get") is None or not KEYRING.exists():
        raise ToolMissing(f"apt-get and {KEYRING} are needed: use Debian 12 or 13")
    listed = process.check(
        ["apt-get", "indextargets", "--format", "$(ORIGIN) $(RELEASE) $(CODENAME) $(REPO_URI)"]
    )
    found = mirror_from_targets(listed, suite)
    if found is None:  # no lists downloaded yet: ask what apt would download
        argv = ["apt-get", "update", "--print-uris", "-o", "Debug::NoLocking=1"]
        found = mirror_from_uris(process.check(argv), suite)
    return found


def mirror_from_targets(listed: str, suite: str) -> str | None:
    """Pick the mirror of ``suite`` out of `apt-get indextargets`."""
    for line in listed.splitlines():
        origin, release, name, address = (line.split(" ", 3) + [""] * 4)[:4]
        if origin == "Debian" and suite in (release, name):
            return address
    return None


def mirror_from_uris(listed: str, suite: str) -> str | None:
    """Pick the mirror of ``suite`` out of `apt-get update --print-uris`.

    Other vendors name their suites after Debian's; Debian's mirror is the one with -updates beside it.
    """
    addresses = re.findall(r"'([^']+/)dists/([^'/]+)/InRelease'", listed)
    bases = [base for base, name in addresses if name == suite]
    main = [base for base in bases if (base, f"{suite}-updates") in addresses]
    return next(iter(main + bases), None)


def main_mirror() -> str:
    """Address of the mirror that this machine uses for its own suite."""
    suite = codename()
    found = mirror_of(suite)
    if found is None:
        raise ToolMissing(f"apt has no source for Debian's suite {suite}: check /etc/apt/sources.list")
    return found


def mirror_for(suite: str) -> str:
    """Address of the mirror for a suite, of this machine's release or of another.

    Security updates have a mirror of their own; the other suites share one.

    :raises ToolMissing: this machine's apt has no such mirror
    """
    if not suite.endswith("-security"):
        return main_mirror()
    own = f"{codename()}-security"
    found = mirror_of(own)
    if found is None:
        raise ToolMissing(f"apt has no source for Debian's suite {own}: check /etc/apt/sources.list")
    return found


class PrivateApt:
    """An apt of the lab's own, in ``folder``."""

    def __init__(self, folder: Path, sources: tuple[Source, ...]) -> None:
        self._folder = folder
        self._sources = sources

    def command(self, program: str, *arguments: str) -> list[str]:
        """Command line of apt-get or apt-cache with this state."""
        return [program, f"-c={self._folder / 'apt.conf'}", *arguments]

    def _configuration(self) -> str:
        settings = {
            "Dir::Etc::SourceList": self._folder / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State::Lists": self._folder / "lists",
            "Dir::Cache": self._folder / "cache",
            "Dir::Cache::archives": "archives",
            "APT::Sandbox::User": "root",  # the sandbox user cannot write into a private folder
            "APT::Keep-Downloaded-Packages": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        lines = [f'{name} "{value}";' for name, value in settings.items()]
        lines += [f'APT::Architectures:: "{name}";' for name in self._architectures()]
        # Hooks of the machine are about the machine's own lists.
        lines += ["#clear APT::Update::Post-Invoke;", "#clear APT::Update::Post-Invoke-Success;"]
        return "\n".join(lines) + "\n"

    def _architectures(self) -> list[str]:
        return sorted({architecture(), *(source.architecture for source in self._sources)})

    def update(self) -> None:
        """Fetch the lists.

        :raises ToolMissing: a mirror cannot be reached or a signature is wrong
        """
        for name in ("lists/partial", "cache/archives/partial"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        cache.write_file(
            self._folder / "sources.list", "".join(s.line() + "\n" for s in self._sources).encode()
        )
        cache.write_file(self._folder / "apt.conf", self._configuration().encode())
        suites = ", ".join(sorted({source.suite for source in self._sources}))
        process.check(
            self.command("apt-get", "update", "--error-on=any"),
            failure=ToolMissing,
            hint=f"cannot read the package lists of {suites}: is the network up?",
        )

    def offers(self, package: str) -> dict[str, list[str]]:
        """Versions of a package by suite, newest first."""
        found: dict[str, list[str]] = {}
        for line in process.check(self.command("apt-cache", "madison", package)).splitlines():
            columns = [column.strip() for column in line.split("|")]
            if len(columns) == 3:
                _, version, origin = columns
                suite = origin.split(" ")[1].partition("/")[0]
                found.setdefault(suite, []).append(version)
        return found

    def dependencies(self, package: str) -> list[str]:
        """Names of all packages that a package needs, directly or not; of those that are not there, too.

        :raises ToolMissing: there is no such package
        """
        only = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces")]
        listed = process.check(
            self.command("apt-cache", "depends", "--recurse", "--no-enhances", *only, package),
            failure=ToolMissing,
            hint=f"apt knows no {package}",
        )
        return sorted(
            {line.partition(":")[0] for line in listed.splitlines() if line and not line[0].isspace()}
        )

    def download(self, packages: tuple[str, ...], folder: Path) -> list[Path]:
        """Fetch package files into ``folder``, checksums checked by apt.

        :raises ToolMissing: a package is not there, or the download broke off
        """
        process.check(
            self.command("apt-get", "download", *packages),
            cwd=folder,
            failure=ToolMissing,
            hint=f"cannot fetch {', '.join(packages)}: is the network up, and has {folder} room?",
        )
        return sorted(folder.glob("*.deb"))


def unpack(package: Path, folder: Path) -> None:
    """Unpack a package's files into ``folder``; nothing of it is run.

    :raises LabError: the file is damaged or the disk is full
    """
    process.check(["dpkg-deb", "--extract", str(package), str(folder)])
