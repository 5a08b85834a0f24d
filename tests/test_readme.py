"""The README stays true: its commands parse, its files exist, every verb is in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from commands import parses
from setwise.pipelines import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Lines of the README's shell blocks that call setwise, without their comments."""
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.partition("  #")[0].strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line.removeprefix(".venv/bin/") for line in lines if re.match(r"(\.venv/bin/)?setwise ", line)]


def verbs(group: object, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        path = (*before, name)
        found += verbs(command, path) if hasattr(command, "commands") else [path]
    return found


def test_the_first_commands_are_the_two_that_matter() -> None:
    first = re.search(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    assert first is not None
    assert [line.split()[:2] for line in first[1].strip().splitlines()] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_readme_parses(line: str) -> None:
    parses(line)


def test_every_verb_is_in_the_readme_and_has_help() -> None:
    command = typer.main.get_command(cli.app)
    for path in verbs(command):
        assert f"setwise {' '.join(path)}" in README, f"'setwise {' '.join(path)}' is not in the README"


def test_the_map_names_what_is_there() -> None:
    for folder in ("platform", "models", "pipelines", "sweeps"):
        for path in sorted((ROOT / folder).glob("*.py")):
            assert re.search(rf"\b{path.stem}\b", README), f"{folder}/{path.name} is missing from the README's map"
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
