# SPDX-License-Identifier: Apache-2.0
"""Which listed scenarios show which requirement, as a table in Markdown.

``python -m prefault.report.coverage PAGE`` writes it into the page, between its markers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from prefault.scenarios import SCENARIOS, Scenario

BEGIN, END = "<!-- coverage -->", "<!-- end of coverage -->"
REQUIREMENTS = tuple(f"M{number}" for number in range(1, 17))


def coverage_table(scenarios: Iterable[Scenario] = SCENARIOS.values()) -> str:
    """A row for each requirement: its scenarios by name, with the number of cases where there are several."""
    cases: dict[str, dict[str, int]] = {requirement: {} for requirement in REQUIREMENTS}
    for one in scenarios:
        name = one.name.partition("[")[0]
        for requirement in one.requirements:
            cases[requirement][name] = cases[requirement].get(name, 0) + 1
    rows = ["| # | cases | scenarios |", "| --- | --- | --- |"]
    for requirement, names in cases.items():
        listed = ", ".join(
            f"`{name}`" + (f" ({count})" if count > 1 else "") for name, count in names.items()
        )
        rows.append(f"| {requirement} | {sum(names.values())} | {listed or 'none'} |")
    return "\n".join(rows)


def updated(page: str) -> str:
    """A page with the table as it is now.

    :raises ValueError: the page has no place for it
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{coverage_table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(updated(path.read_text()))
