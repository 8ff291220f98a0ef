"""Keys of the data: which rows, how they become text, how long they may be, where the prepared rows lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

from pipeline.errors import UserError

__all__ = ["RL_KINDS", "DataKeys", "DatasetConfig", "UserDefinedType", "find_problems"]

RL_KINDS = {"dpo": "pair", "kto": "unpaired"}
"""`rl:` value -> what one row holds; every value that `prepare` takes."""

NOT_YET = ("ipo", "simpo", "orpo", "grpo", "gdpo", "ebft")
"""Values of Axolotl's that no strategy here stands for; ipo is `rl: dpo` with `dpo_loss_type: [ipo]`."""

SourceFormat = Literal["json", "jsonl", "csv", "parquet", "arrow"]


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class UserDefinedType(_Keys):
    """`type:` as a mapping: columns, and the texts that they are put into."""

    field_system: str | None = Field(None, description="Column of the system text; empty where a row has none.")
    field_prompt: str | None = Field(None, description="Column of the prompt; `prompt` when not set.")
    field_chosen: str | None = Field(None, description="Column of the better answer; `chosen` when not set.")
    field_rejected: str | None = Field(None, description="Column of the worse answer; `rejected` when not set.")
    field_completion: str | None = Field(None, description="kto: column of the answer; `completion` when not set.")
    field_label: str | None = Field(None, description="kto: column of the label; `label` when not set.")
    prompt_format: str | None = Field(None, description="Prompt text with {system} and {prompt}.")
    chosen_format: str | None = Field(None, description="Text of the better answer with {chosen}.")
    rejected_format: str | None = Field(None, description="Text of the worse answer with {rejected}.")
    completion_format: str | None = Field(None, description="kto: text of the answer with {completion}.")


class DatasetConfig(_Keys):
    """One entry of `datasets:` or `test_datasets:`."""

    path: str = Field(
        description="File, folder, glob, `save_to_disk` folder, URI (s3://, gs://, https://, ...), hub id, or a format "
        "name (json, csv, parquet, arrow) with data_files."
    )
    type: str | UserDefinedType | None = Field(
        None, description="How a row becomes a prompt and answers; TRL's own shapes when not set."
    )
    name: str | None = Field(None, description="Configuration of a hub dataset.")
    split: str | None = Field(None, description="Split, or a slice of it: train, test, train[:1000].")
    data_files: str | list[str] | None = Field(None, description="Files of the dataset, relative to path.")
    revision: str | None = Field(None, description="Hub revision.")
    ds_type: SourceFormat | None = Field(None, description="Format of the files, where the name doesn't say it.")
    chat_template: str | None = Field(None, description="Chat template of this dataset, in place of the tokenizer's.")
    chat_template_jinja: str | None = Field(None, description="Jinja chat template of this dataset.")
    roles: dict[str, list[str]] | None = Field(None, description="Role of the template -> names it has in the rows.")
    message_property_mappings: dict[str, str] | None = Field(
        None, description="Property of a message (role, content, ...) -> its name in the rows."
    )
    message_field_role: str | None = Field(None, description="Older form of message_property_mappings.role.")
    message_field_content: str | None = Field(None, description="Older form of message_property_mappings.content.")
    field_messages: str | None = Field(None, description="Column of the messages.")
    field_chosen: str | None = Field(None, description="Column of the better answer.")
    field_rejected: str | None = Field(None, description="Column of the worse answer.")
    field_prompt: str | None = Field(None, description="Column of the prompt.")
    field_system: str | None = Field(None, description="Column of the system text.")
    field_completion: str | None = Field(None, description="kto: column of the answer.")
    field_label: str | None = Field(None, description="kto: column of the label.")
    field_tools: str | None = Field(None, description="Column of the tool definitions; `tools` when not set.")
    drop_system_message: bool | None = Field(None, description="Leave system turns out.")


