"""Reading of messages, with the dataset's names of roles and properties."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.data.transforms.base import EMPTY, Row, RowError, list_field, parsed
from pipeline.data.transforms.marks import MARK_END, MARK_START
from strategies.media import media_in

__all__ = ["ASSISTANT", "MessageReader", "Messages", "common_messages", "tools_of"]

Messages = list[dict[str, Any]]

ROLES = {
    "system": ["system"],
    "user": ["user", "human"],
    "assistant": ["assistant", "gpt"],
    "tool": ["tool", "function"],
    "developer": ["developer"],
}
ASSISTANT = ("assistant", "tool")
"""Roles of the turns of an answer."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Properties that hold reasoning before the answer."""
CALLS = ("tool_calls", "function_call")
PART_TEXTS = ("text", "value", "content")
"""Properties of a content part that may hold its text."""
CONVERSATION = re.compile(
    r"\s*[\[{].*?[\"'](role|from)[\"']\s*:\s*[\"'](user|assistant|system|human|gpt|tool|developer)[\"']", re.DOTALL
)
"""Beginning of a conversation serialised as JSON or as a Python literal."""


@dataclass(frozen=True)
class MessageReader:
    """Reader of messages. `properties` maps our property to the dataset's, `roles` the dataset's role to ours."""

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
        # Built-in names stay valid beside those of `roles`, which override them.
        roles = {source: role for role, sources in ROLES.items() for source in sources}
        for role, sources in (keys.get("roles") or {}).items():
            roles.update(dict.fromkeys([sources] if isinstance(sources, str) else sources, role))
        return cls(properties, roles, bool(keys.get("drop_system_message")))

    def messages(self, value: Any, name: str, role: str = "user") -> Messages:
        """Read a list of messages, one message, or text (one turn of `role`) as a list of messages. Raises RowError."""
        value = self._parsed(value)
        if isinstance(value, str):
            return [{"role": role, "content": refuse_conversation(value, name)}]
        values = [value] if isinstance(value, dict) else value
        if not isinstance(values, list):
            raise RowError(f"{name!r} must be messages, got {type(value).__name__}")
        messages = [self.message(message, f"{name}[{index}]") for index, message in enumerate(values)]
        return [message for message in messages if not (self.drop_system_message and message["role"] == "system")]

    def answer(self, value: Any, name: str) -> Messages:
        """Read as `messages` does, but text is one turn of `assistant`."""
        return self.messages(value, name, role="assistant")

    def is_conversation(self, value: Any) -> bool:
        """Return whether a value is a list of messages, or the JSON text of one."""
        value = self._parsed(value)
        first = value[0] if isinstance(value, list) and value else None
        return isinstance(first, dict) and self.properties["role"] in first

    def _parsed(self, value: Any) -> Any:
        """Parse messages that a cell holds as JSON text; an answer that happens to be JSON stays text."""
        if not isinstance(value, str):
            return value
        result = parsed(value)
        first = result[0] if isinstance(result, list) and result else result
        role = first.get(self.properties["role"]) if isinstance(first, dict) else None
        # A list of objects with roles is a conversation; a single object might be an answer that is JSON itself.
        if first is result and role is not None and not result.keys() & {self.properties["content"], *CALLS}:
            return value  # an object that isn't a message
        return result if isinstance(role, str) and role in self.roles else value

    def message(self, raw: Any, name: str) -> dict[str, Any]:
        """Read one message in our names. Unmapped properties (`tool_calls`, `name`, ...) are kept. Raises RowError."""
        raw = parsed(raw)
        if not isinstance(raw, dict):
            raise RowError(f"{name} must be a message, got {type(raw).__name__}")
        # A row may have both our name and the dataset's; they may not contradict each other.
        renamed = {target: raw[source] for target, source in self.properties.items() if source in raw}
        for target, source in self.properties.items():
            if target != source and raw.get(target) not in EMPTY and raw.get(source) not in (*EMPTY, raw[target]):
                raise RowError(f"{name} has both {target!r} and {source!r}, which say different things; drop one of them")
        if media := list(media_in(raw)):
            raise RowError(f"{name} has {media[0]!r}, which is no text, and only text can be trained on")
        # The dataset's names are dropped, so that no property is rendered, or reported as unread, under two names.
        rest = {key: value for key, value in raw.items() if key not in self.properties.values()}
        message = {**rest, **renamed}
        calls = message.get("tool_calls") or message.get("function_call")
        if "role" not in renamed or ("content" not in renamed and not calls):
            missing = self.properties["content" if "role" in renamed else "role"]
            raise RowError(
                f"{name} has no {missing!r} (it has {', '.join(raw) or 'nothing'}); name it in message_property_mappings"
            )
        if not isinstance(message["role"], str) or message["role"] not in self.roles:
            names = ", ".join(sorted(self.roles))
            raise RowError(f"{name}: unknown role {message['role']!r} (known: {names}); name it in roles")
        for reasoning in REASONING:
            if message.get(reasoning) not in EMPTY and not isinstance(message[reasoning], str):
                raise RowError(f"{name}: {reasoning!r} must be text, got {type(message[reasoning]).__name__}")
        message["role"] = self.roles[message["role"]]
        return _with_tool_calls({**message, "content": _content(message.get("content"), f"{name}.content")}, name)


