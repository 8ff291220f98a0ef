"""`type:` as a mapping: columns and formats of the user's own."""

from __future__ import annotations

import difflib
import string
from collections.abc import Callable
from typing import Any

from pipeline.data.transforms.base import Context, Rendered, Row, label_field, optional_text, text_field
from pipeline.data.transforms.plain import labelled_text, paired_text
from pipeline.data.transforms.prompts import prompt_rendering
from pipeline.errors import UserError

__all__ = ["PAIR_TYPES", "PROMPT_TYPES", "UNPAIRED_TYPES"]

PAIR_PARTS = ("prompt", "system", "chosen", "rejected")
UNPAIRED_PARTS = ("prompt", "system", "completion", "label")
PROMPT_PARTS = ("prompt", "system")


def _settings(context: Context, parts: tuple[str, ...]) -> dict[str, Any]:
    """The mapping under `type`, or the dataset's own `field_*` keys when `type` is the word `user_defined`."""
    given = context.keys.get("type")
    allowed = [f"field_{part}" for part in parts] + [f"{part}_format" for part in parts if part not in ("system", "label")]
    if not isinstance(given, dict):
        return {key: value for key, value in context.keys.items() if key in allowed and value is not None}
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"type.{key}: unknown key{hint} Allowed: {', '.join(allowed)}")
    return {key: value for key, value in given.items() if value is not None}


def _formatter(settings: dict[str, Any], part: str) -> Callable[[str, str], str]:
    """A function of (text, system) that fills `{part}_format`; a placeholder is the part's name or its column's."""
    template = settings.get(f"{part}_format") or "{" + part + "}"
    names = {part, settings.get(f"field_{part}", part)}
    systems = {"system", settings.get("field_system", "system")} if part == "prompt" else set()
    try:
        used = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise UserError(f"type.{part}_format: {error} in {template!r}; write {{{{ and }}}} for braces") from error
    if unknown := used - names - systems:
        raise UserError(
            f"type.{part}_format: unknown placeholder {{{min(unknown)}}}; "
            f"allowed: {', '.join(f'{{{name}}}' for name in sorted(names | systems))}"
        )
    return lambda text, system: template.format_map({**dict.fromkeys(systems, system), **dict.fromkeys(names, text)})


def _pair(context: Context) -> Callable[[Row], Rendered]:
    settings = _settings(context, PAIR_PARTS)
    column = {part: settings.get(f"field_{part}", part) for part in PAIR_PARTS}
    formats = {part: _formatter(settings, part) for part in ("prompt", "chosen", "rejected")}

    def render(row: Row) -> Rendered:
        system = optional_text(row, column["system"])
        texts = [formats[part](text_field(row, column[part]), system) for part in ("prompt", "chosen", "rejected")]
        return paired_text(*texts)

    return render


def _completion(context: Context) -> Callable[[Row], Rendered]:
    settings = _settings(context, UNPAIRED_PARTS)
    column = {part: settings.get(f"field_{part}", part) for part in UNPAIRED_PARTS}
    formats = {part: _formatter(settings, part) for part in ("prompt", "completion")}

    def render(row: Row) -> Rendered:
        system = optional_text(row, column["system"])
        prompt, completion = (formats[part](text_field(row, column[part]), system) for part in ("prompt", "completion"))
        return labelled_text(prompt, completion, label_field(row, column["label"]))

    return render


def _prompt(context: Context) -> Callable[[Row], Rendered]:
    settings = _settings(context, PROMPT_PARTS)
    column = {part: settings.get(f"field_{part}", part) for part in PROMPT_PARTS}
    fill = _formatter(settings, "prompt")
    return prompt_rendering(context, lambda row: fill(text_field(row, column["prompt"]), optional_text(row, column["system"])))


PAIR_TYPES = {"user_defined.default": _pair}
UNPAIRED_TYPES = {"user_defined.default": _completion}
PROMPT_TYPES = {"user_defined.default": _prompt}
