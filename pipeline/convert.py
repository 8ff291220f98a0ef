"""A recipe of another tool as one of ours, with what was changed beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import RunConfig, parse_config
from pipeline.config.axolotl import translated
from pipeline.config.changes import Change
from pipeline.config.loading import read_yaml
from pipeline.config.peers import tool_of, translate
from pipeline.errors import ConfigError

__all__ = ["Converted", "convert"]


@dataclass(frozen=True)
class Converted:
    """A recipe in our keys.

    `problems` are (path, message) of what can't be taken over, which is in `values` all the same.
    """

    tool: str
    values: dict[str, Any]
    changes: tuple[Change, ...]
    problems: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """YAML: a comment beside each key that was written otherwise, and lines of comment for those that were left out."""
        origins: dict[str, list[str]] = {}
        for change in self.changes:
            for key in change.becomes:
                origin = change.why if change.key == key else f"{change.key}: {change.why}"
                origins.setdefault(key.split(".")[0], []).append(origin)
        lines = [f"# from a recipe of {self.tool}'s"]
        lines += [f"# to be settled: {path}: {message}" for path, message in self.problems]
        for key, value in self.values.items():
            first, *rest = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=1000).rstrip().split("\n")
            lines += [f"{first}  # {'; '.join(origins[key])}" if key in origins else first, *rest]
        lines += [f"# left out: {_one_line(change)}" for change in self.changes if not change.becomes]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        return self.text


def convert(recipe: str | Path, rl: str | None = None) -> Converted:
    """Read a recipe of Axolotl's, TRL's (`trl dpo --config`), the alignment-handbook's or LLaMA-Factory's.

    Args:
        recipe: a YAML file.
        rl: the method, where the file doesn't say it, as TRL's don't; by its arguments, else dpo, when None.

    Raises:
        UserError: for a file that can't be read, or that is no training on preferences.
    """
    given = read_yaml(Path(recipe))
    tool = tool_of(given)
    values, changes = (dict(given), []) if tool == "Axolotl" else translate(given, tool, rl)
    values, more = translated(values, RunConfig)
    return Converted(tool, values, tuple(changes + more), _problems(values, str(recipe)))


def _problems(values: Mapping[str, Any], origin: str) -> tuple[tuple[str, str], ...]:
    try:
        parse_config(values, origin)
    except ConfigError as error:
        return tuple(error.problems)
    return ()


def _one_line(change: Change) -> str:
    return f"{change.key}: {str(change.value)[:60]!r} ({change.why})".replace("\n", " ")
