"""Reads the messages of a row under the names that the dataset gives to roles and properties."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.data.transforms.base import Row, RowError, list_field, parsed

__all__ = ["ASSISTANT", "MessageReader", "Messages", "common_messages", "tools_of"]

Messages = list[dict[str, Any]]

ROLES = {
    "system": ["system"],
    "user": ["user", "human"],
    "assistant": ["assistant", "gpt"],
    "tool": ["tool"],
    "developer": ["developer"],
}
ASSISTANT = ("assistant", "tool")
"""The roles of turns that belong to an answer."""
PART_TEXTS = ("text", "value", "content")
"""Where a part of a message's content may hold its text."""
CONVERSATION = re.compile(
    r"\s*[\[{].{0,200}?[\"'](role|from)[\"']\s*:\s*[\"'](user|assistant|system|human|gpt|tool|developer)[\"']", re.DOTALL
)
"""Text that begins as a conversation does, as JSON or as Python prints it."""


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

    def messages(self, value: Any, name: str, role: str = "user") -> Messages:
        """A list of messages, one message, or text (one turn of `role`), as a list of messages."""
        value = self._parsed(value)
        if isinstance(value, str):
            return [{"role": role, "content": refuse_conversation(value, name)}]
        values = [value] if isinstance(value, dict) else value
        if not isinstance(values, list):
            raise RowError(f"{name!r} must be messages, got {type(value).__name__}")
        messages = [self.message(message, f"{name}[{index}]") for index, message in enumerate(values)]
        return [message for message in messages if not (self.drop_system_message and message["role"] == "system")]

    def answer(self, value: Any, name: str) -> Messages:
        """As `messages`, but text is one turn of `assistant`."""
        return self.messages(value, name, role="assistant")

    def is_conversation(self, value: Any) -> bool:
        """Whether a value is a list of messages, or the JSON text of one."""
        value = self._parsed(value)
        first = value[0] if isinstance(value, list) and value else None
        return isinstance(first, dict) and self.properties["role"] in first

    def _parsed(self, value: Any) -> Any:
        """Messages that a cell holds as JSON text; an answer that merely is JSON stays text."""
        if not isinstance(value, str):
            return value
        found = parsed(value)
        first = found[0] if isinstance(found, list) and found else found
        role = first.get(self.properties["role"]) if isinstance(first, dict) else None
        return found if isinstance(role, str) and role in self.roles else value

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
        return _with_tool_calls({**message, "content": _content(message.get("content"), f"{name}.content")}, name)


def refuse_conversation(text: str, name: str) -> str:
    """The text, unless it is a conversation that doesn't parse: cut off, or as Python prints it. Raises RowError."""
    if CONVERSATION.match(text):
        raise RowError(
            f"{name!r} is the text of a conversation, not an answer ({text.strip()[:60]!r}), and doesn't parse as messages; "
            "give messages, as a list or as JSON"
        )
    return text


def _content(content: Any, name: str) -> str:
    """Content as text. Parts of it are joined, by a line break where no white space is between them; null stands for ""."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"{name} must be text, got {type(content).__name__}")
    joined = ""
    for index, part in enumerate(content):
        text = _part(part, f"{name}[{index}]")
        glued = joined and text and not joined[-1].isspace() and not text[0].isspace()
        joined += f"\n{text}" if glued else text
    return joined


def _part(part: Any, name: str) -> str:
    """The text of one part of a message's content."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    texts = [part[key] for key in PART_TEXTS if isinstance(part.get(key), str)] if isinstance(part, Mapping) else []
    if kind != "text" or not texts:
        raise RowError(f"{name} is of type {kind!r}, and only text can be trained on")
    return texts[0]


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


def common_messages(chosen: Messages, rejected: Messages) -> int:
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
