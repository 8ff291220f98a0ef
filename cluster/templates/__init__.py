"""Templates of files that start nodes, and their strict substitution.

`__NAME__` stands for a value, and `__NAME|other__` for `other` where there is none. In YAML a placeholder of a string stands
within double quotes; a value of several lines stands on lines of its own. A line that ends in `# if name` is left out where
that value is empty, with the lines indented below it.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import yaml

__all__ = ["fill_script", "fill_yaml"]

PLACEHOLDER = re.compile(r"__(?P<name>[A-Z]+(?:_[A-Z]+)*)(?:\|(?P<default>.+?))?__")
CONDITION = re.compile(r" +# if (?P<name>[a-z_]+)$")


def fill_script(file: str, values: Mapping[str, Any]) -> str:
    """Fill a template with values that are already quoted for a shell."""
    return _fill(_kept_lines(file, values), values, str)


def fill_yaml(file: str, values: Mapping[str, Any]) -> str:
    """Fill a YAML template with strings, numbers and lists, none of which can change its structure."""
    lines = _kept_lines(file, values)
    text = _fill(lines, values, _quote)
    # Filled as text and as parsed: both agree only if no value has changed the structure.
    assert list(yaml.safe_load_all(text)) == [_filled(parsed, values) for parsed in yaml.safe_load_all("\n".join(lines))], file
    return text


def _kept_lines(file: str, values: Mapping[str, Any]) -> list[str]:
    kept, left_out = [], math.inf  # the indentation of the last line that was left out
    for line in files("cluster.templates").joinpath(file).read_text(encoding="utf-8").splitlines():
        indent = len(line) - len(line.lstrip())
        if indent > left_out:
            continue
        condition = CONDITION.search(line)
        left_out = indent if condition is not None and not values[condition["name"]] else math.inf
        if left_out == math.inf:
            kept.append(CONDITION.sub("", line))
    return kept


def _fill(lines: Sequence[str], values: Mapping[str, Any], quote: Callable[[Any], str]) -> str:
    filled = []
    for line in lines:
        if alone := PLACEHOLDER.fullmatch(line.lstrip()):
            indent = line[: -len(alone[0])]
            # Lines of a block get its indentation; empty ones stay empty, as YAML's blocks allow.
            filled.append(textwrap.indent(_value(alone, values), indent, lambda inner: inner != "\n"))
        else:
            filled.append(PLACEHOLDER.sub(lambda found: quote(_value(found, values)), line))
    return "".join(f"{line}\n" for line in filled)


def _value(found: re.Match[str], values: Mapping[str, Any]) -> Any:
    value = values.get(found["name"].lower())
    value = found["default"] if value is None else value
    assert value is not None, f"no value for {found[0]}"
    return value


def _quote(value: Any) -> str:
    """Write a string as it stands between double quotes, anything else in YAML's flow style."""
    style: dict[str, Any] = {"default_style": '"'} if isinstance(value, str) else {"default_flow_style": True}
    text: str = yaml.safe_dump(value if isinstance(value, str) else [value], allow_unicode=True, width=math.inf, **style)
    # Without the outer quotes, or the brackets of the list that keeps YAML from ending a plain value with "...".
    return text.strip()[1:-1]


def _filled(node: Any, values: Mapping[str, Any]) -> Any:
    """Fill a parsed template."""
    if isinstance(node, dict):
        return {key: _filled(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, values) for value in node]
    if not isinstance(node, str):
        return node
    alone = PLACEHOLDER.fullmatch(node)
    return _value(alone, values) if alone else PLACEHOLDER.sub(lambda found: str(_value(found, values)), node)
