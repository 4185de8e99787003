# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.lab import build, config
from prefault.lab.variants import VARIANTS

options = st.dictionaries(
    st.text("ABC_1", min_size=1).map("CONFIG_".__add__), st.sampled_from(["y", "n", "8", '"text"'])
)


def text(chosen: dict[str, str]) -> str:
    lines = [f"# {k} is not set" if v == "n" else f"{k}={v}" for k, v in chosen.items()]
    return "# a reason\n\n" + "\n".join(lines)


@given(options)
def test_a_fragment_is_read_as_written(chosen: dict[str, str]) -> None:
    assert config.parse(text(chosen)) == chosen


@given(options, options)
def test_exactly_what_came_out_otherwise_is_refused(wanted: dict[str, str], got: dict[str, str]) -> None:
    refused = {entry.option for entry in config.refused(text(wanted), text(got))}
    assert refused == {option for option, value in wanted.items() if got.get(option, "n") != value}


def test_a_line_that_is_no_option_is_refused_with_its_number() -> None:
    with pytest.raises(ValueError, match="line 2"):
        config.parse("CONFIG_A=y\nCONFIG_B")


@given(options, options)
def test_later_fragments_win_and_the_rest_stays(base: dict[str, str], other: dict[str, str]) -> None:
    together = config.merged(text(base), text(other))
    assert config.parse(together) == {**base, **other}
    assert together.count("CONFIG_") == len({**base, **other})
    assert not config.refused(text(other), together)


def test_one_fragment_alone_is_taken_word_for_word() -> None:
    only = "# A reason.\nCONFIG_A=y\n"
    assert config.merged(only) == only


def test_every_variant_has_its_fragment_and_every_fragment_its_variant() -> None:
    names = {path.stem for path in (build.KERNEL_FOLDER / "config").glob("*.config")}
    assert names == {"lab", *VARIANTS}


@pytest.mark.parametrize(
    "fragment", sorted((build.KERNEL_FOLDER / "config").glob("*.config")), ids=lambda path: path.name
)
def test_each_group_of_a_fragment_has_its_reason(fragment: Path) -> None:
    for group in fragment.read_text().split("\n\n"):
        first = group.strip().splitlines()[0]
        assert first.startswith("# ") and "is not set" not in first, f"no reason above {first}"
