"""Dataset types: the one place where a raw row becomes text."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from pipeline.data.transforms import chat, trl_shapes, turns, user_defined
from pipeline.data.transforms.base import Context, Rendered, RowError, Transform
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DATASET_TYPES", "Rendered", "RowError", "Transform", "build_transform", "load_transform", "rl_kind"]

_FACTORIES = {
    "dpo": {**turns.DPO_TYPES, **chat.DPO_TYPES, **user_defined.DPO_TYPES, **trl_shapes.DPO_TYPES},
    "kto": {**turns.KTO_TYPES, **chat.KTO_TYPES, **user_defined.KTO_TYPES, **trl_shapes.KTO_TYPES},
}
DATASET_TYPES: dict[str, tuple[str, ...]] = {kind: tuple(sorted(types)) for kind, types in _FACTORIES.items()}
"""Names of the dataset types by kind of row: `dpo` (pairs) and `kto` (labelled completions)."""


def rl_kind(rl: str) -> str:
    """`kto` for kto, `dpo` for every method that learns from pairs (dpo, ipo, simpo, orpo)."""
    return "kto" if rl == "kto" else "dpo"


def type_name(given: str | dict[str, Any] | None, rl: str) -> str:
    """The registered name that `type:` means.

    Raises:
        UserError: when there is no such type; it names the nearest ones and all that there are.
    """
    if given is None:
        return "passthrough"
    if isinstance(given, dict):
        return "user_defined.default"
    names = DATASET_TYPES[rl_kind(rl)]
    for name in (given, f"{given}.default"):
        if name in names:
            return name
    near = difflib.get_close_matches(given, names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"type: no dataset type {given!r} for rl: {rl}; {hint}There are: {', '.join(names)}")


def build_transform(rl: str, context: Context) -> Transform:
    """The transform of `context.keys["type"]`.

    Raises:
        UserError: for an unknown type, a bad format, or a chat template that is needed and missing.
    """
    name = type_name(context.keys.get("type"), rl)
    return Transform(name, rl_kind(rl), _FACTORIES[rl_kind(rl)][name](context))


def dataset_template(tokenizer: PreTrainedTokenizerBase | None, keys: dict[str, Any]) -> str | None:
    """The Jinja source of a dataset's own `chat_template` or `chat_template_jinja`; None without either."""
    name, jinja = keys.get("chat_template"), keys.get("chat_template_jinja")
    if not (name or jinja) or tokenizer is None:
        return None
    from strategies.chat_templates import resolve_chat_template

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
    """The function that turns a raw row of dataset type `type` into text.

    `load_transform("chatml.intel")(row)` gives `{"prompt", "chosen", "rejected"}`; with `rl="kto"` `{"prompt",
    "completion", "label"}`. `dataset_keys` are the keys of an entry of `datasets:` (`roles`, `field_messages`, ...).

    Raises:
        UserError: for an unknown type, a bad format, or a chat template that is needed and missing.
        RowError: (from the returned function) for a row that cannot be used.
    """
    keys = {**dataset_keys, "type": type}
    return build_transform(rl, Context(tokenizer, dataset_template(tokenizer, keys), keys))