def refuse_conversation(text: str, name: str) -> str:
    """Return the text. Raises RowError if it is a conversation: within other JSON, cut off, or as a Python literal."""
    if CONVERSATION.match(text) and _has_turns(parsed(text)):
        raise RowError(
            f"{name!r} is the text of a conversation, not an answer ({text.strip()[:60]!r}), in a form that isn't read; "
            "give messages, as a list or as JSON"
        )
    return text


def _has_turns(value: Any) -> bool:
    """Return whether JSON holds messages; True also for text that doesn't parse."""
    if isinstance(value, Mapping):
        is_message = value.keys() & {"role", "from"} and value.keys() & {*PART_TEXTS, *CALLS}
        return bool(is_message) or any(_has_turns(member) for member in value.values() if isinstance(member, list | Mapping))
    if isinstance(value, list):
        return any(_has_turns(member) for member in value if isinstance(member, list | Mapping))
    return True


def _content(content: Any, name: str) -> str:
    """Return content as text; joins its parts, with a line break where no white space separates them. None becomes ""."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"{name} must be text, got {type(content).__name__}")
    joined = ""
    for index, part in enumerate(content):
        text = _part(part, f"{name}[{index}]")
        # Parts are paragraphs of one content: without a break their words would run together.
        needs_break = joined and text and not joined[-1].isspace() and not text[0].isspace()
        # Not beside a picture, where the template decides.
        needs_break = needs_break and joined[-1] != MARK_END and text[0] != MARK_START
        joined += f"\n{text}" if needs_break else text
    return joined


def _part(part: Any, name: str) -> str:
    # Datasets name the text of a part differently; a part of another type (an image, say) is refused.
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    texts = [part[key] for key in PART_TEXTS if isinstance(part.get(key), str)] if isinstance(part, Mapping) else []
    # A part may say `type: text` and hold a picture all the same.
    if isinstance(part, Mapping) and (media := list(media_in(part))):
        kind = media[0]
    if kind != "text" or not texts:
        raise RowError(f"{name} is of type {kind!r}, and only text can be trained on")
    return texts[0]


def _with_tool_calls(message: dict[str, Any], name: str) -> dict[str, Any]:
    """Convert the arguments of tool calls from JSON text to objects, as chat templates expect."""
    if message.keys().isdisjoint(CALLS):
        return message
    function_call = parsed(message.get("function_call"))
    # OpenAI's API before `tools`: a single call, without a list.
    if isinstance(function_call, dict) and function_call.get("name") and not message.get("tool_calls"):
        message = {**message, "tool_calls": [{"type": "function", "function": function_call}]}
        # Left in place, it would be rendered twice, or reported as unread.
        message.pop("function_call")
    calls = parsed(message.get("tool_calls"))
    if not calls:
        # An empty list is how exports write turns without calls, and a template may test for the key alone.
        return {key: value for key, value in message.items() if key != "tool_calls"}
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"{name}.tool_calls must be a list of calls")
    return {**message, "tool_calls": [_with_arguments(call) for call in calls]}


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"])}
    if "arguments" not in call:
        return call
    arguments = parsed(call["arguments"])
    if isinstance(arguments, str) and arguments.strip():
        raise RowError(f"arguments of a tool call don't parse as JSON, or have a key twice: {arguments[:80]!r}")
    arguments = {} if isinstance(arguments, str) else arguments
    return {**call, "arguments": arguments}


def common_messages(chosen: Messages, rejected: Messages) -> int:
    """Count the messages that both start with, leaving at least one of each as its answer.

    Raises:
        RowError: when a turn before the answers differs only in white space or in a property without content.
    """
    # The last turn of the shorter one is its answer even where both begin with the same turns.
    for index in range(limit := min(len(chosen), len(rejected)) - 1):
        left, right = chosen[index], rejected[index]
        if left == right:
            continue
        # Otherwise such a turn would silently become the beginning of both answers, and be trained on.
        if left["role"] == right["role"] not in ASSISTANT and left["content"].strip() == right["content"].strip():
            names = [name for name in {**left, **right} if left.get(name) != right.get(name)]
            what = "white space around its text" if "content" in names else f"its {names[0]!r}"
            raise RowError(
                f"turn {index + 1} ({left['role']}) of chosen and of rejected is the same but for {what}; make them equal, so "
                "that both answer one prompt"
            )
        return index
    return max(limit, 0)


def tools_of(row: Row, column: str) -> list[dict[str, Any]] | None:
    """Read the tools of a row: a list, or JSON text of one; None without any. Raises RowError."""
    if not parsed(row.get(column)):
        return None
    tools = [parsed(tool) for tool in list_field(row, column)]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"{column!r} must be a list of tools, got {json.dumps(tools)[:80]}")
    return tools
