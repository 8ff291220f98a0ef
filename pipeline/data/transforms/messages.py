"""Reads the messages of a row under the names that the dataset gives to roles and properties."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.data.transforms.base import Row, RowError, list_field, parsed

__all__ = ["ASSISTANT", "MessageReader", "common_messages", "tools_of"]

ROLES = {
    "system": ["system"],
    "user": ["user", "human"],
    "assistant": ["assistant", "gpt"],
    "tool": ["tool"],
    "developer": ["developer"],
}
ASSISTANT = ("assistant", "tool")
"""The roles of turns that belong to an answer."""


@dataclass(frozen=True)
class MessageReader:
    """`properties` maps our property to the dataset's, `roles` the dataset's role to ours."""

    properties: Mapping[str, str]
    roles: Mapping[str, str]
    drop_system_message: bool

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any]) -> MessageReader:
        properties = {
            "role": keys.get("message_field_role") or "role",
            "content": keys.get("message_field_content") or "content",
            **(keys.get("message_property_mappings") or {}),
        }
        roles = {source: role for role, sources in ROLES.items() for source in sources}
        for role, sources in (keys.get("roles") or {}).items():
            roles.update(dict.fromkeys([sources] if isinstance(sources, str) else sources, role))
        return cls(properties, roles, bool(keys.get("drop_system_message")))

    def messages(self, value: Any, name: str) -> list[dict[str, Any]]:
        """A list of messages, one message, or text (one turn of `user`), as a list of messages."""
        value = self._parsed(value)
        if isinstance(value, str):
            value = [{self.properties["role"]: "user", self.properties["content"]: value}]
        values = [value] if isinstance(value, dict) else value
        if not isinstance(values, list):
            raise RowError(f"{name!r} must be messages, got {type(value).__name__}")
        messages = [self.message(message, f"{name}[{index}]") for index, message in enumerate(values)]
        return [message for message in messages if not (self.drop_system_message and message["role"] == "system")]

    def answer(self, value: Any, name: str) -> list[dict[str, Any]]:
        """As `messages`, but text is one turn of `assistant`."""
        value = self._parsed(value)
        if isinstance(value, str):
            return [{"role": "assistant", "content": value}]
        return self.messages(value, name)

    def _parsed(self, value: Any) -> Any:
        """Messages that a cell holds as JSON text; an answer that merely is JSON stays text."""
        found = parsed(value)
        first = found[0] if isinstance(found, list) and found else found
        return found if isinstance(first, dict) and self.properties["role"] in first else value

    def message(self, given: Any, name: str) -> dict[str, Any]:
        """One message in our names. Properties that nobody mapped (`tool_calls`, `name`, ...) come along."""
        given = parsed(given)
        if not isinstance(given, dict):
            raise RowError(f"{name} must be a message, got {type(given).__name__}")
        renamed = {target: given[source] for target, source in self.properties.items() if source in given}
        rest = {key: value for key, value in given.items() if key not in self.properties.values()}
        message = {**rest, **renamed}
        if "role" not in renamed or ("content" not in renamed and not message.get("tool_calls")):
            missing = self.properties["content" if "role" in renamed else "role"]
            raise RowError(
                f"{name} has no {missing!r} (it has {', '.join(given) or 'nothing'}); name it in message_property_mappings"
            )
        if not isinstance(message["role"], str) or message["role"] not in self.roles:
            known = ", ".join(sorted(self.roles))
            raise RowError(f"{name}: unknown role {message['role']!r} (known: {known}); name it in roles")
        message["role"] = self.roles[message["role"]]
        return _with_tool_calls(_with_content(message, name), name)


def _with_content(message: dict[str, Any], name: str) -> dict[str, Any]:
    """Content as text; null stands for "" where tools are called."""
    content = message.get("content")
    if content is None:
        content = ""
    elif not isinstance(content, str | list):
        raise RowError(f"{name}.content must be text, got {type(content).__name__}")
    return {**message, "content": content}


def _with_tool_calls(message: dict[str, Any], name: str) -> dict[str, Any]:
    """Tool calls with their arguments as objects, as chat templates want them, not as JSON text."""
    calls = parsed(message.get("tool_calls"))
    if not calls:
        return {key: value for key, value in message.items() if key != "tool_calls"}
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"{name}.tool_calls must be a list of calls")
    return {**message, "tool_calls": [_with_arguments(call) for call in calls]}


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"])}
    return {**call, "arguments": parsed(call["arguments"])} if "arguments" in call else call


def common_messages(chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> int:
    """How many messages both start with, with one at least left to each as its answer."""
    for index in range(limit := min(len(chosen), len(rejected)) - 1):
        if chosen[index] != rejected[index]:
            return index
    return max(limit, 0)


def tools_of(row: Row, column: str) -> list[dict[str, Any]] | None:
    """The tools of a row: a list, or JSON text of one."""
    if not row.get(column):
        return None
    tools = [parsed(tool) for tool in list_field(row, column)]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"{column!r} must be a list of tools, got {json.dumps(tools)[:80]}")
    return tools
