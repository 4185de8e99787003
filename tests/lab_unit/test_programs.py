# SPDX-License-Identifier: Apache-2.0
"""Of a program, what comes along is what it is linked to, and no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from prefault.errors import LabError
from prefault.lab import process, programs

LINKED = {
    "program": ("liba.so.1", "libc.so.6"),
    "liba.so.1": ("libb.so.2", "libc.so.6"),
    "libb.so.2": ("liba.so.1",),
    "libother.so": (),
}
HERE = "usr/lib/aarch64-linux-gnu"


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch) -> None:
    def readelf(argv: Sequence[str], **_: object) -> str:
        return "".join(
            f" 0x0000000000000001 (NEEDED)             Shared library: [{name}]\n"
            for name in LINKED[Path(argv[-1]).name]
        )

    monkeypatch.setattr(process, "check", readelf)


def there(*names: str) -> Mapping[str, Path]:
    return {name: Path("/packages") / name for name in names}


@pytest.mark.usefixtures("linked")
def test_libraries_of_libraries_come_along_and_nothing_else() -> None:
    found = programs.closure(
        Path("program"), there("liba.so.1", "libb.so.2", "libother.so"), frozenset({"libc.so.6"})
    )
    assert found == {
        f"{HERE}/liba.so.1": Path("/packages/liba.so.1"),
        f"{HERE}/libb.so.2": Path("/packages/libb.so.2"),
    }


@pytest.mark.usefixtures("linked")
def test_a_library_that_no_package_has_is_named_with_who_wants_it() -> None:
    with pytest.raises(LabError, match=r"liba\.so\.1 is linked to libb\.so\.2"):
        programs.closure(Path("program"), there("liba.so.1"), frozenset({"libc.so.6"}))
