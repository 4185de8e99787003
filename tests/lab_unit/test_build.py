# SPDX-License-Identifier: Apache-2.0
"""Which kernel is booted, and what a variant of it is made of."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from prefault.errors import ToolMissing, UsageError
from prefault.lab import build, cache, config
from prefault.lab.build import KERNEL_FOLDER, Record
from prefault.lab.variants import VARIANTS, of

RECORD = Record("7.3.4", "a source", "identity", "config", "series", (), "gcc", "image", (), 1.0)


def put(folder: Path) -> None:
    """Something that passes for a kernel that was built."""
    folder.mkdir(parents=True)
    (folder / "Image").write_bytes(b"")
    (folder / "build.json").write_text(json.dumps(asdict(RECORD)))


@pytest.fixture
def kernels(own_cache: Path) -> Path:
    """The folder of a source of which only the variant 16k was built."""
    source = own_cache / "kernel/a-source"
    put(source / "variants/16k")
    (own_cache / "kernel/current").write_text(source.name)
    return source


def test_a_variant_is_not_the_ordinary_kernel(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFAULT_LAB_KERNEL", raising=False)
    assert build.kernel_image("16k") == kernels / "variants/16k/Image"
    with pytest.raises(ToolMissing, match=r"run `prefault lab build`$"):
        build.kernel_image()
    with pytest.raises(ToolMissing, match=r"run `prefault lab build --variant debug`$"):
        build.kernel_image("debug")


def test_who_finds_no_kernel_is_told_of_a_build_under_way(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFAULT_LAB_KERNEL", raising=False)
    with cache.locked("kernel"), pytest.raises(ToolMissing, match=r"under way.*`prefault lab build`$"):
        build.kernel_image()
    with pytest.raises(ToolMissing, match=r"no kernel yet: run `prefault lab build`$"):
        build.kernel_image()


def test_a_variant_that_was_named_goes_before_the_environment(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_bytes(b"")
    monkeypatch.setenv("PREFAULT_LAB_KERNEL", str(tmp_path / "mine"))
    assert build.kernel_image() == tmp_path / "mine"
    assert build.kernel_image("16k") == kernels / "variants/16k/Image"


def test_the_ordinary_kernel_has_the_ordinary_config() -> None:
    assert build.recipe_for("7.3").config == (KERNEL_FOLDER / "config/lab.config").read_text()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_the_ordinary_config_and_its_own(name: str) -> None:
    ordinary, recipe = build.recipe_for("7.3"), build.recipe_for("7.3", variant=name)
    own = config.parse((KERNEL_FOLDER / f"config/{name}.config").read_text())
    assert config.parse(recipe.config) == {**config.parse(ordinary.config), **own}
    assert recipe.series == ordinary.series


def test_a_variant_without_its_fragment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/lab.config").write_text("CONFIG_A=y\n")
    with pytest.raises(UsageError, match=r"debug\.config is not there"):
        build.recipe_for("7.3", tmp_path, "debug")


def test_a_dry_run_builds_a_variant_in_a_folder_of_its_own(own_cache: Path) -> None:
    ordinary, variant = (" ".join(sum(build.commands(variant=name), ())) for name in (None, "debug"))
    assert "/variants/" not in ordinary
    assert "/variants/debug/build" in variant
    assert "debug.config" in variant


def test_a_kernel_is_told_what_its_variant_needs() -> None:
    assert of(None).arguments == of("16k").arguments == ()
    assert of("debug").arguments == ("page_poison=1", "sysctl.kernel.hung_task_timeout_secs=1200")
