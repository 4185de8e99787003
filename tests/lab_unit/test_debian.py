# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from prefault.errors import ToolMissing
from prefault.lab import debian, process
from prefault.lab.debian import PrivateApt, Source, mirror_from_targets, mirror_from_uris

TARGETS = """\
Docker bookworm bookworm https://vendor.example/debian/
Debian bookworm-security bookworm-security http://mirror.example/debian-security/
Debian stable bookworm http://mirror.example/debian/
"""
URIS = """\
'https://vendor.example/debian/dists/bookworm/InRelease' x 0
'http://mirror.example/debian/dists/bookworm/InRelease' x 0
'http://mirror.example/debian/dists/bookworm-updates/InRelease' x 0
'http://mirror.example/debian/dists/bookworm/main/binary-amd64/Packages.xz' x 0
"""


def test_the_mirror_is_debians_own_and_of_that_suite() -> None:
    assert mirror_from_targets(TARGETS, "bookworm") == "http://mirror.example/debian/"
    assert mirror_from_targets(TARGETS, "bookworm-security") == "http://mirror.example/debian-security/"
    assert mirror_from_targets(TARGETS, "trixie") is None


def test_without_lists_the_mirror_is_the_one_with_updates() -> None:
    assert mirror_from_uris(URIS, "bookworm") == "http://mirror.example/debian/"
    assert mirror_from_uris(URIS.splitlines()[0], "bookworm") == "https://vendor.example/debian/"
    assert mirror_from_uris("", "bookworm") is None


def test_signatures_are_always_checked() -> None:
    line = Source("http://mirror.example/debian/", "trixie-backports", "arm64").line()
    assert f"signed-by={debian.KEYRING}" in line
    assert "trusted" not in line


def test_versions_are_told_by_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = (
        " qemu-system-arm | 1:10.0.2+ds-2~bpo12+1 | http://m/debian bookworm-backports/main amd64 Packages\n"
        " qemu-system-arm | 1:7.2+dfsg-7 | http://m/debian bookworm/main amd64 Packages\n"
    )
    monkeypatch.setattr(process, "check", lambda *_, **__: table)
    assert PrivateApt(tmp_path, ()).offers("qemu-system-arm") == {
        "bookworm-backports": ["1:10.0.2+ds-2~bpo12+1"],
        "bookworm": ["1:7.2+dfsg-7"],
    }


def test_another_system_is_told_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: 'ID=fedora\nPRETTY_NAME="Fedora 44"\n')
    with pytest.raises(ToolMissing, match="this is Fedora 44: use Debian"):
        debian.codename()
