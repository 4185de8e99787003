# SPDX-License-Identifier: Apache-2.0
"""Every number, size and offset of ``prefault.abi`` against the kernel's own headers, compiled.

The headers are those of the kernel that the lab has built, or else those of the C library, which
may be older: a constant that they do not have is skipped with that reason.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from prefault.abi import arm64, constants, ioctls, structures, userfaultfd, x86
from prefault.errors import PrefaultError

ARM64_ONLY = {
    "KVM_ARM_PREFERRED_TARGET",
    "KVM_ARM_VCPU_INIT",
    "KVM_GET_VCPU_EVENTS",
    "KVM_SET_VCPU_EVENTS",
    "kvm_vcpu_init",
    "kvm_vcpu_events",
}
STRUCTURES = [
    one
    for name, one in (vars(structures) | vars(x86)).items()
    if name.startswith("kvm_") and isinstance(one, type) and issubclass(one, ctypes.Structure)
]
KNOWN_IF = {
    "kvm_userspace_memory_region2": "defined(KVM_SET_USER_MEMORY_REGION2)",
    "kvm_create_guest_memfd": "defined(KVM_CREATE_GUEST_MEMFD)",
    "kvm_pre_fault_memory": "defined(KVM_PRE_FAULT_MEMORY)",
    "memory_fault": "defined(KVM_EXIT_MEMORY_FAULT)",
    "arm_sea": "defined(KVM_EXIT_ARM_SEA)",
    "KVM_DIRTY_LOG_PAGE_OFFSET": "KVM_DIRTY_LOG_PAGE_OFFSET",
}
"""When headers have a structure or a kind of exit: when they have the number that goes with it.

