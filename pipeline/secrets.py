"""Secrets in configs and messages, and their redaction in everything that is shown or saved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

__all__ = ["REDACTED", "find_redacted", "find_secret_override", "is_secret_key", "redact", "redact_text"]

REDACTED = "***"
"""Replacement of a secret."""
SECRET_KEY = re.compile(
    r"(^|_)(pass|password|passwd|passphrase|pwd|secret|credentials?|authorization|api_?keys?|connection_string"
    r"|(secret|access|private|account|session)_?key|access_?key_?id"
    r"|(auth|access|refresh|hub|hf|session|bearer|sas|api|use_auth)_token)$|^token$",
    re.IGNORECASE,
)
"""Keys whose values are secrets; `pad_token` and the like are not."""
USERINFO = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*://)(?:[^\s'\"/?#]*@|[^\s'\"/?#:]*:[^\s'\"?#]*@)")
"""Credentials of a URI, up to the last `@`: also a key alone, and passwords that contain `@` or `/`."""
QUERY = re.compile(
    r"(?P<name>[?&](?:[\w-]*(?:token|secret|password|pwd|signature|credential|api_?key|access_?key|account_?key)[\w-]*|sig)=)[^&\s'\"]+",
    re.IGNORECASE,
)
BARE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{30,}|xox[abp]-[\w-]{10,})"
)
"""Tokens that are recognized by their format: of Hugging Face, AWS, GitHub, OpenAI, Slack."""


def is_secret_key(name: str) -> bool:
    """Return whether a key of that name holds a secret."""
    return SECRET_KEY.search(name) is not None


def redact_text(text: str) -> str:
    """Return a text without tokens and without the passwords of its URIs."""
    # First the URIs: a token within one is then covered together with its user.
    text = USERINFO.sub(rf"\g<scheme>{REDACTED}@", text)
    text = QUERY.sub(rf"\g<name>{REDACTED}", text)
    return BARE.sub(REDACTED, text)


def redact(value: Any, key: str = "") -> Any:
    """Return a config's values (of YAML or JSON) without secrets."""
    if isinstance(value, Mapping):
        secret = is_secret_key(key) and bool(value)  # everything below a secret's key is secret
        return {name: redact(item, key if secret else str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    # A password may be all digits, which YAML reads as a number.
    if isinstance(value, int | float) and not isinstance(value, bool) and is_secret_key(key):
        return REDACTED
    # Nothing to hide: it shows only whether the key is set.
    if value in (None, "", True, False) or not isinstance(value, str):
        return value
    return REDACTED if is_secret_key(key) else redact_text(value)


def find_redacted(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, message) for every value whose secret was redacted when it was saved."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from find_redacted(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from find_redacted(item, f"{path}.{index}")
    elif isinstance(value, str) and (value == REDACTED or f"{REDACTED}@" in value or f"={REDACTED}" in value):
        yield path, f"holds {REDACTED}, where a secret was left out when the config was saved; give it again with --set"


def find_secret_override(overrides: Iterable[str]) -> str | None:
    """Return the key of the first `a.b=v` that holds a secret; None without one."""
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:  # reported where overrides are applied
            value = text
        # As `redact` decides it, so that both know the same secrets.
        if text and redact({key.strip().rpartition(".")[2]: value}) != {key.strip().rpartition(".")[2]: value}:
            return key.strip()
    return None
