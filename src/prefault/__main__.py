# SPDX-License-Identifier: Apache-2.0
"""``python3 -m prefault`` is ``prefault``."""

import sys

INTERRUPTED = 130


def run() -> int:
    """Run ``prefault``. Ctrl-C has its message also in the moment that it takes to begin."""
    try:
        from prefault.cli.main import main
    except KeyboardInterrupt:
        print("prefault: interrupted", file=sys.stderr)
        return INTERRUPTED
    return main()


if __name__ == "__main__":
    sys.exit(run())
