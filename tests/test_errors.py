# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import inspect
import re
from pathlib import Path

import pytest

from prefault import errors
from prefault.errors import ExitCode, KvmError, PrefaultError

TREE_LINE = re.compile(r"^    ([│├└─ ]*)(\w+)  +\S")
DOCS = Path(__file__).parents[1] / "docs"


def drawn_tree() -> dict[str, str]:
    """Class name → name of its base, as the module's docstring draws it."""
    bases: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := TREE_LINE.match(line):
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            bases[match[2]] = path[depth - 1] if depth else "Exception"
    return bases


def test_the_drawn_tree_is_the_real_one() -> None:
    classes = {
        name: cls.__base__.__name__
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, PrefaultError) and cls.__base__ is not None
    }
    assert drawn_tree() == classes


def test_the_drawn_exit_codes_are_the_real_ones() -> None:
    drawn = dict(re.findall(r"(\w+)  .*\bexit (\d+)$", errors.__doc__ or "", re.MULTILINE))
    assert len(drawn) >= 6
    assert {name: int(code) for name, code in drawn.items()} == {
        name: getattr(errors, name).exit_code for name in drawn
    }


def test_the_documented_exit_codes_are_the_enum() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (DOCS / "exit-codes.md").read_text(), re.MULTILINE)
    assert {name: int(code) for code, name in rows} == {code.name: code.value for code in ExitCode}


def test_every_error_ends_a_command_with_a_failure() -> None:
    for _, cls in inspect.getmembers(errors, inspect.isclass):
        if issubclass(cls, PrefaultError):
            assert cls.exit_code in set(ExitCode) - {ExitCode.DONE}


@pytest.mark.parametrize(
    ("number", "name"), [(errno.EFAULT, "EFAULT"), (errno.ENOENT, "ENOENT"), (errors.EHWPOISON, "EHWPOISON")]
)
def test_a_kvm_error_names_the_ioctl_the_errno_and_the_range(number: int, name: str) -> None:
    error = KvmError(
        "KVM_PRE_FAULT_MEMORY", number, gpa=0x4000_0000, size=0x2000, hint="map the memslot first"
    )
    message = str(error)
    assert "KVM_PRE_FAULT_MEMORY" in message
    assert name in message
    assert "0x40000000" in message
    assert "0x2000" in message
    assert message.endswith("map the memslot first")
    assert (error.errno, error.gpa, error.size) == (number, 0x4000_0000, 0x2000)


def test_an_errno_without_a_name_is_still_reported() -> None:
    assert "9999" in str(KvmError("KVM_RUN", 9999))
