# SPDX-License-Identifier: Apache-2.0
"""A recording: the stage-2 faults of one run, in columns, and its file, which is Parquet.

docs/recording.md documents the schema.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefault.errors import UsageError
from prefault.faults.foreign import check_page_size, known, threads
from prefault.faults.syndrome import ACCESSES, KINDS, NO_LEVEL

VERSION = 1
"""Raised when a column changes its meaning or goes away, not when one is added."""

_KEY = b"prefault"
_MAGIC = b"PAR1"

SCHEMA = pa.schema(
    [
        pa.field("time_ns", pa.int64(), nullable=False),
        pa.field("duration_ns", pa.int64()),
        pa.field("pid", pa.int32()),
        pa.field("tid", pa.int32(), nullable=False),
        pa.field("vcpu", pa.int16()),
        pa.field("ipa", pa.uint64(), nullable=False),
        pa.field("kind", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("access", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("level", pa.int8()),
        pa.field("nested", pa.bool_()),
        pa.field("syndrome", pa.uint64(), nullable=False),
    ]
)
_WORDS = {"kind": KINDS, "access": ACCESSES}


@dataclass
class Arrays:
    """Base of dataclasses of arrays of one length, whose values belong together."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def take(self, which: npt.NDArray[Any]) -> Self:
        """Some of them, in the order asked for: by index, or those that are True."""
        return type(self)(*(getattr(self, one.name)[which] for one in fields(self)))


@dataclass
class Columns(Arrays):
    """Faults in order of time. Values that are not known are -1, a level is NO_LEVEL.

    :ivar time_ns: of the trace's clock
    :ivar duration_ns: from the guest's stop to its going on
    :ivar vcpu: KVM's number of it
    :ivar ipa: as the trace has it; arm64's are multiples of 4 KiB
    :ivar kind: a ``syndrome.Kind``
    :ivar access: a ``syndrome.Access``
    :ivar nested: 1 for a fault of a nested guest, whose ``ipa`` is then its own and not the guest's
    """

    time_ns: npt.NDArray[np.int64]
    duration_ns: npt.NDArray[np.int64]
    pid: npt.NDArray[np.int32]
    tid: npt.NDArray[np.int32]
    vcpu: npt.NDArray[np.int16]
    ipa: npt.NDArray[np.uint64]
    kind: npt.NDArray[np.int8]
    access: npt.NDArray[np.int8]
    level: npt.NDArray[np.int8]
    nested: npt.NDArray[np.int8]
    syndrome: npt.NDArray[np.uint64]

    def in_order(self) -> Columns:
        """Sorted by time."""
        return self.take(np.argsort(self.time_ns, kind="stable"))


