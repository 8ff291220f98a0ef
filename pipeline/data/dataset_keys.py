"""Keys of an entry of `datasets:`, and the keys that each dataset type reads."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from pipeline.data.row_kinds import SourceFormat, kind_of, raw_kind
from pipeline.data.transforms import type_name
from pipeline.data.transforms.registry import outside_type
from pipeline.data.transforms.user_defined import check_formats
from pipeline.errors import UserError
from strategies.keys import Keys
from strategies.types import BatchKind

__all__ = ["DatasetConfig", "UserDefinedType", "dataset_problems"]


class UserDefinedType(Keys):
    """`type:` as a mapping: columns, and formats that their texts are inserted into."""

    field_system: str | None = Field(None, description="Column of the system prompt; may be empty.")
    field_prompt: str | None = Field(None, description="Column of the prompt; `prompt` when not set.")
    field_chosen: str | None = Field(None, description="Column of the chosen answer; `chosen` when not set.")
    field_rejected: str | None = Field(None, description="Column of the rejected answer; `rejected` when not set.")
    field_completion: str | None = Field(None, description="kto: column of the completion; `completion` when not set.")
    field_label: str | None = Field(None, description="kto: column of the label; `label` when not set.")
    prompt_format: str | None = Field(None, description="Format of the prompt, with {system} and {prompt}.")
    chosen_format: str | None = Field(None, description="Format of the chosen answer, with {chosen}.")
    rejected_format: str | None = Field(None, description="Format of the rejected answer, with {rejected}.")
    completion_format: str | None = Field(None, description="kto: format of the completion, with {completion}.")


class DatasetConfig(Keys):
    """One entry of `datasets:` or `test_datasets:`."""

    path: str = Field(
        description="File, folder, glob, `save_to_disk` folder, URI (s3://, gs://, https://, ...), hub id, or a format "
        "name (json, csv, parquet, arrow) with data_files."
    )
    type: str | UserDefinedType | None = Field(
        None, description="Dataset type, which converts a row to prompt and answers; TRL's formats when not set."
    )
    name: str | None = Field(None, description="Configuration of a hub dataset.")
    split: str | None = Field(None, description="Split, or a slice of it: train, test, train[:1000].")
    data_files: str | list[str] | None = Field(None, description="Files of the dataset, relative to path.")
    revision: str | None = Field(None, description="Hub revision.")
    ds_type: SourceFormat | None = Field(None, description="Format of the files, unless their extension gives it.")
    chat_template: str | None = Field(None, description="Chat template of this dataset, instead of the tokenizer's.")
    chat_template_jinja: str | None = Field(None, description="Jinja chat template of this dataset.")
    roles: dict[str, list[str]] | None = Field(None, description="Role of the template -> its names in the rows.")
    message_property_mappings: dict[str, str] | None = Field(
        None, description="Property of a message (role, content, ...) -> its name in the rows."
    )
    message_field_role: str | None = Field(None, description="Older form of message_property_mappings.role.")
    message_field_content: str | None = Field(None, description="Older form of message_property_mappings.content.")
    field_messages: str | None = Field(None, description="Column of the messages.")
    field_chosen: str | None = Field(None, description="Column of the chosen answer.")
    field_rejected: str | None = Field(None, description="Column of the rejected answer.")
    field_prompt: str | None = Field(None, description="Column of the prompt.")
    field_system: str | None = Field(None, description="Column of the system prompt.")
    field_completion: str | None = Field(None, description="kto: column of the completion.")
    field_label: str | None = Field(None, description="kto: column of the label.")
    field_tools: str | None = Field(None, description="Column of the tool definitions; `tools` when not set.")
    drop_system_message: bool | None = Field(None, description="Drop system messages.")
    split_pairs: bool | None = Field(
        None,
        description="kto: split each pair of this dataset into two rows, the chosen answer labelled true and the rejected one "
        "false; type and field_* are those of pairs.",
    )


# Which keys of an entry shape its text, by kind of type; the others of TEXT_KEYS would have no effect.
PREFIXES = ("field_", "message_", "chat_template", "roles", "drop_system_message")
TEXT_KEYS = frozenset(name for name in DatasetConfig.model_fields if name.startswith(PREFIXES))
CHAT_KEYS = TEXT_KEYS - {"field_prompt", "field_system", "field_completion", "field_label"}


def _keys_read(type_: str | UserDefinedType | None, kind: BatchKind) -> frozenset[str]:
    answers = {"field_chosen", "field_rejected"}
    if type_ is None or type_ == "passthrough":
        # prompts that are messages are rendered by the trainer, with the tokenizer's template alone
        return frozenset({"chat_template", "chat_template_jinja"} if kind != "prompt" else ())
    if (
        isinstance(type_, str)
        and (registered := outside_type(kind, type_) or outside_type(kind, f"{type_}.default")) is not None
    ):
        return registered.keys & TEXT_KEYS
    if isinstance(type_, UserDefinedType) or not type_.startswith("chat_template"):
        return frozenset()
    if kind == "unpaired":
        return CHAT_KEYS - answers | {"field_completion", "field_label"}
    # chat_template.argilla and .argilla_chat take the prompt from the turns that both answers share, not from a column.
    if type_ not in ("chat_template", "chat_template.default"):
        return CHAT_KEYS - {"field_messages"}
    return CHAT_KEYS - answers if kind == "prompt" else CHAT_KEYS


def dataset_problems(dataset: DatasetConfig, rl: str) -> Iterator[tuple[str, str]]:
    """Yield a (key, message) for every problem of an entry, given a known `rl`."""
    # The method's own kind is kept where `raw_kind` raises, so that the keys below are still checked.
    split_pairs, kind = bool(dataset.split_pairs), kind_of(rl)
    try:
        kind = raw_kind(rl, split_pairs)
        # Any mapping resolves to the same name; its formats are checked below.
        type_name({} if isinstance(dataset.type, UserDefinedType) else dataset.type, rl, split_pairs)
    except UserError as error:
        key, _, message = str(error).partition(": ")
        yield key, message
    if isinstance(dataset.type, UserDefinedType):
        try:
            check_formats(dataset.type.model_dump(exclude_none=True))
        except UserError as error:
            key, _, message = str(error).partition(": ")
            yield key, message
    if dataset.split is not None and "%" in dataset.split:
        name = dataset.split.partition("[")[0]
        # A percentage needs the number of rows, which most formats give only once they are read whole.
        yield "split", f"got {dataset.split!r}, and rows aren't counted before; give a number of rows, such as {name}[:1000]"
    read = _keys_read(dataset.type, kind)
    context = f"type: {_type_name(dataset)} and rl: {rl}{' with split_pairs' * split_pairs}"
    for name in sorted(TEXT_KEYS - read):
        # False is as good as not set: `plan._keys` drops it too.
        if getattr(dataset, name) not in (None, False):
            yield name, f"has no effect with {context}; {_remedy(name, dataset, read)}"
    if dataset.message_property_mappings:
        for old, new in (("message_field_role", "role"), ("message_field_content", "content")):
            if getattr(dataset, old) and new in dataset.message_property_mappings:
                yield old, f"contradicts message_property_mappings.{new}; keep one of them"


def _remedy(name: str, dataset: DatasetConfig, read: frozenset[str]) -> str:
    if name.startswith("field_") and name in UserDefinedType.model_fields:
        return "to name columns, give type as a mapping with this key"
    if name in CHAT_KEYS and not isinstance(dataset.type, UserDefinedType):
        return "it belongs to chat_template.default"
    return f"remove it (this type reads {', '.join(sorted(read)) or 'no such key'})"


def _type_name(dataset: DatasetConfig) -> str:
    return dataset.type if isinstance(dataset.type, str) else "(a mapping)" if dataset.type else "(not set)"
