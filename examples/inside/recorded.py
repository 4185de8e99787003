# SPDX-License-Identifier: Apache-2.0
"""``python3 recorded.py CAPTURE COMMAND...``: run a command, and capture the stage-2 faults of its guests."""

from __future__ import annotations

import signal
import subprocess
import sys


def main(capture: str, *command: str) -> int:
    """The command's exit status."""
    argv = (sys.executable, "-m", "prefault.faults.capture", "--output", capture)
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as recorder:
        assert recorder.stderr
        recorder.stderr.readline()  # it says how far it is once it has begun
        status = subprocess.run(command, check=False).returncode
        recorder.send_signal(signal.SIGINT)
        recorder.communicate()
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
