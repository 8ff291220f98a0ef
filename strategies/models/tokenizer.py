"""The tokenizer of a config: base tokenizer, special tokens, added tokens, chat template."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from strategies.models.chat_templates import resolve_chat_template
from strategies.models.gguf import unpacked
from strategies.models.location import resolve_model_location

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_reads_tokens", "load_tokenizer"]


def load_tokenizer(cfg: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `cfg`, ready for training.

    The chat template is the tokenizer's unless `chat_template` names another; it may be absent if no chat is rendered.
    A missing pad token becomes the eos token.

    Raises:
        ValueError: if no tokenizer can be loaded, or it has no eos token.
    """
    key = "tokenizer_config" if cfg.tokenizer_config else "base_model"
    revision = {"revision": cfg.revision_of_model} if cfg.revision_of_model and not cfg.tokenizer_config else {}
    tokenizer = _open(getattr(cfg, key), key, cfg, **revision)
    _set_tokens(tokenizer, cfg)
    if cfg.chat_template or cfg.chat_template_jinja:
        tokenizer.chat_template = resolve_chat_template(cfg.chat_template, cfg.chat_template_jinja, tokenizer)
    return tokenizer


def check_reads_tokens(cfg: Any, tokenizer: PreTrainedTokenizerBase, given: str, key: str = "reference_model") -> None:
    """Check that a model reads the policy's token ids as the same tokens; a model without a tokenizer passes.

    Either may have tokens that the other lacks, and an added token may have another name if the other vocabulary has neither.

    Args:
        cfg: how tokenizers are loaded.
        tokenizer: the policy's.
        given: path or hub id of the model.
        key: of the model, for messages.

    Raises:
        ValueError: if an id is another token to it.
    """
    try:
        other = _open(given, key, cfg)
    # Weights without a tokenizer, such as a checkpoint's: nothing to compare.
    except ValueError:
        return
    ours, theirs, renamed = tokenizer.get_vocab(), other.get_vocab(), set(other.added_tokens_decoder)
    names = {number: token for token, number in theirs.items()}

    def differs(token: str, number: int) -> bool:
        # An id that the other model lacks contradicts nothing.
        name = names.get(number, token)
        return name != token and (number not in renamed or name in ours or token in theirs)

    if different := [token for token, number in ours.items() if differs(token, number)]:
        raise ValueError(
            f"{key}: {given!r} has another tokenizer ({len(different)} tokens differ, such as {different[0]!r}); "
            "a reference must read the policy's tokens"
        )


def _open(given: str, key: str, cfg: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a path or hub id. Raises ValueError if there is none."""
    from transformers import AutoTokenizer

    location = resolve_model_location(given, key)
    if cfg.tokenizer_use_fast is not None:
        kwargs["use_fast"] = cfg.tokenizer_use_fast
    try:
        source = unpacked(location, "tokenizer")
        return AutoTokenizer.from_pretrained(source.path, trust_remote_code=cfg.trust_remote_code, **source.kwargs, **kwargs)
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ValueError(f"{location.key}: no tokenizer could be loaded from {location.given!r}: {error}") from error


def _set_tokens(tokenizer: PreTrainedTokenizerBase, cfg: Any) -> None:
    if cfg.special_tokens is not None:
        tokenizer.add_special_tokens(cfg.special_tokens.model_dump(exclude_none=True))
    if cfg.tokens:
        tokenizer.add_tokens(list(cfg.tokens))
    if tokenizer.eos_token is None:
        raise ValueError("special_tokens.eos_token: the tokenizer has no eos token; name one")
    if tokenizer.pad_token is None:
        # No new token: padding is masked in attention and loss, so any id does.
        tokenizer.pad_token = tokenizer.eos_token
