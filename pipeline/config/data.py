"""Keys of the data: which rows, how they become text, how long they may be, where the prepared rows lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

__all__ = ["RL_KINDS", "DataKeys", "DatasetConfig", "UserDefinedType", "find_problems"]

RL_KINDS = {"dpo": "pair", "kto": "unpaired"}
"""`rl:` value -> what one row holds; every value that `prepare` takes."""

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
    if cfg.rl not in RL_KINDS:
        yield "rl", f"unknown value {cfg.rl!r}; allowed: {', '.join(RL_KINDS)}"
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
CHAT_TYPE_KEYS = ("roles", "message_property_mappings", "message_field_role", "message_field_content", "field_messages")


def _dataset_problems(dataset: DatasetConfig, rl: str) -> Iterator[tuple[str, str]]:
    chat = isinstance(dataset.type, str) and dataset.type.startswith("chat_template")
    for name in CHAT_TYPE_KEYS:
        if getattr(dataset, name) is not None and not chat:
            yield name, f"has no effect with type: {_type_name(dataset)}; it belongs to chat_template.default"
    for name in ("field_completion", "field_label"):
        if getattr(dataset, name) is not None and rl != "kto":
            yield name, f"has no effect with rl: {rl}; it belongs to rl: kto"
    for name in ("field_chosen", "field_rejected"):
        if getattr(dataset, name) is not None and rl == "kto":
            yield name, "has no effect with rl: kto; its rows have one completion and a label"
    if dataset.message_property_mappings:
        for old, new in (("message_field_role", "role"), ("message_field_content", "content")):
            if getattr(dataset, old) and new in dataset.message_property_mappings:
                yield old, f"contradicts message_property_mappings.{new}; keep one of them"


def _type_name(dataset: DatasetConfig) -> str:
    return dataset.type if isinstance(dataset.type, str) else "(a mapping)" if dataset.type else "(not set)"
