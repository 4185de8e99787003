# SPDX-License-Identifier: Apache-2.0
"""The VMM as a program: an order as JSON in a file, the outcome as JSON in another; the console is stdout.

``python3 -m prefault.vmm ORDER RESULT``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prefault.errors import ExitCode, PrefaultError
from prefault.vmm import app, snapshot
from prefault.vmm.order import boot_from, restore_from


def main(order_file: str, result_file: str) -> int:
    """Do the order; exit status."""
    raw = json.loads(Path(order_file).read_text())
    unpacked, packed = raw.pop("unpack", None), raw.pop("pack", None)
    do = raw.pop("do")
    try:
        if unpacked:
            snapshot.unpack(Path(unpacked).read_bytes(), Path(raw["folder"]))
            Path(unpacked).unlink()
        outcome = app.boot(boot_from(raw)) if do == "boot" else app.restore(restore_from(raw))
        if packed and outcome.snapshot and "error" not in outcome.snapshot:
            snapshot.pack(Path(str(outcome.snapshot["folder"])), Path(packed))
    except PrefaultError as error:
        facts = {"type": type(error).__name__, "message": str(error), "exit_code": int(error.exit_code)}
        Path(result_file).write_text(json.dumps({"error": facts}))
        return error.exit_code
    Path(result_file).write_text(json.dumps(outcome.to_json()))
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
