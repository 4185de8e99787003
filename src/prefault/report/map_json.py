# SPDX-License-Identifier: Apache-2.0
"""Stage-2 tables as JSON types."""

from __future__ import annotations

from prefault.kvm.stage2 import Run
from prefault.report.map import Change, Look, TableMap, look_of


def table_json(table: TableMap) -> dict[str, object]:
    """All of a table: every run, and what they add up to."""
    shadow = table.shadow
    return {
        "name": table.name,
        "page_size": table.page_size,
        "page_size_certain": not table.other_sizes,
        "ipa_bits": table.ipa_bits,
        "start_level": table.start_level,
        "tables": None if table.flat else {str(level): number for level, number in table.tables.items()},
        "mapped_bytes": table.mapped,
        "leaves": {str(level): number for level, number in table.leaves.items()},
        "shadow": {"vttbr": shadow.vttbr, "vtcr": shadow.vtcr, "enabled": shadow.enabled} if shadow else None,
        "runs": [_run_json(table, run) for run in table.runs],
    }


def _run_json(table: TableMap, run: Run) -> dict[str, object]:
    place: dict[str, object] = {"ipa": run.ipa, "size": run.size, "level": run.level}
    look = look_of(run)
    if look is None:
        return {**place, "leaves": 0}
    return {**place, "leaves": table.number(look, run.size), **_attributes(look)}


def _attributes(look: Look) -> dict[str, object]:
    return {name: value for name, value in look._asdict().items() if name != "level"} if look else {}


def change_json(change: Change) -> dict[str, object]:
    """A range with what was and what is there; null for a hole."""
    return {
        "ipa": change.ipa,
        "size": change.size,
        "before": change.before and change.before._asdict(),
        "after": change.after and change.after._asdict(),
    }
