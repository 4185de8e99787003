# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import UsageError
from prefault.lab.arch import X86_64
from prefault.lab.machine import MODES, MachineOptions, job_command, kernel_arguments, shell_command

options = st.builds(
    MachineOptions,
    memory_mib=st.integers(256, 1 << 16),
    cpus=st.integers(1, 8),
    mode=st.sampled_from(MODES),
    icount=st.booleans(),
    lpa2=st.booleans(),
    append=st.lists(st.text("abc=1", min_size=1), max_size=3).map(tuple),
    mte=st.booleans(),
)


def command(chosen: MachineOptions) -> tuple[str, ...]:
    return job_command(chosen, Path("/k"), Path("/i"), console=Path("/c"), port=Path("/p,q"))


def value(argv: tuple[str, ...], option: str) -> str:
    return argv[argv.index(option) + 1]


@given(options)
def test_the_command_line_says_what_was_asked_for(chosen: MachineOptions) -> None:
    argv = command(chosen)
    assert value(argv, "-m") == f"{chosen.memory_mib}M"
    assert value(argv, "-smp") == ("1" if chosen.icount else str(chosen.cpus))
    assert ("-icount" in argv) == chosen.icount
    assert value(argv, "-cpu") == ("max" if chosen.lpa2 else "max,lpa2=off")
    assert ("mte=on" in value(argv, "-machine")) == chosen.mte
    words = value(argv, "-append").split()
    assert f"kvm-arm.mode={chosen.mode}" in words
    assert words[len(words) - len(chosen.append) :] == list(chosen.append)


def test_a_comma_in_a_path_does_not_become_an_option() -> None:
    assert "file,id=job,path=/p,,q" in command(MachineOptions())


def test_a_panic_ends_qemu_and_warnings_reach_the_console() -> None:
    words = kernel_arguments(MachineOptions()).split()
    assert {"panic=-1", "loglevel=5"} <= set(words)
    assert "-no-reboot" in command(MachineOptions())


def test_the_shell_has_the_terminal_and_no_job_port() -> None:
    argv = shell_command(MachineOptions(), Path("/k"), Path("/i"))
    assert value(argv, "-serial") == "mon:stdio"
    assert "virtio-serial-device" not in argv


x86_options = st.builds(
    MachineOptions,
    cpus=st.integers(1, 8),
    icount=st.booleans(),
    append=st.lists(st.text("abc=1", min_size=1), max_size=3).map(tuple),
    arch=st.just(X86_64),
)


@given(x86_options)
def test_on_x86_the_cpu_has_nested_paging_and_nothing_is_arm64s(chosen: MachineOptions) -> None:
    argv = command(chosen)
    assert argv[0] == "qemu-system-x86_64"
    assert {"+svm", "+npt"} <= set(value(argv, "-cpu").split(","))
    words = value(argv, "-append").split()
    assert "console=ttyS0" in words
    assert not any("arm" in word for word in words[: len(words) - len(chosen.append)])
    assert ("tsc_early_khz=1000000" in words) == chosen.icount
    assert words[len(words) - len(chosen.append) :] == list(chosen.append)


@pytest.mark.parametrize("only_arm64", [{"mode": "nvhe"}, {"lpa2": True}, {"mte": True}])
def test_what_only_arm64_has_is_refused_on_x86(only_arm64: dict[str, str | bool]) -> None:
    with pytest.raises(UsageError, match="arm64, not of x86_64"):
        MachineOptions(arch=X86_64, **only_arm64)  # type: ignore[arg-type]  # of three types


@pytest.mark.parametrize(
    ("bad", "text"),
    [({"mode": "vhe"}, "nested, protected, nvhe"), ({"cpus": 9}, "1 to 8"), ({"memory_mib": 8}, "256")],
)
def test_what_cannot_be_is_refused_with_what_can(bad: dict[str, str | int], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        MachineOptions(**bad)  # type: ignore[arg-type]  # wrong values on purpose


def test_under_icount_programs_always_lie_at_the_same_addresses() -> None:
    assert "norandmaps" in kernel_arguments(MachineOptions(icount=True)).split()
    assert "norandmaps" not in kernel_arguments(MachineOptions()).split()
