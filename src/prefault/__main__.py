# SPDX-License-Identifier: Apache-2.0
"""``python3 -m prefault`` is ``prefault``."""

import sys

from prefault.cli.main import main

sys.exit(main())
