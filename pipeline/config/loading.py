"""Loading of YAML and overrides into a plain mapping."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.packaged import is_packaged, packaged_recipe, recipe_names
from pipeline.errors import UserError

__all__ = ["apply_overrides", "apply_values", "check_keys", "missing", "parse_yaml", "read_yaml"]

QUOTES = "'\"|>"
"""First characters of YAML scalars that aren't plain."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that rejects duplicate keys, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        # Before `construct_mapping` of the base class, whose dict would hold only the last of equal keys.
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"a key is a list or a mapping: {key!r}")
            # `<<` merges another mapping, and may stand several times.
            if key != "<<" and key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice (line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads 1e-6 as text, for want of a dot.
EXPONENT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe: a file, or a packaged recipe where no file has its name.

    Raises:
        UserError: when the file is missing, unreadable, not YAML, or not a mapping.
    """
    # A file of that name wins (`is_packaged`), so a recipe of the user's is never shadowed.
    if is_packaged(path):
        return parse_yaml(packaged_recipe(str(path)).text, str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(missing(path)) from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder; give the file of a recipe") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from error
    return parse_yaml(text, str(path))


def missing(recipe: str | Path) -> str:
    """Return the message for a missing recipe, with the packaged ones if it is a name and not a path."""
    is_name = len(Path(recipe).parts) == 1 and not Path(recipe).suffix
    hint = f", and no packaged recipe; there are: {', '.join(recipe_names())}" if is_name else ""
    return f"{recipe}: can't be read: no such file{hint}"


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """Parse a recipe's text; `origin` names it in messages."""
    try:
        # _StrictLoader is a SafeLoader: no tag runs code.
        values = yaml.load(text, Loader=_StrictLoader)  # noqa: S506
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise UserError(f"{origin}: a recipe is a mapping of keys to values, got {found}")
    check_keys(values, origin)
    return values


def check_keys(value: Any, origin: str) -> None:
    """Raise UserError for a key that isn't text, at any depth."""
    if isinstance(value, Mapping):
        for key, member in value.items():
            # YAML reads `on`, `1` and `null` as a boolean, a number and nothing.
            if not isinstance(key, str):
                raise UserError(f"{origin}: a key must be text, got {key!r}; put it in quotes if it is meant")
            check_keys(member, origin)
    elif isinstance(value, list):
        for member in value:
            check_keys(member, origin)


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `values` with each `a.b=v` applied; `v` is YAML without comments, a number in the path is a list index.

    Raises:
        UserError: when an override has no `=`, or its path leads through a value that is no mapping or list.
    """
    for override in overrides:
        path, value = _parse_override(override)
        values = _with(values, path.split("."), value, f"--set {override}")
    return values


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Return dotted path -> value of each `a.b=v`, by the rules of `apply_overrides`. Raises UserError as it does."""
    return dict(map(_parse_override, overrides))


def _parse_override(override: str) -> tuple[str, Any]:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise UserError(f"--set {override}: expected key=value, such as rl_beta=0.2")
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML: {error}") from error
    # Quoted text and other types keep YAML's reading.
    is_plain = "#" in text and (value is None or isinstance(value, str)) and text.strip()[0] not in QUOTES
    if is_plain and not re.match(r"\s*(null|~)\s+#", text):
        value = text.strip()  # as a path may have it; in YAML the rest would be a comment
    return path.strip(), value


def apply_values(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with each dotted path of `changes` set to its value.

    Raises:
        UserError: when a path leads through a value that is no mapping or list.
    """
    for path, value in changes.items():
        values = _with(values, path.split("."), value, path)
    return values


def _with(node: Any, path: list[str], value: Any, origin: str) -> Any:
    """Return a copy of `node` with `value` at `path`; `origin` names the override in messages."""
    if not path:
        return value
    head, *rest = path
    # A section may be absent, or stand in the recipe without any key.
    if node is None:
        node = {}
    if isinstance(node, list):
        if not head.isdigit() or int(head) >= len(node):
            raise UserError(f"{origin}: {head!r} is no index of a list of {len(node)}")
        return [_with(item, rest, value, origin) if i == int(head) else item for i, item in enumerate(node)]
    if not isinstance(node, dict):
        raise UserError(f"{origin}: the key before {head!r} holds a value, not a section")
    # A copy: trials of a sweep share the recipe's mapping.
    return {**node, head: _with(node.get(head), rest, value, origin)}
