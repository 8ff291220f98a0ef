"""Law 6, for grpo: on the same prompts and seed our trainer and TRL's generate, reward and learn the same."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from benchmarks.processes import free_port, spawn
from strategies.config import as_config
from strategies.config.schedule import total_steps
from tests.laws.runs import CONFIG, LORA, losses
from tests.reward_functions import length, low_tokens
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

METRICS = (
    "loss grad_norm learning_rate entropy num_tokens reward reward_std frac_reward_zero_std rewards/low_tokens/mean "
    "rewards/length/mean completions/mean_length completions/clipped_ratio clip_ratio/region_mean"
).split()
TRL: dict[str, Any] = {"num_generations": 4, "max_completion_length": 8, "reward_weights": [1.0, 0.1]}
REWARDS = ["tests.reward_functions.low_tokens", "tests.reward_functions.length"]


def prompts(number: int = 10) -> list[dict[str, str]]:
    return [{"prompt": f"What is {row} plus {row % 5}? "} for row in range(number)]


def ours(folder: Path, trl: dict[str, Any], **keys: Any) -> Any:
    from strategies import HFRLTrainerBuilder

    tokenizer = tiny_tokenizer()
    trl = {**TRL, "reward_funcs": REWARDS, **trl}
    keys = {**CONFIG, "rl": "grpo", "micro_batch_size": 4, "gradient_accumulation_steps": 2, "trl": trl, **keys}
    builder = HFRLTrainerBuilder({**keys, "output_dir": str(folder)}, tiny_model(tokenizer), tokenizer)
    builder.train_dataset = prompts()
    builder.eval_dataset = prompts(3) if "eval_steps" in keys else None
    trainer = builder.build()
    trainer.train()
    return trainer


def theirs(folder: Path, base: str, peft_config: Any = None, **arguments: Any) -> GRPOTrainer:
    """TRL's trainer, which loads its reference from the policy's folder."""
    args = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        num_train_epochs=1,
        seed=42,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        average_tokens_across_devices=False,
        disable_tqdm=True,
        disable_dropout=True,
        **{**TRL, **arguments},
    )
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        [low_tokens, length],
        args,
        train_dataset=Dataset.from_list(prompts()),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the weights that `tiny_model` has."""
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "trl",
    [{}, {"beta": 0.04}, {"beta": 0.04, "loss_type": "grpo", "num_iterations": 2, "temperature": 0.7, "epsilon_high": 0.3}],
    ids=["beta_0", "beta", "iterations"],
)
def test_same_run_as_trl(tmp_path: Path, base: str, trl: dict[str, Any], lora: bool) -> None:
    adapter = {**LORA, "lora_target_modules": ["q_proj", "v_proj"]} if lora else {}
    peft_config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None
    mine = ours(tmp_path / "ours", trl, warmup_steps=0, **adapter)
    other = theirs(tmp_path / "trl", base, peft_config, **trl)
    assert len(losses(mine)) == 5 * trl.get("num_iterations", 1)
    for name in [*METRICS, *(["kl"] if "beta" in trl else [])]:
        assert losses(mine, name) == pytest.approx(losses(other, name), rel=1e-4, abs=1e-6), name
    assert max(losses(mine, "reward_std")) > 0
    if "beta" in trl:
        assert losses(mine, "kl")[-1] > 1e-6


RUNS: dict[str, dict[str, Any]] = {
    "full": {"trl": {"beta": 0.04}, "eval_steps": 2},
    "lora": {"trl": {"beta": 0.04, "num_iterations": 2}, **LORA},
    "spread": {"trl": {"num_generations": 8, "steps_per_generation": 4}, "micro_batch_size": 2},
}


def worker(rank: int, world_size: int, port: int, folder: str) -> None:
    """One process of a gloo group: trains every run, and leaves what its rank logged and the sum of its weights."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    for name, keys in RUNS.items():
        trainer = ours(Path(folder) / name, **keys)
        found: dict[str, Any] = {
            metric: losses(trainer, metric) for metric in ("loss", "reward", "eval_reward", "num_tokens", "kl", "grad_norm")
        }
        found["steps"] = trainer.state.global_step
        found["sums"] = [value.double().sum().item() for value in trainer.model.state_dict().values()]
        (Path(folder) / f"{name}-{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    spawn(worker, 2, 2, free_port(), str(folder))
    return folder


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_learn_together(two_processes: Path, name: str) -> None:
    first, second = (json.loads((two_processes / f"{name}-{rank}.json").read_text()) for rank in range(2))
    keys = {**CONFIG, "rl": "grpo", "micro_batch_size": 4, "gradient_accumulation_steps": 2, **RUNS[name]}
    config = as_config({**keys, "trl": {**TRL, "reward_funcs": REWARDS, **RUNS[name]["trl"]}})
    assert first == second
    assert first["steps"] == total_steps(10, config, world_size=2) == len(first["loss"])
    assert first["reward"] and max(first["grad_norm"]) > 0
    assert bool(first["eval_reward"]) == ("eval_steps" in RUNS[name])
