"""Chat templates by name. All but ChatML are the files that TRL ships."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["JINJA", "known_chat_templates", "resolve_chat_template"]

JINJA = (".jinja", ".jinja2", ".j2")
"""Endings of files that hold a template."""

# `content` may be None, as in messages that only call tools.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Axolotl's name -> TRL's file
TRL_FILES = {
    "cohere": "cohere",
    "deepseek_v3": "deepseekv3",
    "gemma": "gemma",
    "gemma3": "gemma3",
    "llama3": "llama3",
    "phi_3": "phi3",
    "phi_35": "phi3_5",
    "qwen_25": "qwen2_5",
    "qwen3": "qwen3",
}
FALLBACK = "tokenizer_default_fallback_"


def known_chat_templates() -> list[str]:
    """Return the built-in names of `chat_template`: without `tokenizer_default`, its fallbacks, and `jinja`."""
    return sorted(["chatml", *TRL_FILES])


def resolve_chat_template(name: str | None, jinja: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the Jinja source that `chat_template` and `chat_template_jinja` ask for.

    Raises:
        ValueError: if neither the tokenizer nor the config has a template, or the name is unknown.
    """
    if jinja is not None:
        return Path(jinja).read_text() if jinja.endswith(JINJA) else jinja
    default = tokenizer.chat_template
    if name in (None, "tokenizer_default"):
        if not default:
            raise ValueError(
                "chat_template: the tokenizer has no chat template of its own; name a built-in one "
                f"({', '.join(known_chat_templates())}) or give chat_template_jinja"
            )
        return default
    if name.startswith(FALLBACK):
        return default or _built_in(name.removeprefix(FALLBACK))
    return _built_in(name)


def _built_in(name: str) -> str:
    if name == "chatml":
        return CHATML
    if name not in TRL_FILES:
        raise ValueError(f"chat_template: unknown template {name!r}; built in: {', '.join(known_chat_templates())}")
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    return (Path(next(iter(spec.submodule_search_locations))) / "chat_templates" / f"{TRL_FILES[name]}.jinja").read_text()
