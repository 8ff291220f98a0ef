"""Every strategy on Ray: two workers, real rows, all weights and an adapter, a model that loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import TrainResult, train
from strategies.methods.registry import STRATEGIES, get_strategy
from tests.recipes import Recipe
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[3]
PAIRS = {
    "path": "dpo_en_demo.json",
    "type": "chat_template.default",
    "field_messages": "conversations",
    "message_property_mappings": {"role": "from", "content": "value"},
    "roles": {"user": ["human"], "assistant": ["gpt"]},
    "split": "train[:40]",
}
LABELLED = {"path": "kto_en_demo.json", "type": "chat_template.default", "split": "train[:60]"}
GENERATION = {"num_generations": 4, "max_completion_length": 8, "beta": 0.02, "temperature": 1.0}
KEYS: dict[str, dict[str, Any]] = {
    "dpo": {"dpo_loss_type": ["apo_zero", "sft"], "dpo_loss_weights": [1.0, 0.1]},
    "ipo": {},
    "simpo": {"cpo_alpha": 0.1},
    "orpo": {"orpo_alpha": 0.3},
    "kto": {"kto_undesirable_weight": 1.2, "val_set_size": 20},
    "grpo": {"trl": {**GENERATION, "reward_funcs": ["tests.reward_functions.low_tokens"], "log_completions": True}},
}


def recipe_of(rl: str, form: dict[str, Any], shared_data: Path) -> dict[str, Any]:
    """Four steps on real rows; of KTO on labelled ones with an adapter, and on pairs that are split with all weights."""
    labelled = LABELLED if form else {**PAIRS, "split_pairs": True}
    dataset = labelled if rl == "kto" else PAIRS
    return {
        "rl": rl,
        "datasets": [{**dataset, "path": str(shared_data / dataset["path"])}],
        "sequence_len": 512,
        "excess_length_strategy": "truncate",
        "max_steps": 4,
        "save_steps": 4,
        "learning_rate": 5e-3,
        **KEYS[rl],
        **form,
    }


def loaded(result: TrainResult, base: str, adapter: bool) -> Any:
    """The model that a run has left, by the public ways to load one."""
    assert AutoTokenizer.from_pretrained(result.model_dir).chat_template
    if adapter:
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(result.model_dir))
    return AutoModelForCausalLM.from_pretrained(result.model_dir)


# Each kind of rows with all weights and with an adapter: strategies of pairs differ in the loss alone.
FULL: dict[str, Any] = {}
LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 4}
FORMS = {"dpo": [FULL], "ipo": [LORA], "simpo": [FULL], "orpo": [LORA], "kto": [FULL, LORA], "grpo": [FULL, LORA]}


@pytest.mark.parametrize(("rl", "form"), [(rl, form) for rl in STRATEGIES for form in FORMS[rl]])
def test_two_workers_train_on_real_rows(
    ray_session: Any, recipe: Recipe, tiny_base: str, shared_data: Path, tmp_path: Path, rl: str, form: dict[str, Any]
) -> None:
    result = train(recipe(tmp_path / rl, **recipe_of(rl, form, shared_data)))
    assert result.steps == 4
    assert result.history["step"].dropna().max() == 4
    assert get_strategy(rl).best_metric in result.history
    names = {"reward", "kl", "entropy"} if rl == "grpo" else {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins"}
    assert names | {"grad_norm", "num_tokens", "tokens_per_second"} <= set(result.history)
    assert result.history[["loss", "grad_norm"]].dropna().map(abs).max().max() < 1e4
    ids = torch.tensor([[5, 6, 7]])
    model, untrained = loaded(result, tiny_base, bool(form)).eval(), tiny_model(tiny_tokenizer()).eval()
    assert torch.isfinite(model(ids).logits).all()
    assert not torch.allclose(model(ids).logits, untrained(ids).logits, atol=1e-4)
    assert f"| Method | {rl}, loss" in (result.model_dir / "README.md").read_text()
    page = (result.run_dir / "report.html").read_text(encoding="utf-8")
    assert "Reward" in page and ("Completions</h2>" in page) == (rl == "grpo")
    if rl == "kto" and form is FULL:  # whose rows are pairs that were split: each step has both kinds
        last = result.history.dropna(subset=["loss"]).iloc[-1]
        assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    if rl == "grpo":
        assert list((result.run_dir / "completions").glob("*.parquet"))
        assert re.search(r"<h3>prompt, step 1</h3>.*<h3>low_tokens 0(\.\d+)?, advantage -?\d", page, flags=re.DOTALL)


@pytest.mark.driver
def test_the_command_finds_reward_functions_in_the_current_directory(tiny_base: str, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def wants(completions, answer, **kwargs):\n    return [float(a in c) for a, c in zip(answer, completions)]\n"
    )
    rows = "".join(f'{{"prompt": "Say {letter}: ", "answer": "{letter}"}}\n' for letter in "abcdefgh")
    (tmp_path / "prompts.jsonl").write_text(rows)
    trl = {**GENERATION, "reward_funcs": ["my_rewards.wants"]}
    keys = {"base_model": tiny_base, "rl": "grpo", "datasets": [{"path": "prompts.jsonl"}], "trl": trl, "max_steps": 1}
    cluster = {"micro_batch_size": 2, "ray": {"num_workers": 2}, "output_dir": "run"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**keys, **cluster}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipeline", "train", "recipe.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "reward" in done.stdout
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.main_job
@pytest.mark.parametrize(
    ("trl", "message"),
    [
        ({"reward_funcs": ["tests.reward_functions.lenght"]}, r"trl\.reward_funcs\.0: .*did you mean length"),
        (
            {"reward_funcs": ["tests.reward_functions.length"], "num_generations": 3},
            r"num_generations.*gradient_accumulation_steps: 3",
        ),
    ],
)
def test_wrong_things_are_said_before_workers_start(
    ray_session: Any, recipe: Recipe, tmp_path: Path, trl: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(recipe(tmp_path / "run", rl="grpo", trl=trl))
    assert not (tmp_path / "run").exists()
