"""Conversion of pydantic's errors to messages with the given value, the allowed ones, and advice."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from pipeline.config.axolotl import REASONS, RENAMED
from pipeline.config.peers import DROPPED, equivalent

__all__ = ["explain"]

NEAR = 0.8
"""Minimum similarity of a key to be suggested for a misspelt one: one or two letters differ, not a word."""

KINDS = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping",
    "string_type": "text",
    "tuple_type": "a list",
}
"""Type of pydantic's error -> the expected value."""


def explain(errors: list[ErrorDetails], model: type[BaseModel]) -> list[tuple[str, str]]:
    """Convert the errors of validating `model` to (path, message), one per key."""
    by_path: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        # A union gives an error per member, all at one path once pydantic's member names are removed.
        by_path.setdefault(_path(error["loc"]), []).append(error)
    # For a union with a mapping among its members, pydantic also reports that the value is none of the other members.
    outer = {path for path in by_path if any(other.startswith(f"{path}.") for other in by_path)}
    return sorted((path, _message_of(group, model)) for path, group in by_path.items() if path not in outer)


def _message_of(errors: list[ErrorDetails], model: type[BaseModel]) -> str:
    """Return one message for the errors of a key: that it is unknown, or all types that a union accepts."""
    # That a key is unknown explains all other errors at it.
    unknown = next((error for error in errors if error["type"] == "extra_forbidden"), None)
    kinds = list(dict.fromkeys(kind for error in errors if (kind := _kind(error)) is not None))
    if unknown is None and kinds and (len(kinds) > 1 or errors[0]["type"] in KINDS):
        return f"must be {' or '.join(kinds)}, got {_short(errors[0].get('input'))}"
    return _message(unknown or errors[0], model)


def _kind(error: ErrorDetails) -> str | None:
    """Return what an error expects, where that is a kind of value or one of a few; else None."""
    return error["ctx"]["expected"] if error["type"] == "literal_error" else KINDS.get(error["type"])


def _path(loc: tuple[int | str, ...]) -> str:
    """Return the key path of an error, without pydantic's names of union members."""
    return ".".join(str(part) for part in loc if not _is_union_member(part))


def _is_union_member(part: int | str) -> bool:
    """Return whether `part` is pydantic's name of a union member: a type, a constrained type, or a model."""
    if not isinstance(part, str):
        return False
    is_class = part[0].isupper() and not part.isupper()  # CPU is a key
    return is_class or part in ("str", "int", "bool", "float") or "[" in part or "-" in part


def _message(error: ErrorDetails, model: type[BaseModel]) -> str:
    value = error.get("input")
    kind = error["type"]
    if kind == "extra_forbidden":
        return _unknown(error["loc"], model)
    if kind == "missing":
        # An item's place is the number of those before it.
        return (
            "is required"
            if isinstance(error["loc"][-1], str)
            else f"is missing: the list has too few items, got {_short(value)}"
        )
    if kind == "too_long":
        return f"must have at most {error['ctx']['max_length']} items, got {_short(value)}"
    text = error["msg"].removeprefix("Value error, ")
    # Our own validators' messages state the value themselves.
    if kind == "value_error":
        return text
    text = (
        text.replace("Input should be", "must be")
        .replace("a valid tuple", "a list")
        .replace("less than or equal to", "at most")
        .replace("greater than or equal to", "at least")
    )
    return f"{text[0].lower()}{text[1:]}, got {_short(value)}"


def _unknown(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    *parents, name = loc
    # Translation has renamed it unless both names were given with different values.
    if not parents and str(name) in RENAMED:
        return f"contradicts {RENAMED[str(name)]}, which is its name here; keep one of them"
    reason = REASONS.get(_path(loc)) or REASONS.get(str(name))
    if reason:
        return f"a key of Axolotl's that is not supported here: {reason}"
    if (match := equivalent(str(name))) is not None:
        return f"unknown key; it is {match[0]}'s: write `{match[1]}` (`prefray convert` translates a whole recipe)"
    if str(name) in DROPPED:
        return f"unknown key; leave it out: {DROPPED[str(name)]}"
    if not parents and (section := _section_with(str(name), model)):
        return f"unknown key; it belongs to a section: write `{section}.{name}`"
    # A suggestion comes last: names known from other tools and sections have a precise answer.
    near = difflib.get_close_matches(str(name), _fields_at(model, tuple(parents)), n=1, cutoff=NEAR)
    return f"unknown key; did you mean {near[0]!r}?" if near else "unknown key; `prefray schema` lists every key"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Return the names of the keys that are valid at `loc`."""
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
        elif isinstance(part, str):
            model = next((member for member in _models_in(model) if member.__name__ == part), model)
    return list(model.model_fields)


def _section_with(name: str, model: type[BaseModel]) -> str | None:
    """Return the section with a key of this name; None without one."""
    for field in ("trl", "ray"):
        section = _model_in(model.model_fields[field].annotation) if field in model.model_fields else None
        if section is not None and name in section.model_fields:
            return field
    return None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, dict, list, typing.Annotated):
        return next((model for arg in typing.get_args(annotation) if (model := _model_in(arg))), None)
    return None


def _models_in(model: type[BaseModel]) -> list[type[BaseModel]]:
    return [member for field in model.model_fields.values() if (member := _model_in(field.annotation))]