An architecture without dirty rings, as arm64 was before Linux 6.2, has 0 for where they are.
"""


@dataclass(frozen=True)
class Headers:
    """Where kernel headers are, and which compiler goes with them."""

    name: str
    compiler: str
    include: Path | None
    arm64: bool

    @property
    def options(self) -> list[str]:
        """For the compiler to find them."""
        return ["-isystem", str(self.include)] if self.include else []


def _lab_headers() -> Path | None:
    try:
        from prefault.lab import build

        folder = build.current().headers
    except (PrefaultError, ImportError, AttributeError):
        return None
    return folder if (folder / "linux/kvm.h").exists() else None


def _candidates() -> list[Headers]:
    lab = _lab_headers()
    cross, native = "aarch64-linux-gnu-gcc", "gcc"
    arm64_host = Path("/usr/include/aarch64-linux-gnu/asm/kvm.h").exists()
    return [
        Headers("lab kernel", native if arm64_host else cross, lab, True),
        Headers("arm64 C library", native if arm64_host else cross, None, True),
        Headers("host", native, None, arm64_host),
    ]


def _usable(headers: Headers) -> bool:
    if not shutil.which(headers.compiler) or (headers.name == "lab kernel" and not headers.include):
        return False
    return _preprocess(headers, "#include <linux/kvm.h>\n").returncode == 0


def _preprocess(headers: Headers, source: str) -> subprocess.CompletedProcess[str]:
    argv = [headers.compiler, *headers.options, "-E", "-x", "c", "-"]
    return subprocess.run(argv, input=source, capture_output=True, text=True)


USABLE = [headers for headers in _candidates() if _usable(headers)]


def _numbers() -> dict[str, int]:
    """Every public constant, with its value."""
    found: dict[str, int] = {}
    for module in (constants, ioctls, arm64, userfaultfd, x86):
        for name, value in vars(module).items():
            if name.isupper() and isinstance(value, int) and not name.startswith("_"):
                found[name] = value
    return found


NUMBERS = _numbers()


def _of_another(name: str, headers: Headers) -> bool:
    """Whether a name is one of an architecture that these headers are not of."""
    if headers.arm64:
        return name in vars(x86)
    return name in vars(arm64) or name in ARM64_ONLY


@dataclass(frozen=True)
class Assertion:
    """A C condition that must hold, and the preprocessor condition under which it can be asked."""

    name: str
    condition: str
    known: str


def _assertions(headers: Headers) -> list[Assertion]:
    found = []
    for name, value in NUMBERS.items():
        if not _of_another(name, headers):
            known = KNOWN_IF.get(name, f"defined({name})")
            found.append(Assertion(name, f"(unsigned long long)({name}) == {value}ull", known))
    for one in STRUCTURES:
        if not _of_another(one.__name__, headers):
            found += _layout(one)
    size = ctypes.sizeof(userfaultfd.uffd_msg)
    found.append(Assertion("uffd_msg", f"sizeof(struct uffd_msg) == {size}", "1"))
    for member, kind, *_ in structures._exit_union._fields_:
        if isinstance(kind, type) and issubclass(kind, ctypes.Structure):  # that is, not the padding
            found += _exit_layout(member, kind)
    return found


def _layout(structure: type[ctypes.Structure]) -> list[Assertion]:
    name = structure.__name__
    known = KNOWN_IF.get(name, "1")
    size = Assertion(name, f"sizeof(struct {name}) == {ctypes.sizeof(structure)}", known)
    members = [member for member, *_ in structure._fields_ if member != "exit"]
    # The real kvm_run goes on behind the exits.
    return ([] if name == "kvm_run" else [size]) + [
        Assertion(
            f"{name}.{member}",
            f"offsetof(struct {name}, {member}) == {getattr(structure, member).offset}",
            known,
        )
        for member in members
    ]


def _exit_layout(member: str, kind: type[ctypes.Structure]) -> list[Assertion]:
    start = structures.kvm_run.exit.offset
    return [
        Assertion(
            f"kvm_run.{member}.{field}",
            f"offsetof(struct kvm_run, {member}.{field}) == {start + getattr(kind, field).offset}",
            KNOWN_IF.get(member, "1"),
        )
        for field, *_ in kind._fields_
    ]


# The kernel's own macros of the GIC's sizes are made of this one, which its UAPI headers lack.
HEADERS = ("stddef.h", "errno.h", "linux/kvm.h", "linux/userfaultfd.h")
INCLUDES = "#define SZ_64K 0x10000\n" + "".join(f"#include <{header}>\n" for header in HEADERS)


def _program(assertions: list[Assertion]) -> str:
    lines = [f'#if {one.known}\n_Static_assert({one.condition}, "{one.name}");\n#endif' for one in assertions]
    return "\n".join([INCLUDES, *lines, ""])


def _compile(headers: Headers, source: str, target: Path) -> str:
    """What the compiler says, empty if all assertions hold."""
    argv = [headers.compiler, *headers.options, "-x", "c", "-c", "-o", str(target), "-"]
    return subprocess.run(argv, input=source, capture_output=True, text=True).stderr


def _unknown(headers: Headers) -> list[str]:
    """What the headers do not have."""
    lines = [f"#if !({one.known})\nunknown {one.name}\n#endif" for one in _assertions(headers)]
    output = _preprocess(headers, "\n".join([INCLUDES, *lines, ""])).stdout
    return [line.removeprefix("unknown ") for line in output.splitlines() if line.startswith("unknown ")]


@pytest.mark.skipif(not USABLE, reason="no C compiler with kernel headers is installed")
@pytest.mark.parametrize("headers", USABLE, ids=lambda headers: headers.name)
def test_the_abi_is_that_of_the_headers(headers: Headers, tmp_path: Path) -> None:
    assert _compile(headers, _program(_assertions(headers)), tmp_path / "abi.o") == ""


@pytest.mark.skipif(not USABLE, reason="no C compiler with kernel headers is installed")
@pytest.mark.parametrize("headers", USABLE, ids=lambda headers: headers.name)
def test_the_headers_know_all_of_the_abi(headers: Headers) -> None:
    unknown = _unknown(headers)
    assert not unknown or headers.name != "lab kernel"
    assert len(unknown) < len(_assertions(headers)) // 2
    if unknown:
        names = ", ".join(name for name in unknown if "." not in name)
        pytest.skip(f"these headers are older than {names}")


@pytest.mark.skipif(not USABLE, reason="no C compiler with kernel headers is installed")
def test_a_wrong_number_is_found(tmp_path: Path) -> None:
    wrong = Assertion("KVMIO", "KVMIO == 1", "1")
    assert "KVMIO" in _compile(USABLE[0], _program([wrong]), tmp_path / "abi.o")


def test_nothing_of_the_abi_is_left_out() -> None:
    assert len(NUMBERS) > 80
    assert {"KVM_PRE_FAULT_MEMORY", "KVM_CAP_PRE_FAULT_MEMORY", "KVM_ARM_VCPU_HAS_EL2"} <= set(NUMBERS)
    assert structures.kvm_pre_fault_memory in STRUCTURES and structures.kvm_run in STRUCTURES
