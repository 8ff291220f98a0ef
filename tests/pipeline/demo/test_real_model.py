"""The demo's real model takes a step: its recipe and its rows, in this process."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

from pipeline import load_config
from pipeline.data.preparation import prepare
from pipeline.demo.preferences import write_preferences
from pipeline.ray.tasks import run_here
from strategies import TrainDatasetMeta, train

RECIPE = Path(__file__).parents[3] / "pipeline" / "recipes" / "quickstart.yaml"
KEYS = ["max_steps=2", "micro_batch_size=2", "warmup_steps=0", "reference=live", "test_datasets=null"]
KEYS += ["eval_strategy='no'", "eval_steps=null", "save_strategy='no'", "save_steps=null", "ray.num_workers=1"]


@pytest.mark.main_job
@pytest.mark.realmodel
def test_smollm2_takes_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_preferences(tmp_path / "prefray-demo" / "data")
    file = tmp_path / "prefray-demo" / "data" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()][:2]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = load_config(str(RECIPE), [*KEYS, f"output_dir={tmp_path / 'run'}"])
    columns = ["row_id", "prompt_ids", "chosen_ids", "rejected_ids"]
    prepared = prepare(cfg, executor=run_here).read("train", columns)
    model, tokenizer, trainer = train(cfg=cfg, dataset_meta=TrainDatasetMeta(Dataset(prepared)))
    assert isinstance(model, PeftModel) and model.num_parameters() > 130e6
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[1] < losses[0] - 0.01
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()
    question = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad(), model.disable_adapter():
        answer = model.generate(**question, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]).endswith(" Paris")
