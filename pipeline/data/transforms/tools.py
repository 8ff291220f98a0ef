"""Checks that a chat template rendered the tools and tool calls of a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.data.notes import Note
from pipeline.data.transforms.base import RowError
from pipeline.data.transforms.control import strings_of
from pipeline.data.transforms.messages import Messages

__all__ = ["function_name", "require_tools"]


def require_tools(text: str, messages: Messages, tools: list[dict[str, Any]] | None) -> list[Note]:
    """Check that `text` contains the tools and tool calls of a conversation.

    Returns:
        A note if a description or parameter of a tool isn't rendered.

    Raises:
        RowError: if a function name, or an argument of a call, isn't rendered.
    """
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    for what, items in (("tool_calls", calls), ("tools", tools or [])):
        if missing := [name for name in map(function_name, items) if name not in text]:
            raise RowError(f"the chat template does not render {what} ({missing[0]!r} is missing); use one that does")
    for string in (string for call in calls for string in strings_of(_function(call).get("arguments"))):
        if not _is_rendered(string, text):
            raise RowError(f"the chat template does not render an argument of a tool call ({string[:80]!r}); use one that does")
    # A note only: names and calls, without which nothing works, are checked above.
    lost = [string for string in _descriptions(tools or []) if not _is_rendered(string, text)]
    return [Note("tools_shortened", example=lost[0])] if lost else []


def _descriptions(value: Any) -> Iterator[str]:
    """Yield the descriptions, parameter names and enum values of tools."""
    if isinstance(value, Mapping):
        if isinstance(text := value.get("description"), str) and text.strip():
            yield text.strip()
        if isinstance(parameters := value.get("properties"), Mapping):
            yield from parameters
        if isinstance(choices := value.get("enum"), list):
            yield from (choice for choice in choices if isinstance(choice, str))
        value = list(value.values())
    for member in value if isinstance(value, list) else ():
        yield from _descriptions(member)


def _is_rendered(string: str, text: str) -> bool:
    """Return whether a text contains a string, verbatim or escaped as in JSON."""
    return any(form in text for form in (string, json.dumps(string, ensure_ascii=False)[1:-1], json.dumps(string)[1:-1]))


def _function(item: Any) -> Mapping[str, Any]:
    # OpenAI's format nests the function under `function`; others give its fields directly.
    function = item.get("function", item) if isinstance(item, Mapping) else item
    return function if isinstance(function, Mapping) else {}


def function_name(item: Any) -> str:
    """Return the function name of a tool or a tool call. Raises RowError without one."""
    name = _function(item).get("name")
    if not isinstance(name, str) or not name:
        raise RowError(f"a tool or tool call must name its function, got {item!r}")
    return name
