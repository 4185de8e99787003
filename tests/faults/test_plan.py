# SPDX-License-Identifier: Apache-2.0
"""Plan files: they fit the schema that is shipped, are read back, and are refused if they cannot be."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import threading
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.errors import UsageError
from prefault.faults import plan as plan_module
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
    values = small()
    plain = from_json(copy.deepcopy(values))
    values["new"] = values["ranges"][0]["new"] = values["prediction"]["new"] = 1
    jsonschema.validate(values, SCHEMA)
    assert from_json(values) == plain


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
        (changed(ranges=[{"ipa": 1}]), "no whole plan: its range has no 'size'"),
        (changed(prediction={}), "no whole plan: its prediction has no 'faults'"),
        (changed_range(ipa=1), "not of whole pages"),
        (changed_range(size=0), "not of whole pages"),
        (changed_range(size=1 << 65), "beyond 2.52"),
        (changed_range(ipa=1 << 52), "beyond 2.52"),
        (changed_range(size=4096.0), "'size' in its range is no int"),
        (changed_range(ipa=True), "'ipa' in its range is no int"),
        (changed_range(pages="many"), "'pages' in its range is no int"),
        (changed(ranges={}), "'ranges' is no list"),
        (changed(ranges=["ipa"]), "its range is no object"),
        (changed(page_size=4096.0), "'page_size' in its plan is no int"),
        (changed(pays=1), "'pays' in its plan is no bool"),
        (changed(cap="all"), "'cap' in its plan is no int . None"),
        (changed(sources="x"), "'sources' is no list"),
        (changed(prediction=None), "its prediction is no object"),
        (changed(prediction=small()["prediction"] | {"fault_ns": 1e999}), "'fault_ns' in its prediction"),
        ({"format": "prefault-plan", "version": 1}, "no whole plan: .* has no"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "no plan"),
        (b"\xff{}", "no plan"),
        (json.dumps(small()).replace('"granule": 4096', '"granule": NaN'), "NaN is no number"),
        (json.dumps(small())[:-1] + ', "ranges": []}', "'ranges' is there twice"),
        (
            json.dumps(small()).replace('"size": 4096', '"size": 4096, "size": 8192', 1),
            "'size' is there twice",
        ),
        (json.dumps(small()).replace('"size": 4096', '"size": ' + "9" * 9999, 1), "no plan"),
    ],
)
def test_json_that_says_nothing_or_two_things_is_refused(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    (tmp_path / "x").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "x")


@pytest.mark.parametrize("name", ["/dev/zero", "pipe"])
def test_what_is_larger_than_any_plan_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(plan_module, "MOST_BYTES", 1 << 16)
    path = tmp_path / name
    if name == "pipe":
        os.mkfifo(path)
        threading.Thread(target=fill, args=(path,), daemon=True).start()
    with pytest.raises(UsageError, match="no plan: it has more than"):
        load(path)


def test_a_plan_that_could_not_be_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = from_json(small())
    monkeypatch.setattr(plan_module, "MOST_BYTES", len(dumps(plan)))
    assert dumps(plan)
    monkeypatch.setattr(plan_module, "MOST_BYTES", len(dumps(plan)) - 1)
    with pytest.raises(UsageError, match="a plan of 2 ranges is larger"):
        dumps(plan)


def fill(pipe: Path) -> None:
    """Write until nobody reads any more."""
    with contextlib.suppress(BrokenPipeError), pipe.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


def test_a_plan_may_come_through_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    text = json.dumps(small())
    threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,), daemon=True).start()
    assert load(tmp_path / "pipe") == from_json(small())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)


@given(st.data())
def test_whatever_is_put_into_a_plan_it_is_whole_or_refused(data: st.DataObject) -> None:
    values = small()
    part = data.draw(st.sampled_from([values, values["ranges"][0], values["prediction"]]))
    name = data.draw(st.sampled_from(sorted(part)))
    part[name] = data.draw(JSON)
    try:
        plan = from_json(values)
    except UsageError:
        return
    assert all(type(number) is int for one in plan.ranges for number in (one.ipa, one.size))
    assert all(one.ipa >= 0 and one.size > 0 and one.ipa + one.size <= 1 << 52 for one in plan.ranges)
    assert json.loads(dumps(plan)) == json.loads(dumps(from_json(json.loads(dumps(plan)))))


def test_the_documents_name_every_field() -> None:
    page = DOCS.read_text()
    parts = SCHEMA["properties"]
    names = [*parts, *parts["prediction"]["properties"], *parts["ranges"]["items"]["properties"]]
    assert [name for name in names if f"`{name}`" not in page] == []
