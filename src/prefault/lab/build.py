# SPDX-License-Identifier: Apache-2.0
"""The kernel that the lab boots: base, series and config made into an Image, recorded and reused.

What was built is written down beside it. While source, series, config and compiler are what the record
says, building again does nothing; when one changes, make compiles only what that concerns.

Failure modes: ``BuildFailed`` where a patch, checkpatch, Kconfig or the compiler objects; ``ToolMissing``
where something must be installed or built first. What is half done is continued the next time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import prefault
from prefault.errors import LabError, ToolMissing, UsageError
from prefault.lab import cache, checks, config, kbuild, rootfs, series, source, tools, variants
from prefault.lab.kbuild import Make
from prefault.lab.progress import Progress, Silent
from prefault.lab.series import Series
from prefault.lab.source import Source

KERNEL_FOLDER = Path(prefault.__file__).resolve().parents[2] / "kernel"
BUILD_MIB = 500
USUAL_STEPS = 2410
"""Steps of a first build, about; only the progress display depends on it."""


@dataclass(frozen=True)
class Record:
    """What was built, and from what."""

    version: str
    source: str
    identity: str
    config_sha256: str
    series_sha256: str
    series: tuple[str, ...]
    compiler: str
    image_sha256: str
    selftests: tuple[str, ...]
    seconds: float

    def inputs(self) -> tuple[str, ...]:
        """What must be equal for the build to be reused."""
        return (self.identity, self.config_sha256, self.series_sha256, self.compiler, *self.selftests)


@dataclass(frozen=True)
class BuiltKernel:
    """A kernel in the cache, whole."""

    folder: Path
    record: Record

    @property
    def image(self) -> Path:
        """What QEMU boots."""
        return self.folder / "Image"

    @property
    def headers(self) -> Path:
        """The kernel's UAPI headers as user space includes them."""
        return self.folder / "build/usr/include"

    @property
    def config(self) -> Path:
        """The whole .config."""
        return self.folder / "build/.config"

    def selftest(self, name: str) -> Path:
        """A static arm64 program of the kernel's KVM selftests.

        :raises UsageError: that one was not built
        """
        if name not in self.record.selftests:
            built = ", ".join(self.record.selftests) or "none"
            raise UsageError(f"no selftest {name!r} was built; there is: {built}")
        return self.folder / "build/kselftest-kvm" / name


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_record(folder: Path) -> Record | None:
    try:
        raw = json.loads((folder / "build.json").read_text())
        record = Record(**{**raw, "series": tuple(raw["series"]), "selftests": tuple(raw["selftests"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none, or written by another version of this program: build again
    return record if (folder / "Image").is_file() else None


def current(variant: str | None = None) -> BuiltKernel:
    """The kernel that was built last.

    :param variant: one of VARIANTS; None is the ordinary kernel
    :raises ToolMissing: there is none
    """
    origin = _origin(variant)
    if origin is not None:
        folder = _place(origin, variant)
        record = _read_record(folder)
        if record is not None:
            return BuiltKernel(folder, record)
    name, option = (f" {variant}", f" --variant {variant}") if variant else ("", "")
    if cache.is_locked("kernel"):
        raise ToolMissing(
            f"the lab has no kernel{name} yet, but a build is under way: try again when it has ended, or "
            f"wait for it with `prefault lab build{option}`"
        )
    raise ToolMissing(f"the lab has no kernel{name} yet: run `prefault lab build{option}`")


def _origin(variant: str | None) -> Path | None:
    """The folder of the source that a variant was built from, if there is one: its own, or the last."""
    base = variants.of(variant).base
    if base != source.SERIES_VERSION:
        return source.folder_of(None, base)
    pointer = cache.root() / "kernel" / "current"
    return pointer.parent / pointer.read_text() if pointer.is_file() else None


def _place(folder: Path, variant: str | None) -> Path:
    """Where a variant is built, within the folder of its source."""
    shared = variant and variants.of(variant).base == source.SERIES_VERSION
    return folder / "variants" / str(variant) if shared else folder


def kernel_image(variant: str | None = None) -> Path:
    """The Image to boot: $PREFAULT_LAB_KERNEL, for work on the kernel, or what was built last.

    :param variant: one of VARIANTS, whatever the environment says
    :raises ToolMissing: nothing was built
    """
    override = os.environ.get("PREFAULT_LAB_KERNEL")
    if variant or not override:
        return current(variant).image
    if not Path(override).is_file():
        raise UsageError(f"PREFAULT_LAB_KERNEL={override}: no such file")
    return Path(override)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out, apart from the source and the compiler.

    :ivar fragments: of the config; later ones win
    """

    fragments: tuple[Path, ...]
    config: str
    """The fragments as one, as they were when they were read."""
    series: Series
    selftests: tuple[str, ...]


def recipe_for(version: str, kernel_folder: Path = KERNEL_FOLDER, variant: str | None = None) -> Recipe:
    """The series and config for a kernel version: its own folder, or the newest one there is.

    :raises UsageError: the folder kernel/ of the repository is not where it should be
    """
    names = ("lab", variant) if variant else ("lab",)
    fragments = tuple(kernel_folder / f"config/{name}.config" for name in names)
    for fragment in fragments:
        if not fragment.is_file():
            raise UsageError(f"{fragment} is not there: run prefault from its repository (pip install -e .)")
    own = kernel_folder / f"v{'.'.join(version.split('.')[:2])}"
    folder = own if own.is_dir() else max(kernel_folder.glob("v*"), key=_by_version)
    patches = series.read(folder)
    selftests = folder / "selftests"
    listed = tuple(selftests.read_text().split()) if selftests.exists() else ()
    merged = config.merged(*(fragment.read_text() for fragment in fragments))
    return Recipe(fragments, merged, patches, listed if patches.patches else ())


def _by_version(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.removeprefix("v").split(".") if part.isdigit())


def _wanted(origin: Source, recipe: Recipe) -> tuple[str, ...]:
    config_sha256 = hashlib.sha256(recipe.config.encode()).hexdigest()
    return (origin.identity, config_sha256, recipe.series.sha256, tools.compiler_version(), *recipe.selftests)


def build(
    tree: Path | None = None,
    *,
    variant: str | None = None,
    jobs: int = 0,
    progress: Progress | None = None,
) -> BuiltKernel:
    """Have the lab's kernel and root file system, building what is not there or no longer right.

    :param tree: a kernel tree of the user's own, only read; None is Debian's source package
    :param variant: one of VARIANTS, built and kept beside the ordinary kernel; None is that one
    :param jobs: parallel compilers; 0 is one per CPU
    :raises BuildFailed: a patch, checkpatch, Kconfig or the compiler objects
    :raises ToolMissing: something must be installed first
    :raises UsageError: ``tree`` is no kernel tree
    """
    progress = progress or Silent()
    progress.stage("root file system")
    rootfs.base()
    with cache.locked("kernel"):
        progress.stage("kernel source")
        cache.remove_leftovers(cache.root() / "kernel")
        base = variants.of(variant).base
        origin = source.own(tree) if tree is not None else source.packaged(base)
        recipe = recipe_for(source.version_of(origin.tree), variant=variant)
        folder = _place(origin.folder, variant)
        record = _read_record(folder)
        if record is None or record.inputs() != _wanted(origin, recipe):
            record = _make(origin, recipe, folder, jobs or os.cpu_count() or 1, progress)
        if base == source.SERIES_VERSION:
            cache.write_file(cache.root() / "kernel/current", origin.folder.name.encode())
    return BuiltKernel(folder, record)


def _make(origin: Source, recipe: Recipe, folder: Path, jobs: int, progress: Progress) -> Record:
    """Build into ``folder``."""
    absent = tools.missing(tools.BUILD_TOOLS)
    if absent:
        listed = "; ".join(f"{tool.name}: {problem}" for tool, problem in absent.items())
        raise ToolMissing(f"the kernel cannot be built ({listed}): run `prefault lab build --yes`")
    cache.need_space(folder, BUILD_MIB << 20, "the kernel build")
    cache.remove_leftovers(folder)
    (folder / "build.json").unlink(missing_ok=True)
    # Before anything is read: what changes during the build is not in it.
    identity, config_sha256, patches, compiler, *selftests = _wanted(origin, recipe)
    log = folder / "build.log"
    log.unlink(missing_ok=True)
    make = Make(origin.tree, folder / "build", log, jobs)
    ordinary = folder == origin.folder
    started = time.monotonic()

    progress.stage("series and checkpatch")
    series.apply(recipe.series, origin)
    if ordinary:
        checks.checkpatch(recipe.series, origin)
    fragment = folder / "fragment.config"
    cache.write_file(fragment, recipe.config.encode())
    _compile(make, fragment, progress)
    if recipe.selftests:
        progress.stage("selftests")
        kbuild.build_selftests(make, recipe.selftests)
    if ordinary:
        progress.stage("warnings (W=1)")
        checks.extra_warnings(recipe.series, origin, make, fragment)

    image = make.output / "arch/arm64/boot/Image"
    cache.write_file(folder / "Image", image.read_bytes())
    record = Record(
        version=source.version_of(origin.tree),
        source=origin.name,
        identity=identity,
        config_sha256=config_sha256,
        series_sha256=patches,
        series=tuple(patch.name for patch in recipe.series.patches),
        compiler=compiler,
        image_sha256=_sha256(image),
        selftests=tuple(selftests),
        seconds=round(time.monotonic() - started, 1),
    )
    cache.write_file(folder / "build.json", json.dumps(asdict(record), indent=2).encode())
    return record


def _compile(make: Make, fragment: Path, progress: Progress) -> None:
    progress.stage("config")
    make.configure(fragment)
    fresh = not (make.output / "vmlinux").exists()
    progress.stage("compiling", USUAL_STEPS if fresh else 0)
    output = make.run("Image", "headers", on_step=progress.step)
    kbuild.fail_on_warnings(output, make.tree, "compiling the kernel")
    if not (make.output / "arch/arm64/boot/Image").is_file():
        raise LabError(f"make ended well but made no Image; see {make.log}")


def commands(
    tree: Path | None = None, *, variant: str | None = None, jobs: int = 0
) -> tuple[tuple[str, ...], ...]:
    """Command lines that a build from nothing would run, for reading. Nothing is run or fetched."""
    listed: list[tuple[str, ...]] = []
    base = variants.of(variant).base
    folder = source.folder_of(tree, base)
    if folder is None:
        listed.append(("apt-get", "download", source.package(base), f"# from {source.SUITES[base]}"))
        folder = cache.root() / "kernel/debian-VERSION"
    version = source.version_of(tree) if tree is not None else base
    recipe = recipe_for(version, variant=variant)
    place = _place(folder, variant)
    listed += [("git", "apply", "--whitespace=nowarn", str(patch)) for patch in recipe.series.patches]
    make = Make(folder / "tree", place / "build", place / "build.log", jobs or os.cpu_count() or 1)
    listed.append(("cat", *map(str, recipe.fragments), f"# as one, into {place / 'fragment.config'}"))
    listed.append(make.command(f"KCONFIG_ALLCONFIG={place / 'fragment.config'}", "allnoconfig"))
    listed.append(make.command("Image", "headers"))
    if recipe.selftests:
        listed.append(kbuild.selftest_command(make, recipe.selftests))
    return tuple(listed)
