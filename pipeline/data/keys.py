"""Config keys of the data: datasets, evaluation split, length limit, and the folder of prepared data."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from cluster.config import ClusterKeys
from pipeline.data.dataset_keys import DatasetConfig, dataset_problems
from strategies.config.schema import StrategyConfig
from strategies.keys import Keys
from strategies.methods.registry import STRATEGIES

__all__ = ["DataConfig", "DataKeys", "DatasetConfig", "find_problems"]

UNAVAILABLE = ("gdpo", "ebft")
"""Values of `rl` that Axolotl has and this version doesn't."""


class DataKeys(Keys):
    """Top-level keys of the data."""

    datasets: Annotated[list[DatasetConfig], Field(min_length=1)] = Field(description="Training data.")
    test_datasets: Annotated[list[DatasetConfig], Field(min_length=1)] | None = Field(None, description="Evaluation data.")
    val_set_size: float = Field(
        0.0,
        ge=0,
        description="Evaluation rows split off the training data: a fraction below 1, else a number of rows. Rows with the "
        "same prompt stay together (split_by), so there may be a few more.",
    )
    split_by: Literal["prompt", "row"] = Field(
        "prompt",
        description="What val_set_size splits off: prompts with all of their rows, so that no prompt is in both splits; or "
        "rows, whatever their prompts.",
    )
    split_seed: NonNegativeInt | None = Field(
        None,
        description="Seed of the split by val_set_size; seed when not set. Runs that differ in seed alone are evaluated on the "
        "same rows with it.",
    )
    dataset_prepared_path: str = Field(
        "last_run_prepared",
        description="Folder of prepared data and scores, a path or a URI (`s3://bucket/prepared`); shared by all runs. On "
        "several nodes, a URI or a path that all of them share.",
    )
    dataset_exact_deduplication: bool = Field(False, description="Keep one of each set of identical rows.")
    excess_length_strategy: Literal["drop", "truncate", "raise"] = Field(
        "drop",
        description="Treatment of rows longer than sequence_len. truncate cuts the end of completions, and drops rows whose "
        "prompt leaves no room for them (grpo: whose prompt is too long).",
    )
    encode_special_tokens: bool = Field(
        True,
        description="False: control tokens in the text of rows (`<|im_end|>`) are encoded as text; those of the chat template "
        "remain control tokens.",
    )
    template_date: date | None = Field(
        None,
        description="Date that chat templates print as today's, as those of Llama 3.1 and 3.2 do (2026-11-28); the date of the "
        "first preparation when not set.",
    )
    max_rejected_fraction: float = Field(0.01, ge=0, le=1, description="Fraction of invalid rows above which prepare fails.")
    dataset_num_proc: PositiveInt | None = Field(None, description="Concurrent preparation tasks; one per CPU when not set.")

    @field_validator("val_set_size")
    @classmethod
    def _whole_number_of_rows(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"from 1 on it is a number of rows and must be whole, got {value:g}")
        return value


class DataConfig(DataKeys, StrategyConfig, ClusterKeys):
    """Keys that `prepare` reads: those of the data, of the tokenizer and method, and of the cluster."""


def find_problems(cfg: DataConfig) -> Iterator[tuple[str, str]]:
    """Yield a (path, message) for every problem of the data's keys, given the whole config."""
    if cfg.rl in UNAVAILABLE:
        yield "rl", f"{cfg.rl} is not available in this version; available: {', '.join(STRATEGIES)}"
    elif cfg.rl not in STRATEGIES:
        yield "rl", f"unknown value {cfg.rl!r}; available: {', '.join(STRATEGIES)}"
    elif not cfg.encode_special_tokens and STRATEGIES[cfg.rl].batch_kind == "prompt":
        yield "encode_special_tokens", f"has no effect with rl: {cfg.rl}, whose trainer encodes prompts itself; remove it"
    if cfg.test_datasets and cfg.val_set_size:
        yield "val_set_size", "contradicts test_datasets; keep one of them"
    for name in ("datasets", "test_datasets") if cfg.rl in STRATEGIES else ():
        for index, dataset in enumerate(getattr(cfg, name) or []):
            yield from ((f"{name}.{index}.{key}", message) for key, message in dataset_problems(dataset, cfg.rl))
    if cfg.split_seed is not None and not cfg.val_set_size:
        yield "split_seed", "has no effect without val_set_size; remove it"
    if cfg.split_by != "prompt" and not cfg.val_set_size:
        yield "split_by", "has no effect without val_set_size; remove it"
    if not cfg.test_datasets and not cfg.val_set_size:
        for name in EVALUATION_KEYS:
            # "no" is transformers' value of `eval_strategy` for none.
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
