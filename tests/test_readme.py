"""What the README shows is true: its commands, folders and pages exist. That its blocks run: tests/docs/test_blocks.py."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from pipeline.cli import app
from pipeline.config import parse_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_two_commands_come_early() -> None:
    top = "\n".join(README.splitlines()[:40])
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target} " in top
        assert f"\n{target}:" in makefile


def test_continuous_integration_calls_what_contributors_call() -> None:
    script, makefile = (ROOT / ".ci" / "run").read_text(), (ROOT / "Makefile").read_text()
    assert re.findall(r"^make (?:--\S+ )*(\S+)", script, flags=re.MULTILINE) == ["checks", "test-rest"]
    assert "\nchecks: lint test\n" in makefile
    assert "\t$(QUICK)\n" in makefile and re.search(r"^QUICK := .* --tier quick$", makefile, flags=re.MULTILINE)
    assert "\t$(REST)\n" in makefile and re.search(r"^REST := .* --tier rest$", makefile, flags=re.MULTILINE)


def test_the_commands_exist() -> None:
    named = set(re.findall(r"`prefray (\w+)", README)) | set(re.findall(r"bin/prefray (\w+)", README))
    commands = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert named == commands | {group.name for group in app.registered_groups}


def test_the_recipe_is_valid() -> None:
    (recipe,) = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL))
    assert parse_config(recipe).num_workers == 2


def test_the_folders_are_there() -> None:
    for folder in re.findall(r"^\| `(\w+)/` \|", README.split("## The folders")[1], flags=re.MULTILINE):
        assert any((ROOT / folder).iterdir()), folder


def test_the_pages_are_there() -> None:
    linked = re.findall(r"\]\((docs/[\w./-]+)\)", README)
    assert len(linked) > 10
    for page in linked:
        assert (ROOT / page).is_file(), page