@dataclass(frozen=True)
class Metadata:
    """What a recording says of itself.

    :ivar architecture: ``aarch64`` or ``x86_64``
    :ivar page_size: of the host, in bytes
    :ivar kernel: release of the host's kernel, empty if not known
    :ivar source: what it was made from: ``live``, or a file's name
    :ivar format: ``tracefs``, ``trace-cmd``, ``perf`` or ``capture``
    :ivar clock: of the trace, empty if not known
    :ivar recorded: when it was recorded (ISO 8601), empty if not known
    :ivar seconds: how long was recorded
    :ivar lost_events: what the kernel had to drop, as far as the source tells
    :ivar bad_lines: lines of the source that could not be read
    :ivar threads: thread id → (process id or 0, name)
    """

    architecture: str
    page_size: int
    kernel: str = ""
    source: str = ""
    format: str = ""
    clock: str = ""
    recorded: str = ""
    seconds: float = 0.0
    lost_events: int = 0
    bad_lines: int = 0
    threads: dict[int, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Recording:
    """The faults of one run."""

    metadata: Metadata
    faults: Columns

    def __len__(self) -> int:
        return len(self.faults)

    def vcpu_labels(self) -> npt.NDArray[np.int64]:
        """Of each fault: its vCPU's number, or, where that is not known, minus its thread id."""
        known = self.faults.vcpu >= 0
        return np.where(known, self.faults.vcpu.astype(np.int64), -self.faults.tid.astype(np.int64))


def of_processes(recording: Recording, pids: Sequence[int], name: str) -> Recording:
    """The faults of some processes.

    :param name: of the recording, for the message
    :raises UsageError: it has none of them
    """
    keep = np.isin(recording.faults.pid, np.array(pids, np.int64))
    if not keep.any():
        there = np.unique(recording.faults.pid)
        those = ", ".join(map(str, there[there >= 0].tolist()[:20]))
        raise UsageError(
            f"--pid {', '.join(map(str, pids))}: {name} has no fault of that process; "
            + (f"it has those of {those}" if those else "it does not say whose its faults are")
        )
    return Recording(recording.metadata, recording.faults.take(keep))


def table(recording: Recording) -> pa.Table:
    """As an Arrow table in the documented schema."""
    about = {"version": VERSION, **dataclasses.asdict(recording.metadata)}
    arrays = [_array(one, getattr(recording.faults, one.name)) for one in SCHEMA]
    schema = SCHEMA.with_metadata({_KEY: json.dumps(about).encode()})
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(one: pa.Field[Any], values: npt.NDArray[Any]) -> pa.Array[Any]:
    if one.name in _WORDS:
        return pa.DictionaryArray.from_arrays(pa.array(values), pa.array(_WORDS[one.name]))
    unknown = values == (NO_LEVEL if one.name == "level" else -1) if one.nullable else None
    if one.name == "nested":
        values = values == 1
    made: pa.Array[Any] = pa.array(values, type=one.type, mask=unknown)
    return made


def write(recording: Recording, path: Path) -> None:
    """Write a recording; the file has its name only when it is whole.

    :raises UsageError: the folder is not there, or ``path`` is no file
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: is no file, so a recording cannot take its place")
    try:
        with beside.open("wb") as file:  # by Python, which knows names that are no UTF-8
            pq.write_table(table(recording), file, compression="zstd")
        beside.replace(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{path}: {error.strerror or error}; the folder must be there") from error
    except OSError as error:
        error.filename = str(path)  # one of write() has none
        raise
    finally:
        beside.unlink(missing_ok=True)


def read(path: Path) -> Recording:
    """Read a recording.

    :raises UsageError: it cannot be read, or is none
    """
    try:
        # Not the file itself: Arrow's threads would call Python's read(), also when Python comes to its end.
        found = pq.read_table(pa.BufferReader(_parquet(path)))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except pa.ArrowException as error:
        raise UsageError(
            f"{path}: no recording that can be read ({error}): it is damaged, or has been cut off"
        ) from error
    return Recording(_metadata(found, path), _in_order(Columns(*_columns(found, path)), path))


def _parquet(path: Path) -> bytes:
    """The bytes of a file that begins as Parquet does: /dev/zero and the like have no end.

    :raises UsageError: it begins otherwise
    """
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
        if start != _MAGIC:
            raise UsageError(
                f"{path}: no recording (it does not begin as Parquet does); "
                f"`prefault record --from {path}` makes one of a trace"
            )
        if not file.seekable():
            return start + file.read()
        file.seek(0)  # a second copy of a large recording would be for a moment only, but large
        return file.read()


def _in_order(faults: Columns, path: Path) -> Columns:
    """By time: other programs write recordings, too, and need not keep that."""
    time = faults.time_ns
    if len(time) and int(time.max()) - int(time.min()) > np.iinfo(np.int64).max:
        raise UsageError(f"{path}: its first fault and its last are more than 292 years apart")
    return faults.in_order() if np.any(time[1:] < time[:-1]) else faults


def _metadata(found: pa.Table, path: Path) -> Metadata:
    text = (found.schema.metadata or {}).get(_KEY)
    if text is None:
        raise UsageError(f"{path}: Parquet, but no recording: its metadata has no '{_KEY.decode()}'")
    try:
        about = json.loads(text)
        if about["version"] > VERSION:
            raise UsageError(
                f"{path}: a recording of version {about['version']}; this prefault reads {VERSION}"
            )
        return Metadata(**{**known(Metadata, about), **_checked(about)})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: its metadata is damaged: {error!r}") from error


def _checked(about: Mapping[str, Any]) -> dict[str, Any]:
    check_page_size(about["page_size"])
    if min(about.get("seconds", 0), about.get("lost_events", 0), about.get("bad_lines", 0)) < 0:
        raise ValueError("a count is negative")
    return {"threads": threads(about.get("threads", {}))}


def _columns(found: pa.Table, path: Path) -> Iterator[npt.NDArray[Any]]:
    for one in SCHEMA:
        if one.name not in found.column_names:
            raise UsageError(f"{path}: no recording: it has no column {one.name}")
        column = found.column(one.name)
        if column.null_count and not one.nullable:
            raise UsageError(
                f"{path}: column {one.name} has {column.null_count} empty values; it must have none"
            )
        try:
            yield _values(one, column)
        except pa.ArrowException as error:
            raise UsageError(
                f"{path}: column {one.name} is {column.type}, not {one.type}: {error}"
            ) from error


def _values(one: pa.Field[Any], column: pa.ChunkedArray[Any]) -> npt.NDArray[Any]:
    if one.name in _WORDS:
        index = pc.index_in(column.cast(pa.string()), value_set=pa.array(_WORDS[one.name]))
        if index.null_count:
            raise pa.ArrowInvalid(f"a value is none of {', '.join(_WORDS[one.name])}")
        return index.to_numpy().astype(np.int8)
    filled: pa.ChunkedArray[Any] = column.cast(pa.int8() if one.name == "nested" else one.type)
    if one.nullable:
        unknown: Any = NO_LEVEL if one.name == "level" else -1
        filled = filled.fill_null(unknown)
    return filled.to_numpy()
