# SPDX-License-Identifier: Apache-2.0
"""Plan files: they fit the schema that is shipped, are read back, and are refused if they cannot be."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import UsageError
from prefault.faults.plan import Plan, dumps, from_json, load
from prefault.faults.planning import PlanConfig, make_plan
from tests.faults.recordings import RECORDINGS, Fault, recording_of

SCHEMA: dict[str, Any] = json.loads(files("prefault.faults").joinpath("plan.schema.json").read_text())
DOCS = Path(__file__).parents[2] / "docs/plan.md"
PLANS = st.builds(
    lambda runs, granule: make_plan(runs, PlanConfig(granule)).plan,
    st.lists(RECORDINGS, min_size=1, max_size=2),
    st.sampled_from([4096, 65536]),
)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@given(PLANS)
def test_every_plan_fits_the_schema_and_is_read_back(plan: Plan) -> None:
    values = json.loads(dumps(plan))
    jsonschema.validate(values, SCHEMA)
    assert from_json(values) == plan
    assert plan.to_json() == values | {
        "ranges": plan.to_json()["ranges"],
        "advice": plan.to_json()["advice"],
    } | {"sources": plan.sources}


def small() -> dict[str, Any]:
    plan = make_plan([recording_of([Fault(1), Fault(100, 5)])], PlanConfig(4096)).plan
    return dict(json.loads(dumps(plan)))


def test_fields_that_are_not_known_are_passed_over() -> None:
    values = small() | {"new": 1}
    values["ranges"][0]["new"] = 2
    jsonschema.validate(values, SCHEMA)
    assert from_json(values) == from_json(small())


def changed(**fields: object) -> dict[str, Any]:
    return small() | fields


def changed_range(**fields: object) -> dict[str, Any]:
    values = small()
    values["ranges"][1] |= fields
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "no plan"),
        (changed(format="x"), "no plan"),
        (changed(version=2), "of version 2"),
        (changed(version="1"), "of version 1"),
        (changed(page_size=5), "page size is 5"),
        (changed(ranges=None), "no whole plan"),
        (changed(ranges=[{"ipa": 1}]), "no whole plan"),
        (changed(prediction={}), "no whole plan"),
        (changed_range(ipa=1), "not of whole pages"),
        (changed_range(size=0), "not of whole pages"),
        (changed_range(size=1 << 65), "not of whole pages"),
        (changed_range(ipa=4096), "overlaps"),
        (changed_range(ipa="x"), "no whole plan"),
    ],
)
def test_what_is_no_plan_is_refused_with_a_reason(values: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_json(values)


def test_a_file_that_is_no_json_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("{")
    with pytest.raises(UsageError, match="no plan"):
        load(tmp_path / "x")
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "y")


def test_the_documents_name_every_field() -> None:
    page = DOCS.read_text()
    parts = SCHEMA["properties"]
    names = [*parts, *parts["prediction"]["properties"], *parts["ranges"]["items"]["properties"]]
    assert [name for name in names if f"`{name}`" not in page] == []
