"""The tokenizer of a config: base tokenizer, special tokens, added tokens, chat template."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.models.chat_templates import JINJA, resolve_chat_template
from strategies.models.gguf import unpacked
from strategies.models.location import resolve_model_location

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_reads_tokens", "load_tokenizer", "shared_tokenizer"]

MOST_SHARED = 4
COMMIT = re.compile("[0-9a-f]{40}")
_SHARED: dict[str, PreTrainedTokenizerBase] = {}
"""What decides a tokenizer -> the one of this process."""


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


def shared_tokenizer(cfg: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `load_tokenizer` that others in this process use, too: it must not be changed.

    To load one of 50,000 tokens takes half a second, and the trials of a sweep ask for it several times each. It is loaded
    again when its files have changed. One of the hub is shared only at a commit.

    Raises:
        ValueError: as `load_tokenizer`.
    """
    if (key := _decided_by(cfg)) is None:
        return load_tokenizer(cfg)
    if key not in _SHARED:
        tokenizer = load_tokenizer(cfg)
        while len(_SHARED) >= MOST_SHARED:
            _SHARED.pop(next(iter(_SHARED)), None)
        _SHARED[key] = tokenizer
    return _SHARED[key]


def _decided_by(cfg: Any) -> str | None:
    """Return all that decides a tokenizer; None if what decides it isn't on this machine."""
    key = "tokenizer_config" if cfg.tokenizer_config else "base_model"
    location = resolve_model_location(getattr(cfg, key), key)
    folder = Path(location.path)
    if location.is_gguf:
        files = [folder / location.kwargs["gguf_file"]]
    elif folder.is_dir():
        files = sorted((*folder.iterdir(), *folder.glob("additional_chat_templates/*")))
    elif COMMIT.fullmatch(cfg.revision_of_model or "") and key == "base_model":
        files = []
    else:
        return None
    names = ("revision_of_model", "tokenizer_use_fast", "trust_remote_code", "special_tokens", "tokens", "chat_template")
    settings = {name: str(getattr(cfg, name)) for name in names}
    jinja = cfg.chat_template_jinja
    if jinja is not None and jinja.endswith(JINJA):
        files.append(Path(jinja))
    try:
        states = [(str(file), status.st_size, status.st_mtime_ns) for file in files for status in [file.stat()]]
    except OSError:  # `load_tokenizer` says what is wrong
        return None
    return json.dumps([location.path, location.kwargs, settings, jinja, states], default=str)


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
