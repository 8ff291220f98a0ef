"""Secrets that a config or a message may hold, and how they are kept out of what is shown and saved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

__all__ = ["REDACTED", "find_redacted", "find_secret_override", "is_secret_key", "redact", "redact_text"]

REDACTED = "***"
"""Stands where a secret was."""
SECRET_KEY = re.compile(
    r"(^|_)(password|passwd|secret|credentials?|api_?keys?|(secret|access|private|account)_?key|access_?key_?id|connection_string"
    r"|(auth|access|hub|hf|session|bearer|sas|api|use_auth)_token)$|^token$",
    re.IGNORECASE,
)
"""Names of values that are secrets; `pad_token` and the like are none."""
USERINFO = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*://)[^/\s@'\"]*:[^/\s@'\"]*@")
QUERY = re.compile(
    r"(?P<name>[?&](?:[\w-]*(?:token|secret|password|signature|credential|api_?key|access_?key)[\w-]*|sig)=)[^&\s'\"]+",
    re.IGNORECASE,
)
BARE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{30,}|xox[abp]-[\w-]{10,})"
)
"""Tokens that can be told by how they look: of Hugging Face, AWS, GitHub, OpenAI, Slack."""


def is_secret_key(name: str) -> bool:
    """Whether a key of that name holds a secret."""
    return SECRET_KEY.search(name) is not None


def redact_text(text: str) -> str:
    """A text without the passwords of its URIs and without tokens."""
    text = USERINFO.sub(rf"\g<scheme>{REDACTED}@", text)
    text = QUERY.sub(rf"\g<name>{REDACTED}", text)
    return BARE.sub(REDACTED, text)


def redact(value: Any, key: str = "") -> Any:
    """A config's values, as YAML or JSON holds them, without its secrets."""
    if isinstance(value, Mapping):
        secret = is_secret_key(key) and bool(value)
        return {name: redact(item, key if secret else str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if value in (None, "", True, False) or not isinstance(value, str):
        return value
    return REDACTED if is_secret_key(key) else redact_text(value)


def find_redacted(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, message) for every value of which a secret was left out when it was saved."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from find_redacted(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from find_redacted(item, f"{path}.{index}")
    elif isinstance(value, str) and (value == REDACTED or f"{REDACTED}@" in value or f"={REDACTED}" in value):
        yield path, f"holds {REDACTED}, where a secret was left out when the config was saved; give it again with --set"


def find_secret_override(overrides: Iterable[str]) -> str | None:
    """The key of the first `a.b=v` that holds a secret."""
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:  # said where overrides are applied
            value = text
        if text and redact({key.strip().rpartition(".")[2]: value}) != {key.strip().rpartition(".")[2]: value}:
            return key.strip()
    return None
