# SPDX-License-Identifier: Apache-2.0
"""What is put on top of the root file system for one run: the prefault package and the job's files.

Libraries that the package needs inside, of which there is one, are put beside it. They are pure Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import fdt

import prefault
from prefault.errors import UsageError
from prefault.lab import cpio, rootfs
from prefault.lab.agent import JOB_FILE, PACKAGE_DIR, Order

_HOST_ONLY = ("cli", "conform", "report")
"""Parts of the package that need more than the standard library."""
_PARTS_OF = {
    "lab": ("__init__.py", "agent.py", "frames.py"),
    "faults": ("__init__.py", "capture.py", "captured.py", "foreign.py", "plan.py"),
}
"""Where only some modules of a part do without more."""
_LIBRARIES = (fdt,)
"""What parts of the package import inside, besides the standard library."""


@dataclass(frozen=True)
class JobFile:
    """A file to put into the lab, with its permissions."""

    data: bytes
    mode: int = 0o644


def package() -> Iterator[cpio.Entry]:
    """The prefault package, as far as it runs inside, and the libraries that it needs there."""
    top = Path(prefault.__file__).parent
    for path in sorted(top.rglob("*.py")):
        inner = path.relative_to(top)
        if inner.parts[0] in _HOST_ONLY:
            continue
        if inner.name not in _PARTS_OF.get(inner.parts[0], (inner.name,)):
            continue
        yield from _module(f"prefault/{inner}", path)
    for library in _LIBRARIES:
        folder = Path(str(library.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            yield from _module(f"{folder.name}/{path.relative_to(folder)}", path)


def _module(inside: str, path: Path) -> Iterator[cpio.Entry]:
    name = f"{PACKAGE_DIR.lstrip('/')}/{inside}"
    yield cpio.file(name, path.read_bytes())
    compiled = rootfs.byte_code(name, path)
    if compiled is not None:
        yield compiled


def archive(order: Order, files: Mapping[str, bytes | JobFile]) -> bytes:
    """The second archive of the initial RAM file system.

    :raises UsageError: a path of ``files`` is not absolute
    """
    entries = [*package(), cpio.file(JOB_FILE, order.to_json().encode())]
    for path, content in files.items():
        if not path.startswith("/"):
            raise UsageError(f"{path!r} is not an absolute path: the lab has no current folder to put it in")
        content = content if isinstance(content, JobFile) else JobFile(content)
        entries.append(cpio.file(path, content.data, content.mode))
    return cpio.write(entries)


def shell_archive() -> bytes:
    """The second archive when a person comes instead of a job."""
    return cpio.write(package())