class DataKeys(_Keys):
    """Top-level keys of the data."""

    datasets: Annotated[list[DatasetConfig], Field(min_length=1)] = Field(description="Training data.")
    test_datasets: Annotated[list[DatasetConfig], Field(min_length=1)] | None = Field(None, description="Evaluation data.")
    val_set_size: float = Field(
        0.0, ge=0, description="Evaluation rows split off the training data: below 1 a part, from 1 on a number of rows."
    )
    dataset_prepared_path: str = Field("last_run_prepared", description="Folder of prepared data; shared by all runs.")
    dataset_exact_deduplication: bool = Field(False, description="Keep one of each set of identical rows.")
    excess_length_strategy: Literal["drop", "truncate", "raise"] = Field(
        "drop", description="What becomes of rows that are longer than sequence_len."
    )
    max_rejected_fraction: float = Field(0.01, ge=0, le=1, description="Share of bad rows above which prepare fails.")
    dataset_num_proc: PositiveInt | None = Field(None, description="Preparing tasks at once; all CPUs when not set.")

    @field_validator("val_set_size")
    @classmethod
    def _whole_number_of_rows(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"from 1 on it is a number of rows and must be whole, got {value:g}")
        return value


def find_problems(cfg: Any) -> Iterator[tuple[str, str]]:
    """Yield every (path, message) that makes the data's keys wrong, given the whole config."""
    if cfg.rl in NOT_YET:
        yield "rl", f"{cfg.rl} is not available in this version; available: {', '.join(RL_KINDS)} (kto: prepare only)"
    elif cfg.rl not in RL_KINDS:
        yield "rl", f"unknown value {cfg.rl!r}; available: {', '.join(RL_KINDS)} (kto: prepare only)"
    if cfg.test_datasets and cfg.val_set_size:
        yield "val_set_size", "contradicts test_datasets; keep one of them"
    for name in ("datasets", "test_datasets"):
        for index, dataset in enumerate(getattr(cfg, name) or []):
            yield from ((f"{name}.{index}.{key}", message) for key, message in _dataset_problems(dataset, cfg.rl))
    if not cfg.test_datasets and not cfg.val_set_size:
        for name in EVALUATION_KEYS:
            if getattr(cfg, name) not in (None, False, "no"):
                yield name, "has no effect without evaluation data; set val_set_size or test_datasets, or remove it"


EVALUATION_KEYS = (
    "eval_strategy",
    "eval_steps",
    "evals_per_epoch",
    "eval_on_start",
    "early_stopping_patience",
    "load_best_model_at_end",
    "dpo_generate_during_eval",
)
# Which keys of an entry shape its text, by kind of type; the others of TEXT_KEYS would have no effect.
PREFIXES = ("field_", "message_", "chat_template", "roles", "drop_system_message")
TEXT_KEYS = frozenset(name for name in DatasetConfig.model_fields if name.startswith(PREFIXES))
CHAT_KEYS = TEXT_KEYS - {"field_prompt", "field_system", "field_completion", "field_label"}


def _keys_read(type_: str | UserDefinedType | None, rl: str) -> frozenset[str]:
    answers = {"field_chosen", "field_rejected"}
    if type_ is None or type_ == "passthrough":
        return frozenset({"chat_template", "chat_template_jinja"})
    if isinstance(type_, UserDefinedType) or not type_.startswith("chat_template"):
        return frozenset()
    if rl == "kto":
        return CHAT_KEYS - answers | {"field_completion", "field_label"}
    return CHAT_KEYS if type_ in ("chat_template", "chat_template.default") else CHAT_KEYS - {"field_messages"}


def _dataset_problems(dataset: DatasetConfig, rl: str) -> Iterator[tuple[str, str]]:
    from pipeline.data.transforms import type_name

    try:
        type_name({} if isinstance(dataset.type, UserDefinedType) else dataset.type, rl)
    except UserError as error:
        yield "type", str(error).removeprefix("type: ")
    read = _keys_read(dataset.type, rl)
    for name in sorted(TEXT_KEYS - read):
        if getattr(dataset, name) not in (None, False):
            yield name, f"has no effect with type: {_type_name(dataset)} and rl: {rl}; {_remedy(name, dataset, read)}"
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
