# SPDX-License-Identifier: Apache-2.0
"""What the documents promise is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from prefault.cli.main import root
from prefault.scenarios import SCENARIOS

TOP = Path(__file__).parents[1]
PAGES = sorted([*TOP.glob("*.md"), *(TOP / "docs").rglob("*.md"), *(TOP / "kernel").rglob("*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


def commands(group: click.Group, prefix: str = "prefault") -> Iterator[tuple[str, click.Command]]:
    """Every subcommand with its full name, groups left out."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown page's headings get."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_every_relative_link_resolves(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize(("name", "command"), list(commands(root)), ids=lambda value: str(value))
def test_every_subcommand_and_option_is_documented(name: str, command: click.Command) -> None:
    page = (TOP / "docs/cli.md").read_text()
    sections = re.split(r"^##+ ", page, flags=re.MULTILINE)
    section = next((text for text in sections if text.startswith(f"{name}\n")), "")
    assert section, f"docs/cli.md has no heading for {name}"
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.opts[0] in section, f"docs/cli.md, {name}: {option.opts[0]} is missing"


@pytest.mark.parametrize(("name", "command"), list(commands(root)), ids=lambda value: str(value))
def test_every_subcommand_has_a_help_text(name: str, command: click.Command) -> None:
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option) and option.name != "help":
            assert option.help, f"{name} {option.opts[0]} has no help text"


def test_every_decision_is_in_the_index() -> None:
    folder = TOP / "docs/decisions"
    listed = set(LINK.findall((folder / "README.md").read_text()))
    assert listed == {page.name for page in folder.glob("[0-9]*.md")}


def test_every_requirement_has_a_state_and_every_done_one_a_scenario() -> None:
    rows = re.findall(
        r"^\| (M\d+) \| .* \| ([^|]+) \| (?:`(\w+)`)? ?\|$", (TOP / "README.md").read_text(), re.MULTILINE
    )
    assert [row[0] for row in rows] == [f"M{number}" for number in range(1, 17)]
    shown = {(name.partition("[")[0], one) for name, it in SCENARIOS.items() for one in it.requirements}
    shown |= {(Path(name).name, "M16") for name in (TOP / "kernel/v7.3/selftests").read_text().split()}
    for requirement, state, name in rows:
        assert not name or (name, requirement) in shown, f"{name} does not show {requirement}"
        assert name or state != "done", f"{requirement} is done, but what shows it is not said"


def test_no_placeholder_is_left() -> None:
    for page in PAGES:
        assert not re.search(r"\bTODO|-HERE\b|FIXME", page.read_text()), page
