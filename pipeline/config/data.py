"""Keys of the data: which rows, how they become text, how long they may be, where the prepared rows lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

from pipeline.config.datasets import DatasetConfig, dataset_problems
from strategies.registry import STRATEGIES

__all__ = ["DataKeys", "DatasetConfig", "find_problems"]

NOT_YET = ("gdpo", "ebft")
"""Values of Axolotl's that no strategy here stands for."""


class DataKeys(BaseModel):
    """Top-level keys of the data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    datasets: Annotated[list[DatasetConfig], Field(min_length=1)] = Field(description="Training data.")
    test_datasets: Annotated[list[DatasetConfig], Field(min_length=1)] | None = Field(None, description="Evaluation data.")
    val_set_size: float = Field(
        0.0,
        ge=0,
        description="Evaluation rows split off the training data: below 1 a part, from 1 on a number of rows. The two rows "
        "of a pair that split_pairs splits stay together, so it may be one row more.",
    )
    dataset_prepared_path: str = Field("last_run_prepared", description="Folder of prepared data; shared by all runs.")
    dataset_exact_deduplication: bool = Field(False, description="Keep one of each set of identical rows.")
    excess_length_strategy: Literal["drop", "truncate", "raise"] = Field(
        "drop",
        description="What becomes of rows that are longer than sequence_len; truncate cuts answers, and drops rows whose "
        "prompt leaves them no room (of grpo, whose prompt is too long).",
    )
    encode_special_tokens: bool = Field(
        True,
        description="False: control tokens that rows hold as text (`<|im_end|>`) are encoded as text; those of the chat "
        "template stay what they are.",
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
