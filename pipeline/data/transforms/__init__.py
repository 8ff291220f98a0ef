"""Dataset types, which convert raw rows to text."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.data.row_kinds import raw_kind
from pipeline.data.transforms.base import (
    Context,
    Rendered,
    Row,
    RowError,
    completion_text,
    label_field,
    list_field,
    optional_text,
    pair_text,
    text_field,
)
from pipeline.data.transforms.hints import hint
from pipeline.data.transforms.messages import MessageReader
from pipeline.data.transforms.prompts import prompt_rendering
from pipeline.data.transforms.registry import FACTORIES, TypeFailed, dataset_types, outside_type, register_dataset_type
from pipeline.data.transforms.rendering import ChatRenderer
from pipeline.data.transforms.template import find_placeholder
from pipeline.data.transforms.transform import Transform
from pipeline.errors import UserError
from strategies.types import BatchKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ChatRenderer",
    "Context",
    "Rendered",
    "Row",
    "RowError",
    "Transform",
    "TypeFailed",
    "build_transform",
    "code_of",
    "completion_text",
    "dataset_types",
    "find_placeholder",
    "label_field",
    "list_field",
    "load_transform",
    "optional_text",
    "pair_text",
    "prompt_rendering",
    "register_dataset_type",
    "text_field",
    "type_name",
]


def type_name(value: str | dict[str, Any] | None, rl: str, split_pairs: bool = False) -> str:
    """Resolve `type:` to a registered name.

    Raises:
        UserError: for an unknown type, with the nearest names and all available ones; as `raw_kind`.
    """
    names = dataset_types(raw_kind(rl, split_pairs))
    if value is None:
        return "passthrough"
    if isinstance(value, dict):
        return "user_defined.default"
    for name in (value, f"{value}.default"):
        if name in names:
            return name
    near = difflib.get_close_matches(value, names, n=2, cutoff=0.5)
    nearest = f"did you mean {' or '.join(near)}? " if near else ""
    where = f"rl: {rl} with split_pairs" if split_pairs else f"rl: {rl}"
    raise UserError(f"type: no dataset type {value!r} for {where}; {nearest}There are: {', '.join(names)}")


def build_transform(rl: str, context: Context) -> Transform:
    """Build the transform of `context.keys["type"]`.

    Raises:
        UserError: for an unknown type, a bad format, or a missing chat template; as `raw_kind`.
    """
    split_pairs = bool(context.keys.get("split_pairs"))
    name, kind = type_name(context.keys.get("type"), rl, split_pairs), raw_kind(rl, split_pairs)
    render = _with_hint(kind, FACTORIES[kind][name](context))
    # Prompts go to the trainer as they are, and take no pictures.
    placeholder = None if kind == "prompt" else context.placeholder
    return Transform(name, render, split_pairs, placeholder, MessageReader.from_keys(context.keys))


def code_of(keys: dict[str, Any], rl: str) -> str | None:
    """Return the code identity of a registered dataset type, None for a built-in one. Raises as `OutsideType.code`."""
    split_pairs = bool(keys.get("split_pairs"))
    registered = outside_type(raw_kind(rl, split_pairs), type_name(keys.get("type"), rl, split_pairs))
    return None if registered is None else registered.code()


def _with_hint(kind: BatchKind, render: Callable[[Row], Rendered]) -> Callable[[Row], Rendered]:
    """Wrap `render` so that its errors add a hint for rows of another kind."""

    def render_with_hint(row: Row) -> Rendered:
        try:
            return render(row)
        except RowError as error:
            has_hint = "message_property_mappings" in str(error)
            raise RowError(str(error) if has_hint else f"{error}{hint(kind, row)}") from error

    return render_with_hint


def dataset_template(tokenizer: PreTrainedTokenizerBase | None, keys: dict[str, Any]) -> str | None:
    """Return the Jinja source of a dataset's own `chat_template` or `chat_template_jinja`; None without either."""
    name, jinja = keys.get("chat_template"), keys.get("chat_template_jinja")
    if not (name or jinja) or tokenizer is None:
        return None
    from strategies.models.chat_templates import resolve_chat_template

    try:
        return resolve_chat_template(name, jinja, tokenizer)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def load_transform(
    type: str | dict[str, Any] | None,
    rl: str = "dpo",
    tokenizer: PreTrainedTokenizerBase | None = None,
    **dataset_keys: Any,
) -> Transform:
    """Return the function that converts a raw row of dataset type `type` to text.

    `load_transform("chatml.intel")(row)` gives `{"prompt", "chosen", "rejected"}`; with `rl="kto"` `{"prompt",
    "completion", "label"}`; with `rl="grpo"` `{"prompt", "row"}`, `row` being the columns for the trainer. `dataset_keys` are
    the keys of an entry of `datasets:` (`roles`, `field_messages`, ...). With `split_pairs=True` it still returns the pair, and
    `.rows(row)` the two labelled halves.

    Raises:
        UserError: for an unknown type, a bad format, or a missing chat template.
        RowError: (from the returned function) for an invalid row.
    """
    keys = {**dataset_keys, "type": type}
    return build_transform(rl, Context(tokenizer, dataset_template(tokenizer, keys), keys))
