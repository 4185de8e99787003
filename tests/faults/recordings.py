# SPDX-License-Identifier: Apache-2.0
"""Recordings made up for tests, and strategies for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from prefault.faults.recording import Columns, Metadata, Recording
from prefault.faults.syndrome import Access, Kind

PAGE = 4096


@dataclass(frozen=True)
class Fault:
    """One fault."""

    page: int
    time: int = 0
    duration: int = -1
    kind: Kind = Kind.TRANSLATION
    access: Access = Access.READ
    tid: int = 7
    nested: int = -1


def recording_of(
    faults: Sequence[Fault], architecture: str = "aarch64", page_size: int = PAGE, **about: object
) -> Recording:
    """A recording of some faults."""
    rows = sorted(faults, key=lambda one: one.time)

    def column(kind: type[np.generic], values: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
        return np.array(values, kind)

    columns = Columns(
        column(np.int64, [one.time for one in rows]),  # type: ignore[arg-type]
        column(np.int64, [one.duration for one in rows]),  # type: ignore[arg-type]
        column(np.int32, [1] * len(rows)),  # type: ignore[arg-type]
        column(np.int32, [one.tid for one in rows]),  # type: ignore[arg-type]
        column(np.int16, [one.tid % 4 for one in rows]),  # type: ignore[arg-type]
        column(np.uint64, [one.page * page_size for one in rows]),  # type: ignore[arg-type]
        column(np.int8, [one.kind for one in rows]),  # type: ignore[arg-type]
        column(np.int8, [one.access for one in rows]),  # type: ignore[arg-type]
        column(np.int8, [3] * len(rows)),  # type: ignore[arg-type]
        column(np.int8, [one.nested for one in rows]),  # type: ignore[arg-type]
        column(np.uint64, [0] * len(rows)),  # type: ignore[arg-type]
    )
    span = (rows[-1].time - rows[0].time) / 1e9 if rows else 0.0
    metadata = Metadata(architecture, page_size, seconds=span, **about)  # type: ignore[arg-type]
    return Recording(metadata, columns)


PAGES = st.one_of(st.integers(0, 600), st.integers(0, 1 << 30))
FAULTS = st.builds(
    Fault,
    PAGES,
    st.integers(0, 10**9),
    st.integers(-1, 10**6),
    st.sampled_from([*[Kind.TRANSLATION] * 6, *Kind]),  # most of them: these are what plans are made of
    st.sampled_from(list(Access)),
    st.integers(1, 5),
    st.sampled_from([-1, -1, 0, 0, 1]),
)
RECORDINGS = st.lists(FAULTS, max_size=40).map(recording_of)
