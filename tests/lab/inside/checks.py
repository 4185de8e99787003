# SPDX-License-Identifier: Apache-2.0
"""Collects checks that run inside the lab, many to one boot, and reports each as a JSON line.

A check is a function without arguments, named after what must hold. Standard library only.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable

from prefault.errors import Missing

Check = Callable[[], None]


class Checks:
    """The checks of one module, by name."""

    def __init__(self) -> None:
        self.by_name: dict[str, Check] = {}

    def __call__(self, check: Check) -> Check:
        """Decorator: add a check."""
        self.by_name[check.__name__] = check
        return check

    def each(self, cases: Iterable[object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Decorator: add a check once for every case, which it is given, and which ends its name."""

        def add(check: Callable[..., None]) -> Callable[..., None]:
            for case in cases:
                arguments = case if isinstance(case, tuple) else (case,)
                label = "-".join(str(getattr(one, "value", one)) for one in arguments)
                self.by_name[f"{check.__name__}[{label}]"] = _bind(check, arguments)
            return check

        return add

    def run(self) -> int:
        """Run all; the number that failed."""
        failed = 0
        for name, check in self.by_name.items():
            start = time.monotonic()
            outcome, text = _outcome(check)
            failed += outcome == "failed"
            seconds = round(time.monotonic() - start, 3)
            print(
                json.dumps({"name": name, "outcome": outcome, "text": text, "seconds": seconds}), flush=True
            )
        return failed


def _bind(check: Callable[..., None], arguments: tuple[object, ...]) -> Check:
    return lambda: check(*arguments)


def _outcome(check: Check) -> tuple[str, str]:
    try:
        check()
    except Missing as error:
        return "skipped", str(error)
    except Exception:
        return "failed", traceback.format_exc()
    return "passed", ""


def main(checks: Checks) -> None:
    """Run as a script."""
    sys.exit(1 if checks.run() else 0)
