"""The packaged recipes: each trains, has a source, and can be named; the page that lists them tells the truth."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pipeline import train
from pipeline.cli import app
from pipeline.config import RunConfig, load_config
from pipeline.config.loading import read_yaml
from pipeline.config.packaged import packaged_recipe, recipe_names
from pipeline.errors import UserError
from pipeline.tuning.space import check_trials, corners
from tests.tiny import save_tiny, tiny_gemma3, tiny_model, tiny_qwen3, tiny_tokenizer

ROOT = Path(__file__).parents[2]
PUBLISHED = [name for name in recipe_names() if name != "quickstart"]
runner = CliRunner()

FAMILIES: dict[str, Callable[..., Any]] = {"Qwen3": tiny_qwen3, "gemma-3": tiny_gemma3}
"""Part of a base model's name -> a tiny model of its architecture; the others are Llamas."""


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def conversations(row: int) -> dict[str, Any]:
    question = f"What is {row} plus {row}?"
    return {"chosen": turns(question, f"It is {2 * row}."), "rejected": turns(question, "No idea" + "." * row)}


def ultrafeedback(row: int) -> dict[str, Any]:
    found = conversations(row)
    scores = {"score_chosen": 8.5, "score_rejected": 6.0}
    return {"prompt": found["chosen"][0]["content"], "prompt_id": f"{row:064x}", **found, "messages": found["chosen"], **scores}


def of_armorm(row: int) -> dict[str, Any]:
    found = conversations(row)
    answers = [found[name][1]["content"] for name in ("chosen", "rejected")]
    beside = {"all_generated_responses": answers, "all_rm_scores": [0.2, 0.1]}
    return {"prompt_id": f"{row:064x}", "prompt": found["chosen"][0]["content"], **beside, **found}


def capybara(row: int) -> dict[str, Any]:
    """Several turns, of which the last is the answer; `prompt` is no conversation but text."""
    shared = ("Hello!", "Hello, what can I do?", f"Add {row} to itself.")
    answers = {"chosen": turns(*shared, f"{2 * row}"), "rejected": turns(*shared, f"{2 * row + 1}, I think")}
    beside = {"source": "Airoboros", "conversation": [{"input": shared[0], "output": shared[1]}], "original_response": "4"}
    return {**beside, "prompt": "\n".join(shared), **answers, "rating_chosen": 5, "rating_rejected": 2}


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "HuggingFaceH4/ultrafeedback_binarized": ultrafeedback,
    "trl-lib/ultrafeedback_binarized": lambda row: {**conversations(row), "score_chosen": 8.5, "score_rejected": 6.0},
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": lambda row: {
        **{"id": f"mix-{row}", "prompt": f"What is {row} plus {row}?", "source": "a data set of the mixture"},
        **conversations(row),
    },
    "princeton-nlp/llama3-ultrafeedback-armorm": of_armorm,
    "princeton-nlp/gemma2-ultrafeedback-armorm": of_armorm,
    "argilla/distilabel-capybara-dpo-7k-binarized": capybara,
    "openai/gsm8k": lambda row: {"question": f"{row} clips and {row}?", "answer": f"<<{row}+{row}={2 * row}>>\n#### {2 * row}"},
}
"""Data set -> a row of its columns."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, str]:
    """Folder of a tiny model, for each family."""
    folders = {}
    for family in {tiny_model, *FAMILIES.values()}:
        folders[family] = save_tiny(tmp_path_factory.mktemp("base"))
        family(tiny_tokenizer()).save_pretrained(folders[family])
    return folders


def small(name: str, bases: dict[Any, str], folder: Path) -> list[str]:
    """What makes a run of two steps on two CPUs of a recipe; everything else stays."""
    recipe = read_yaml(Path(name))
    family = next((family for part, family in FAMILIES.items() if part in recipe["base_model"]), tiny_model)
    changes: dict[str, Any] = {
        "base_model": bases[family],
        "sequence_len": 256,
        "max_steps": 2,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "ray.num_workers": min(2, recipe["ray"]["num_workers"]),
        "logging_steps": 1,
        "save_strategy": "'no'",
        "save_steps": "null",
        "evals_per_epoch": "null",
        "eval_steps": 2 if "test_datasets" in recipe else "null",
        "dataset_prepared_path": folder / "prepared",
        "output_dir": folder / "run",
    }
    if recipe["rl"] == "grpo":
        changes |= {"trl.num_generations": 2, "trl.max_completion_length": 8, "trl.steps_per_generation": 4}
    for key in ("datasets", "test_datasets"):
        for index, dataset in enumerate(recipe.get(key, [])):
            file = folder / f"{key}-{index}.jsonl"
            file.write_text("".join(json.dumps(ROWS[dataset["path"]](row)) + "\n" for row in range(1, 17)))
            changes |= {f"{key}.{index}.path": file, f"{key}.{index}.name": "null", f"{key}.{index}.split": "train"}
    return [f"{key}={value}" for key, value in changes.items()]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_trains(ray_session: Any, bases: dict[Any, str], tmp_path: Path, name: str) -> None:
    recipe, cfg = load_config(name), load_config(name, small(name, bases, tmp_path))
    result = train(cfg)
    assert result.steps == 2
    assert result.history[["loss", "grad_norm"]].dropna().map(abs).max().max() < 1e4
    saved = load_config(tmp_path / "run" / "config.yaml")
    for key in ("rl", "rl_beta", "learning_rate", "lr_scheduler", "lora_r", "deepspeed", "fsdp_config", "gradient_checkpointing"):
        assert getattr(saved, key) == getattr(recipe, key), key
    model = AutoModelForCausalLM.from_pretrained(cfg.base_model if cfg.adapter else result.model_dir)
    if cfg.adapter:
        PeftModel.from_pretrained(model, str(result.model_dir))
