"""Runs on Ray Train, with real workers: what they leave, and that they can be continued."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import TrainResult, train
from pipeline.errors import UserError
from pipeline.ui.display import SilentDisplay
from tests.actors import actors
from tests.recipes import Recipe
from tests.runs import LONG, full_recipe

pytestmark = pytest.mark.usefixtures("ray_session")


class Recorder(SilentDisplay):
    """A display that keeps what it is shown."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.actors: Counter[str] = Counter()
        """When the first record came."""

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append(name)

    def record(self, record: dict[str, Any]) -> None:
        self.actors = self.actors or actors()
        self.records.append(record)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def run(finished_full: TrainResult) -> TrainResult:
    """A full fine-tuning of 40 steps on two workers."""
    return finished_full


@pytest.fixture(scope="module")
def same(run: TrainResult, tiny_base: str) -> Recipe:
    """`same(output_dir, **keys)`: the recipe of `run`."""
    make = full_recipe(tiny_base, run.run_dir.parent)
    return lambda output_dir, **keys: make(output_dir, **{**LONG, **keys})


@pytest.fixture(scope="module")
def shown() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def alone(ray_session: Any, recipe: Any, shown: Recorder, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The same on one worker."""
    keys = {**LONG, "ray": {"num_workers": 1}, "micro_batch_size": 4}
    return train(recipe(tmp_path_factory.mktemp("runs") / "alone", **keys), display=shown)


def losses(result: TrainResult) -> list[float]:
    return result.history.dropna(subset=["loss"])["loss"].tolist()


def answer(model: Any, tokenizer: Any) -> str:
    inputs = tokenizer("What is 1 plus 1? ", return_tensors="pt")
    with torch.no_grad():
        return tokenizer.decode(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0])


def test_the_folder_of_a_run(run: TrainResult) -> None:
    names = {path.name for path in run.run_dir.iterdir() if not path.name.startswith(".")}
    assert {"config.yaml", "metrics.jsonl", "run.json", "model", "checkpoint-000016", "checkpoint-000040"} <= names
    assert json.loads((run.run_dir / "run.json").read_text())["step"] == run.steps == 40
    assert yaml.safe_load((run.run_dir / "config.yaml").read_text())["ray"]["num_workers"] == 2
    assert (run.model_dir / "model.safetensors").is_file()
    assert (run.model_dir / "chat_template.jinja").is_file()
    assert "| Global batch | 8 pairs |" in (run.model_dir / "README.md").read_text()


def test_steps_count_with_the_global_batch(run: TrainResult) -> None:
    """32 pairs, 2 x 2 x 2 a step: 4 steps an epoch, 40 in all; every step is recorded once."""
    trained = run.history.dropna(subset=["loss"])
    assert trained["step"].tolist() == list(range(1, 41))
    assert trained["epoch"].iloc[-1] == 10.0
    assert run.history.dropna(subset=["eval_loss"])["step"].tolist() == [20, 40]


def test_the_run_learns(run: TrainResult) -> None:
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses(run)[-1] < 0.6
    assert run.metrics["eval_rewards/accuracies"] == 1.0


def test_what_is_shown(alone: TrainResult, shown: Recorder) -> None:
    stages = ["starting Ray", "preparing data", "scoring the reference", "starting 1 worker", "training", "writing the report"]
    assert shown.stages == stages
    assert shown.notes[0].startswith("prepared 32 training and 8 evaluation rows")
    assert [note for note in shown.notes if note.startswith("saved")] == [
        f"saved checkpoint-0000{n}" for n in ("08", "16", "24", "32", "40")
    ]
    assert all(record["tokens_per_second"] > 0 for record in shown.records if "loss" in record)


def test_a_run_has_no_actors_but_those_that_ray_train_starts(alone: TrainResult, shown: Recorder) -> None:
    """Its events come to the driver without another process."""
    assert shown.actors == {"TrainController": 1, "RayTrainWorker": 1, "SynchronizationActor": 1}


def test_the_model_loads_and_generates(run: TrainResult) -> None:
    model = AutoModelForCausalLM.from_pretrained(run.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(run.model_dir)
    assert answer(model, tokenizer).startswith("What is 1 plus 1? ")
    assert tokenizer.chat_template


def test_a_finished_run_is_not_run_again(run: TrainResult, same: Recipe) -> None:
    with pytest.raises(UserError, match="holds a finished run of 40 steps; continue it with --resume"):
        train(same(run.run_dir))
    display = Recorder()
    again = train(same(run.run_dir), resume=True, display=display)
    assert (again.steps, again.metrics) == (run.steps, run.metrics)
    assert "already finished with step 40" in display.notes[-1]


def test_law_3_one_worker_gives_the_trajectory_of_two(run: TrainResult, alone: TrainResult) -> None:
    torch.testing.assert_close(torch.tensor(losses(alone)), torch.tensor(losses(run)), rtol=1e-4, atol=1e-6)
    columns = ["rewards/margins", "logps/chosen", "eval_loss", "grad_norm"]
    for column in columns:
        mine, theirs = (torch.tensor(result.history[column].dropna().tolist()) for result in (alone, run))
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.main_job
def test_more_workers_than_cpus(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ray.num_workers: 3 workers of 1 CPU each don't fit: the cluster has 2 CPU"):
        train(recipe(tmp_path / "run", ray={"num_workers": 3}))
    assert not (tmp_path / "run").exists()


@pytest.mark.main_job
def test_wrong_things_are_said_before_workers_start(recipe: Any, tmp_path: Path) -> None:
    for keys, message in (
        ({"base_model": "./none"}, "base_model: no such folder: './none'"),
        ({"reference_model": "./none"}, "reference_model: no such folder"),
        ({"load_best_model_at_end": True, "save_steps": 6}, "save_steps \\(6\\) must be a multiple of eval_steps \\(4\\)"),
        ({"datasets": [{"path": "./none.jsonl"}]}, "none.jsonl"),
        ({"rl": "kto"}, "the row is a pair .chosen, rejected.: split_pairs: true makes two labelled rows of it"),
        ({"rl": "grpo"}, "trl.reward_funcs"),
    ):
        with pytest.raises(ValueError, match=message):
            train(recipe(tmp_path / "run", **keys))


@pytest.mark.main_job
def test_what_a_worker_finds_wrong_comes_home_as_its_message(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="^reference_model: .*empty"):
        train(recipe(tmp_path / "run", reference_model=str(tmp_path / "empty")))


def test_lora_on_real_pairs_with_the_best_checkpoint(recipe: Any, tiny_base: str, shared_data: Path, tmp_path: Path) -> None:
    """Real multi-turn pairs, an adapter, answers at each evaluation, early stopping, the best checkpoint at the end."""
    result = train(
        recipe(
            tmp_path / "lora",
            datasets=[
                {
                    "path": str(shared_data / "dpo_en_demo.json"),
                    "type": "chat_template.default",
                    "field_messages": "conversations",
                    "message_property_mappings": {"role": "from", "content": "value"},
                    "roles": {"user": ["human"], "assistant": ["gpt"]},
                    "split": "train[:60]",
                }
            ],
            sequence_len=512,
            excess_length_strategy="truncate",
            adapter="lora",
            lora_r=4,
            learning_rate=5e-2,
            max_steps=40,
            dpo_generate_during_eval=True,
            early_stopping_patience=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
        )
    )
    evaluations = result.history.dropna(subset=["eval_loss"]).set_index("step")["eval_loss"]
    best = int(evaluations.idxmin())
    assert result.steps == min(40, best + 8)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), result.model_dir)
    assert answer(model, AutoTokenizer.from_pretrained(result.model_dir))
    saved = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), result.run_dir / f"checkpoint-{best:06d}"
    )
    for (name, mine), (_, theirs) in zip(model.named_parameters(), saved.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    table = (result.run_dir / "generations" / "step-000004.jsonl").read_text().splitlines()
    assert set(json.loads(table[0])) == {"prompt", "policy", "reference"}
