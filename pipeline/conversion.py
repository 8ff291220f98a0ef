"""Conversion of other tools' recipes into ours, with each change noted beside it."""

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
from pipeline.config.peers import Translation, tool_of, translate
from pipeline.errors import ConfigError, UserError

__all__ = ["Converted", "convert"]


@dataclass(frozen=True)
class Converted:
    """A recipe in our keys.

    `problems` are (path, message) of keys that can't be converted; `values` contains them nevertheless.
    """

    tool: str
    values: dict[str, Any]
    changes: tuple[Change, ...]
    problems: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """YAML with a comment beside each key that was changed, and comment lines for those that were left out."""
        origins: dict[str, list[str]] = {}
        for change in self.changes:
            for key in change.becomes:
                origin = change.why if change.key == key else f"{change.key}: {change.why}"
                origins.setdefault(key.split(".")[0], []).append(origin)
        lines = [f"# from a recipe of {self.tool}'s"]
        lines += [_comment(f"to be settled: {path}: {message}") for path, message in self.problems]
        for key, value in self.values.items():
            # One key at a time, to put a comment beside it; unlimited width keeps a value on the comment's line.
            dumped = yaml.dump({key: value}, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=float("inf"))
            first, *rest = dumped.rstrip("\n").split("\n")
            comment = _comment("; ".join(origins.get(key, [])))
            if comment and isinstance(value, str) and rest:  # in a block of several lines the comment would become text
                lines += [comment, first, *rest]
            else:
                lines += [f"{first}  {comment}" if comment else first, *rest]
        lines += [_comment(f"left out: {change.key}: {str(change.value)[:60]!r} ({change.why})") for change in self._left_out]
        return "\n".join(lines) + "\n"

    @property
    def _left_out(self) -> list[Change]:
        return [change for change in self.changes if not change.becomes]

    def __str__(self) -> str:
        return self.text


def convert(recipe: str | Path, rl: str | None = None) -> Converted:
    """Convert a recipe of Axolotl, TRL (`trl dpo --config`), the alignment-handbook or LLaMA-Factory.

    Args:
        recipe: a YAML file.
        rl: the method of a file without one, such as TRL's; when None, inferred from its arguments, else dpo.

    Raises:
        UserError: for a file that can't be read, or that doesn't train on preferences.
    """
    source = read_yaml(Path(recipe))
    tool = tool_of(source)
    if tool == "Axolotl":
        if rl is not None and source.get("rl") != rl:
            raise UserError(f"--rl: got {rl}, and the recipe says {source.get('rl')}; leave it out")
        # Axolotl's keys are ours; `translated` below does the rest.
        translation = Translation(dict(source), [], [])
    else:
        translation = translate(source, tool, rl)
    # For all tools: a translated recipe may still hold keys of Axolotl's.
    values, changes = translated(translation.values, RunConfig)
    problems = (*translation.problems, *_problems(values, str(recipe)))
    return Converted(tool, values, (*translation.changes, *changes), problems)


def _problems(values: Mapping[str, Any], origin: str) -> list[tuple[str, str]]:
    try:
        # Only for its problems; the recipe is written as it was translated, without defaults.
        parse_config(values, origin)
    except ConfigError as error:
        return error.problems
    return []


class _PlainDumper(yaml.SafeDumper):
    """YAML dumper that repeats shared values instead of writing anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _comment(text: str) -> str:
    """Format a text as a comment of one line; "" for an empty text."""
    return f"# {' '.join(text.split())}" if text else ""
