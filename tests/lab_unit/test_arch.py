# SPDX-License-Identifier: Apache-2.0
"""What each architecture's lab needs is asked for by that lab alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from prefault.errors import ToolMissing
from prefault.lab import cache, clean, debian, doctor, process, rootfs, stock, tools
from prefault.lab.arch import ARCHITECTURES, ARM64, X86_64
from prefault.lab.debian import PrivateApt

LISTED = """linux-image-amd64
  Depends: linux-image-7.3.4+deb13-amd64
linux-image-7.3.4+deb13-amd64:amd64
 |Depends: dracut
  Depends: linux-binary-7.3.4+deb13-amd64
linux-binary-7.3.4+deb13-amd64
linux-modules-7.3.4+deb13-amd64
linux-base-7.3.4+deb13-amd64
<linux-initramfs-tool>
"""


class FakeApt(PrivateApt):
    """Offers QEMU 7 in the machine's own suite and QEMU 10 in its backports."""

    def __init__(self) -> None:
        super().__init__(cache.root(), ())

    def update(self) -> None:
        """There is nothing to fetch."""

    def offers(self, package: str) -> dict[str, list[str]]:
        """The same of every package."""
        return {"bookworm": ["1:7.2+dfsg-7"], "bookworm-backports": ["1:10.0.2+ds-2"]}


def test_qemu_for_x86_is_asked_for_by_its_lab_alone() -> None:
    assert X86_64.qemu not in {tool.name for tool in tools.needed_for(ARM64)}
    assert [tool.name for tool in tools.needed_for(X86_64)] == [X86_64.qemu]


@pytest.mark.usefixtures("own_cache")
def test_each_qemu_comes_from_a_suite_that_is_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_host_apt", FakeApt)
    monkeypatch.setattr(debian, "codename", lambda: "bookworm")
    planned = tools.plan([tool for arch in ARCHITECTURES.values() for tool in tools.run_tools(arch)])
    for command, arch in zip(planned.commands, ARCHITECTURES.values(), strict=True):
        assert command[-1] == arch.qemu_package
        assert "bookworm-backports" in command


@pytest.mark.usefixtures("own_cache")
def test_the_doctor_says_how_to_have_this_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "missing", lambda wanted: dict.fromkeys(wanted, "not installed"))
    found = {finding.name: finding for finding in doctor.examine(X86_64)}
    assert set(found) == {X86_64.qemu, "kernel", "root file system"}
    assert all("prefault lab build --arch x86_64" in finding.remedy for finding in found.values())
    assert not doctor.can_run(tuple(found.values()))


def test_root_file_systems_of_two_architectures_do_not_meet() -> None:
    assert rootfs.archive(ARM64).parent != rootfs.archive(X86_64).parent
    assert rootfs.archive(ARM64).name != rootfs.archive(X86_64).name


def test_init_of_x86_gives_modules_their_parameters(tmp_path: Path) -> None:
    (tmp_path / "01-kvm_amd.ko").touch()
    (tmp_path / "cmdline").write_text("console=ttyS0 kvm_amd.npt=0 kvm.x=1 kvm_amd.sev=0 kvm_amdx.y=2\n")
    lines = rootfs._content(X86_64).init
    begin = lines.index("for module")
    loop = lines[begin : lines.index("done\n", begin) + 5]
    loop = loop.replace(f"/{rootfs.MODULES}", str(tmp_path)).replace(
        "/proc/cmdline", str(tmp_path / "cmdline")
    )
    script = f"insmod() {{ echo insmod $*; }}\n{loop}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[2:] == ["npt=0", "sev=0"]
    assert "insmod" not in rootfs._content(ARM64).init


def test_the_kernel_is_a_part_of_the_cache_that_can_be_removed() -> None:
    assert "stock" in clean.PARTS


def test_the_packages_that_hold_the_kernel_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "check", lambda *_, **__: LISTED)
    names = FakeApt().dependencies("linux-image-amd64")
    assert [name for name in names if stock._PARTS.match(name)] == [
        f"linux-{part}-7.3.4+deb13-amd64" for part in ("binary", "image", "modules")
    ]


@pytest.mark.usefixtures("own_cache")
def test_a_mirror_without_the_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "mirror_for", lambda suite: "http://mirror.example/")
    monkeypatch.setattr(process, "check", lambda *_, **__: "")
    monkeypatch.setattr(rootfs, "base", lambda arch: None)
    with pytest.raises(ToolMissing, match="no linux-image-amd64"):
        stock.fetch(X86_64)
