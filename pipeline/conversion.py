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
from pipeline.config.peers import Translation, tool_of, translate
from pipeline.errors import ConfigError, UserError

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
        lines += [_comment(f"to be settled: {path}: {message}") for path, message in self.problems]
        for key, value in self.values.items():
            dumped = yaml.dump({key: value}, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=float("inf"))
            first, *rest = dumped.rstrip("\n").split("\n")
            comment = _comment("; ".join(origins.get(key, [])))
            if comment and isinstance(value, str) and rest:  # a text of several lines, within which a comment would be text
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
    """Read a recipe of Axolotl's, TRL's (`trl dpo --config`), the alignment-handbook's or LLaMA-Factory's.

    Args:
        recipe: a YAML file.
        rl: the method, where the file doesn't say it, as TRL's don't; by its arguments, else dpo, when None.

    Raises:
        UserError: for a file that can't be read, or that is no training on preferences.
    """
    given = read_yaml(Path(recipe))
    tool = tool_of(given)
    if tool == "Axolotl":
        if rl is not None and given.get("rl") != rl:
            raise UserError(f"--rl: got {rl}, and the recipe says {given.get('rl')}; leave it out")
        made = Translation(dict(given), [], [])
    else:
        made = translate(given, tool, rl)
    values, more = translated(made.values, RunConfig)
    problems = (*made.problems, *_problems(values, str(recipe)))
    return Converted(tool, values, (*made.changes, *more), problems)


def _problems(values: Mapping[str, Any], origin: str) -> list[tuple[str, str]]:
    try:
        parse_config(values, origin)
    except ConfigError as error:
        return error.problems
    return []


class _PlainDumper(yaml.SafeDumper):
    """Writes what stands in two places twice, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _comment(text: str) -> str:
    """A comment of one line; "" for none."""
    return f"# {' '.join(text.split())}" if text else ""
