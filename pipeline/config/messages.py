"""From pydantic's errors to messages that say what was given, what is allowed, and what to do."""

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
"""How like another a key must be to be taken for a slip of the pen: one or two letters of it, not a word."""

KINDS = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping",
    "string_type": "text",
}
"""What pydantic wanted -> as a message says it where there are several."""


def explain(errors: list[ErrorDetails], model: type[BaseModel]) -> list[tuple[str, str]]:
    """Turn the errors of validating `model` into (path, message), one per key."""
    found: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        found.setdefault(_path(error["loc"]), []).append(error)
    # Of a union that has a mapping among its members, pydantic also says that the value is none of the others.
    outer = {path for path in found if any(other.startswith(f"{path}.") for other in found)}
    return sorted((path, _message_of(those, model)) for path, those in found.items() if path not in outer)


def _message_of(errors: list[ErrorDetails], model: type[BaseModel]) -> str:
    """One message of the errors of a key: of an unknown one that, of a union what it takes."""
    unknown = next((error for error in errors if error["type"] == "extra_forbidden"), None)
    kinds = list(dict.fromkeys(KINDS[error["type"]] for error in errors if error["type"] in KINDS))
    if unknown is None and len(kinds) > 1:
        return f"must be {' or '.join(kinds)}, got {_short(errors[0].get('input'))}"
    return _message(unknown or errors[0], model)


def _path(loc: tuple[int | str, ...]) -> str:
    """Key path of an error, without pydantic's names of union members."""
    return ".".join(str(part) for part in loc if not _is_union_member(part))


def _is_union_member(part: int | str) -> bool:
    """Whether pydantic put `part` there to name a member of a union: a type, a constrained type, a model."""
    if not isinstance(part, str):
        return False
    is_class = part[0].isupper() and not part.isupper()  # CPU is a key
    return is_class or part in ("str", "int", "bool", "float") or "[" in part or "-" in part


def _message(error: ErrorDetails, model: type[BaseModel]) -> str:
    given = error.get("input")
    kind = error["type"]
    if kind == "extra_forbidden":
        return _unknown(error["loc"], model)
    if kind == "missing":
        return "is required"
    text = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return text
    text = (
        text.replace("Input should be", "must be")
        .replace("less than or equal to", "at most")
        .replace("greater than or equal to", "at least")
    )
    return f"{text[0].lower()}{text[1:]}, got {_short(given)}"


def _unknown(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    *place, name = loc
    if not place and str(name) in RENAMED:
        return f"contradicts {RENAMED[str(name)]}, which is its name here; keep one of them"
    reason = REASONS.get(_path(loc)) or REASONS.get(str(name))
    if reason:
        return f"a key of Axolotl's that is not supported here: {reason}"
    if (known := equivalent(str(name))) is not None:
        return f"unknown key; it is {known[0]}'s: write `{known[1]}` (`prefray convert` translates a whole recipe)"
    if str(name) in DROPPED:
        return f"unknown key; leave it out: {DROPPED[str(name)]}"
    if not place and (section := _section_with(str(name), model)):
        return f"unknown key; it belongs to a section: write `{section}.{name}`"
    near = difflib.get_close_matches(str(name), _fields_at(model, tuple(place)), n=1, cutoff=NEAR)
    return f"unknown key; did you mean {near[0]!r}?" if near else "unknown key; `prefray schema` lists every key"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the keys that may stand where `loc` points."""
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
        elif isinstance(part, str):
            model = next((member for member in _models_in(model) if member.__name__ == part), model)
    return list(model.model_fields)


def _section_with(name: str, model: type[BaseModel]) -> str | None:
    """The section that has a key of this name, if one has."""
    for field in ("trl", "ray"):
        section = _model_in(model.model_fields[field].annotation) if field in model.model_fields else None
        if section is not None and name in section.model_fields:
            return field
    return None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, dict, list, typing.Annotated):
        return next((found for arg in typing.get_args(annotation) if (found := _model_in(arg))), None)
    return None


def _models_in(model: type[BaseModel]) -> list[type[BaseModel]]:
    return [found for field in model.model_fields.values() if (found := _model_in(field.annotation))]
