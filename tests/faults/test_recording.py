# SPDX-License-Identifier: Apache-2.0
"""Recordings: what is written is what is read, and anybody's Parquet reader can read it."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from prefault.errors import UsageError
from prefault.faults import recording
from prefault.faults.recording import SCHEMA, Columns, Metadata, Recording
from prefault.faults.syndrome import ACCESSES, KINDS, NO_LEVEL
from tests.faults.recordings import Fault, recording_of

DOCS = Path(__file__).parents[2] / "docs/recording.md"


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    count = draw(st.integers(0, 8))

    def column(
        kind: type[np.generic], values: st.SearchStrategy[int]
    ) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
        return draw(stn.arrays(kind, count, elements=values))

    faults = Columns(
        column(np.int64, st.integers(0, 2**60)),  # type: ignore[arg-type]
        column(np.int64, st.integers(-1, 2**40)),  # type: ignore[arg-type]
        column(np.int32, st.integers(-1, 2**22)),  # type: ignore[arg-type]
        column(np.int32, st.integers(1, 2**22)),  # type: ignore[arg-type]
        column(np.int16, st.integers(-1, 4095)),  # type: ignore[arg-type]
        column(np.uint64, st.integers(0, 2**64 - 1)),  # type: ignore[arg-type]
        column(np.int8, st.integers(0, len(KINDS) - 1)),  # type: ignore[arg-type]
        column(np.int8, st.integers(0, len(ACCESSES) - 1)),  # type: ignore[arg-type]
        column(np.int8, st.sampled_from([NO_LEVEL, -1, 0, 1, 2, 3])),  # type: ignore[arg-type]
        column(np.int8, st.integers(-1, 1)),  # type: ignore[arg-type]
        column(np.uint64, st.integers(0, 2**64 - 1)),  # type: ignore[arg-type]
    )
    threads = draw(
        st.dictionaries(st.integers(1, 99), st.tuples(st.integers(0, 99), st.text(max_size=5)), max_size=2)
    )
    return Recording(Metadata("aarch64", 4096, "7.3.4", "live", threads=threads), faults.in_order())


@given(recordings())
def test_what_is_written_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, one: Recording) -> None:
    path = tmp_path_factory.mktemp("one") / "x.parquet"
    recording.write(one, path)
    found = recording.read(path)
    assert found.metadata == one.metadata
    for name in vars(one.faults):
        mine, theirs = getattr(found.faults, name), getattr(one.faults, name)
        assert (mine.dtype, mine.tolist()) == (theirs.dtype, theirs.tolist()), name


def small() -> Recording:
    """One fault of which little is known."""
    one = [np.array([value], kind) for value, kind in ((5, np.int64), (-1, np.int64), (-1, np.int32))]
    two = [np.array([7], np.int32), np.array([-1], np.int16), np.array([4096], np.uint64)]
    three = [np.array([0], np.int8), np.array([1], np.int8), np.array([NO_LEVEL], np.int8)]
    four = [np.array([-1], np.int8), np.array([0x9200_0047], np.uint64)]
    return Recording(Metadata("aarch64", 4096), Columns(*one, *two, *three, *four))  # type: ignore[arg-type]


def test_other_readers_see_words_and_empty_values(tmp_path: Path) -> None:
    recording.write(small(), tmp_path / "x.parquet")
    (row,) = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert (row["kind"], row["access"], row["ipa"]) == ("translation", "write", 4096)
    assert [name for name, value in row.items() if value is None] == [
        "duration_ns",
        "pid",
        "vcpu",
        "level",
        "nested",
    ]


def test_a_recording_that_another_tool_wrote_with_plain_strings_is_read(tmp_path: Path) -> None:
    table = recording.table(small())
    plain = table.set_column(6, "kind", pa.array(["permission"])).append_column("more", pa.array([1]))
    pq.write_table(plain.replace_schema_metadata(table.schema.metadata), tmp_path / "x.parquet")
    assert recording.read(tmp_path / "x.parquet").faults.kind.tolist() == [1]


def with_metadata(**fields: object) -> dict[bytes, bytes]:
    about = {"version": 1, **dataclasses.asdict(small().metadata), **fields}
    return {b"prefault": json.dumps(about).encode()}


def damaged() -> dict[str, pa.Table]:
    table = recording.table(small())
    about = table.schema.metadata
    return {
        "has no 'prefault'": table.replace_schema_metadata(None),
        "no column ipa": table.drop_columns(["ipa"]),
        "1 empty values": table.set_column(
            0, "time_ns", pa.array([None], pa.int64())
        ).replace_schema_metadata(about),
        "is string, not": table.set_column(5, "ipa", pa.array(["x"])).replace_schema_metadata(about),
        "is none of": table.set_column(6, "kind", pa.array(["?"])).replace_schema_metadata(about),
        "of version 99": table.replace_schema_metadata({b"prefault": b'{"version": 99}'}),
        "damaged": table.replace_schema_metadata({b"prefault": b"{"}),
        "RecursionError": table.replace_schema_metadata({b"prefault": b"[" * 100_000}),
        "page size is 0": table.replace_schema_metadata(with_metadata(page_size=0)),
        "'page_size' in its metadata is no int": table.replace_schema_metadata(
            with_metadata(page_size=4096.0)
        ),
        "'kernel' in its metadata is no str": table.replace_schema_metadata(with_metadata(kernel=["<td>"])),
        "'seconds' in its metadata is no float": table.replace_schema_metadata(with_metadata(seconds=1e999)),
        "a count is negative": table.replace_schema_metadata(with_metadata(lost_events=-1)),
        "process id is none": table.replace_schema_metadata(with_metadata(threads={"1": [1 << 40, "x"]})),
        "no object": table.replace_schema_metadata(with_metadata(threads=[1])),
    }


@pytest.mark.parametrize("message", damaged())
def test_what_is_no_recording_is_refused_with_a_reason(tmp_path: Path, message: str) -> None:
    pq.write_table(damaged()[message], tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=message):
        recording.read(tmp_path / "x.parquet")


def test_faults_that_another_tool_has_mixed_up_are_put_in_order(tmp_path: Path) -> None:
    one = small()
    three = pa.concat_tables([recording.table(one)] * 3)
    mixed = three.set_column(0, recording.SCHEMA.field(0), pa.array([7, 3, 5]))
    pq.write_table(mixed.replace_schema_metadata(with_metadata()), tmp_path / "x.parquet")
    assert recording.read(tmp_path / "x.parquet").faults.time_ns.tolist() == [3, 5, 7]
    apart = three.set_column(0, recording.SCHEMA.field(0), pa.array([-(1 << 63), 0, (1 << 63) - 1]))
    pq.write_table(apart.replace_schema_metadata(with_metadata()), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="292 years"):
        recording.read(tmp_path / "x.parquet")


def test_a_name_that_is_no_utf8_is_as_good_as_another(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.parquet")
    recording.write(small(), path)
    assert len(recording.read(path)) == 1


@pytest.mark.parametrize(("pids", "ipas"), [([1], [4096]), ([2, 9], [8192]), ([1, 2], [4096, 8192])])
def test_the_faults_of_some_processes_can_be_taken(pids: list[int], ipas: list[int]) -> None:
    one = small()
    both = Columns(*(np.repeat(getattr(one.faults, part.name), 2) for part in dataclasses.fields(Columns)))
    both.pid, both.ipa = np.array([1, 2], np.int32), np.array([4096, 8192], np.uint64)
    of_both = Recording(one.metadata, both)
    assert recording.of_processes(of_both, pids, "x").faults.ipa.tolist() == ipas
    with pytest.raises(UsageError, match="--pid 3: x has no fault of that process; it has those of 1, 2"):
        recording.of_processes(of_both, [3], "x")
    with pytest.raises(UsageError, match="does not say whose"):
        recording.of_processes(one, [3], "x")


def test_what_does_not_begin_as_parquet_is_not_read_to_its_end() -> None:
    with pytest.raises(UsageError, match="does not begin as Parquet"):
        recording.read(Path("/dev/zero"))


def test_a_recording_may_come_through_a_pipe(tmp_path: Path) -> None:
    made = recording_of([Fault(1)])
    recording.write(made, tmp_path / "whole")
    os.mkfifo(tmp_path / "pipe")
    text = (tmp_path / "whole").read_bytes()
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(text,), daemon=True).start()
    assert recording.table(recording.read(tmp_path / "pipe")).equals(recording.table(made))


def test_a_file_that_is_no_parquet_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("12.345678: kvm_guest_fault:")
    with pytest.raises(UsageError, match="prefault record --from"):
        recording.read(tmp_path / "x")
    with pytest.raises(UsageError, match="No such file"):
        recording.read(tmp_path / "y")


def test_a_recording_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "x.parquet").write_text("before")
    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        recording.write(small(), tmp_path / "x.parquet")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_the_documents_name_every_column_and_every_fact() -> None:
    page = DOCS.read_text()
    for field in SCHEMA:
        assert f"| `{field.name}` |" in page
    for fact in dataclasses.fields(Metadata):
        assert f"| `{fact.name}` |" in page
    for word in (*KINDS, *ACCESSES):
        assert f"`{word}`" in page
