# SPDX-License-Identifier: Apache-2.0
"""Make the virtual environment in .venv: what ``make venv`` runs. Standard library only.

Debian splits ensurepip out of Python into python3-venv, so on a bare machine ``python3 -m venv``
alone gives an environment without pip. In this order: the venv module, ``virtualenv`` if it is
installed, and, as root where apt-get is, Debian's python3-venv package.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
NEEDED = (3, 11)
APT_INSTALL = ("apt-get", "install", "--yes", "--no-install-recommends", "python3-venv")


def main() -> None:
    """Make .venv if there is none that works, then install the project and its tools into it."""
    if sys.version_info < NEEDED:
        version = ".".join(map(str, sys.version_info[:3]))
        sys.exit(
            f"bootstrap: Python 3.11 or newer is needed, {sys.executable} is {version}; use make PYTHON=…"
        )
    if not _works():
        shutil.rmtree(VENV, ignore_errors=True)
        _create()
    _run(str(VENV / "bin/python"), "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[dev]")


def _works() -> bool:
    """Whether .venv has a Python that still runs, and pip."""
    python = VENV / "bin/python"
    return (
        python.exists()
        and not subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode
    )


def _create() -> None:
    if importlib.util.find_spec("ensurepip") is None and not shutil.which("virtualenv"):
        _install_venv_package()
    if shutil.which("virtualenv") and importlib.util.find_spec("ensurepip") is None:
        _run("virtualenv", "--quiet", "--python", sys.executable, str(VENV))
    else:
        _run(sys.executable, "-m", "venv", str(VENV))


def _install_venv_package() -> None:
    command = " ".join(APT_INSTALL)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        sys.exit(f"bootstrap: this Python has no ensurepip; as root: {command}")
    print(f"bootstrap: this Python has no ensurepip; running: {command}", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if subprocess.run(APT_INSTALL, env=environment, stdin=subprocess.DEVNULL).returncode:
        # The package lists of a new machine may be absent or old.
        _run("apt-get", "update")
        _run(*APT_INSTALL)
    importlib.invalidate_caches()


def _run(*command: str) -> None:
    status = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
    if status:
        sys.exit(f"bootstrap: {' '.join(command)} ended with status {status}")


if __name__ == "__main__":
    main()
