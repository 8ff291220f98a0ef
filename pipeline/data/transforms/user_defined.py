"""`type:` as a mapping: user-defined columns and formats."""

from __future__ import annotations

import difflib
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.data.transforms.base import Context, Rendered, Row, label_field, optional_text, text_field
from pipeline.data.transforms.plain import labelled_text, paired_text, without_prompt
from pipeline.data.transforms.prompts import prompt_rendering
from pipeline.errors import UserError

__all__ = ["PAIR_TYPES", "PROMPT_TYPES", "UNPAIRED_TYPES", "check_formats"]

PAIR_PARTS = ("prompt", "system", "chosen", "rejected")
UNPAIRED_PARTS = ("prompt", "system", "completion", "label")
PROMPT_PARTS = ("prompt", "system")


def _settings(context: Context, parts: tuple[str, ...]) -> dict[str, Any]:
    """Return the mapping under `type`, or the dataset's `field_*` keys when `type` is `user_defined`. Raises UserError."""
    mapping = context.keys.get("type")
    allowed = [f"field_{part}" for part in parts] + [f"{part}_format" for part in parts if part not in ("system", "label")]
    # Of the dataset's other keys (`path`, `split`, ...) only those that a mapping may have.
    if not isinstance(mapping, dict):
        return {key: value for key, value in context.keys.items() if key in allowed and value is not None}
    for key in mapping:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"type.{key}: unknown key{hint} Allowed: {', '.join(allowed)}")
    return {key: value for key, value in mapping.items() if value is not None}


@dataclass(frozen=True)
class _Format:
    """A `{part}_format`; its placeholders are the part's name or its column's."""

    template: str
    names: frozenset[str]
    systems: frozenset[str]
    uses_system: bool

    def fill(self, text: str, system: str = "") -> str:
        # The part's own names win where a column is called `system`.
        return self.template.format_map({**dict.fromkeys(self.systems, system), **dict.fromkeys(self.names, text)})

    def fill_prompt(self, row: Row, column: dict[str, str]) -> str:
        """Fill in the prompt of a row. A system column without a placeholder isn't read, so it is noted as unread."""
        system = optional_text(row, column["system"]) if self.uses_system else ""
        return self.fill(text_field(row, column["prompt"]), system)


def _formatter(settings: dict[str, Any], part: str) -> _Format:
    """Parse the format of a part. Raises UserError for an invalid one."""
    template = settings.get(f"{part}_format") or "{" + part + "}"
    names = {part, settings.get(f"field_{part}", part)}
    systems = {"system", settings.get("field_system", "system")} if part == "prompt" else set()
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UserError(f"type.{part}_format: {error} in {template!r}; write {{{{ and }}}} for braces") from error
    used = {str(name) for _, name, _, _ in fields}
    # A width or `!r` would change the text of rows.
    if any(spec or conversion for _, _, spec, conversion in fields):
        raise UserError(f"type.{part}_format: {template!r} formats a placeholder; write {{{part}}} alone")
    if unknown := used - names - systems:
        raise UserError(
            f"type.{part}_format: unknown placeholder {{{min(unknown)}}}; "
            f"allowed: {', '.join(f'{{{name}}}' for name in sorted(names | systems))}"
        )
    # The text must occur in the result exactly once, as in every other type.
    if (times := sum(name in names for _, name, _, _ in fields)) != 1:
        raise UserError(f"type.{part}_format: {template!r} holds {{{part}}} {times} times; it must stand there once")
    return _Format(template, frozenset(names), frozenset(systems), bool(used & systems))


def check_formats(mapping: dict[str, Any]) -> None:
    """Check the formats of a mapping under `type`. Raises UserError."""
    for part in ("prompt", "chosen", "rejected", "completion"):
        _formatter(mapping, part)


def _pair(context: Context) -> Callable[[Row], Rendered]:
    settings = _settings(context, PAIR_PARTS)
    column = {part: settings.get(f"field_{part}", part) for part in PAIR_PARTS}
    formats = {part: _formatter(settings, part) for part in ("prompt", "chosen", "rejected")}

    def render(row: Row) -> Rendered:
        texts = [text_field(row, column[part]) for part in ("prompt", "chosen", "rejected")]
        # Before formatting, after which an answer no longer begins with the bare prompt.
        answers, notes = without_prompt(texts[0], *texts[1:])
        filled = [formats[part].fill(text) for part, text in zip(("chosen", "rejected"), answers, strict=True)]
        rendered = paired_text(formats["prompt"].fill_prompt(row, column), *filled)
        return replace(rendered, notes=(*notes, *rendered.notes))

    return render


def _completion(context: Context) -> Callable[[Row], Rendered]:
    settings = _settings(context, UNPAIRED_PARTS)
    column = {part: settings.get(f"field_{part}", part) for part in UNPAIRED_PARTS}
    formats = {part: _formatter(settings, part) for part in ("prompt", "completion")}

    def render(row: Row) -> Rendered:
        texts = [text_field(row, column[part]) for part in ("prompt", "completion")]
        (completion,), notes = without_prompt(*texts)
        prompt = formats["prompt"].fill_prompt(row, column)
        rendered = labelled_text(prompt, formats["completion"].fill(completion), label_field(row, column["label"]))
        return replace(rendered, notes=(*notes, *rendered.notes))

    return render


def _prompt(context: Context) -> Callable[[Row], Rendered]:
    settings = _settings(context, PROMPT_PARTS)
    column = {part: settings.get(f"field_{part}", part) for part in PROMPT_PARTS}
    fill_prompt = _formatter(settings, "prompt").fill_prompt
    return prompt_rendering(context, lambda row: fill_prompt(row, column))


PAIR_TYPES = {"user_defined.default": _pair}
UNPAIRED_TYPES = {"user_defined.default": _completion}
PROMPT_TYPES = {"user_defined.default": _prompt}
