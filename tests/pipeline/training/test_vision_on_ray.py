"""Runs on pictures through Ray: scored once, trained by two workers, evaluated, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipeline import evaluate, generate, train
from pipeline.config import RunConfig, parse_config
from pipeline.data import prepare
from pipeline.errors import UserError
from pipeline.evaluation.generate_on_ray import SamplingOptions
from pipeline.merging.merge import merge
from pipeline.reference import score
from tests.laws.runs import LORA, losses
from tests.laws.vision import prepared_pictures, raw_pictures, trained_on
from tests.tiny_vision import llava, save_vision

pytestmark = pytest.mark.usefixtures("ray_session")
GREEDY = SamplingOptions(max_new_tokens=8, temperature=0)
KEYS: dict[str, Any] = {
    "sequence_len": 512,
    "micro_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "bf16": False,
    "num_epochs": 1.0,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """`recipe(name, **keys)`: 16 training rows about pictures and 4 for evaluation, every fourth without one, on LLaVA."""
    base = save_vision(tmp_path / "base", "llava")

    def make(name: str, **keys: Any) -> RunConfig:
        rows = raw_pictures(20, keys.get("rl", "dpo"))
        places = {
            "base_model": base,
            "datasets": [{"path": _write(tmp_path / "train.jsonl", rows[:16])}],
            "test_datasets": [{"path": _write(tmp_path / "eval.jsonl", rows[16:])}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / name),
        }
        common = {**KEYS, **({} if keys.get("rl") == "kto" else {"tokens_per_forward": 700})}
        return parse_config({**common, **places, **keys})

    return make


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as JSON lines, with their pictures as PNG files beside them; returns the path."""
    lines = []
    for number, row in enumerate(rows):
        names = [f"{path.stem}-{number}-{index}.png" for index in range(len(row["images"]))]
        for name, image in zip(names, row["images"], strict=True):
            image.save(path.parent / name)
        lines.append(json.dumps({**row, "images": names}) + "\n")
    path.write_text("".join(lines))
    return str(path)


def test_scores_are_kept_and_found_again(recipe: Any) -> None:
    cfg = recipe("scored")
    first = score(cfg)
    assert first.scored_rows == 20 and first.padded_because is None
    assert score(cfg).forwards == 0


def test_two_workers_give_the_run_of_one_process(recipe: Any, tmp_path: Path) -> None:
    """Law 3, and 2: the reference is scored by an actor there, and runs beside the policy here."""
    keys = {"micro_batch_size": 2, "tokens_per_forward": 700, "learning_rate": 1e-3}
    result = train(recipe("two", eval_steps=2, save_steps=2, ray={"num_workers": 2}), report=False)
    rows = prepared_pictures(llava(), 16)
    alone = trained_on(tmp_path / "alone", "llava", rows, **{**keys, "micro_batch_size": 4})
    assert result.history["loss"].dropna().tolist() == pytest.approx(losses(alone), rel=1e-4)
    processor = AutoProcessor.from_pretrained(result.model_dir)
    assert processor.chat_template and processor.image_processor.size == {"shortest_edge": 32}
    AutoModelForImageTextToText.from_pretrained(result.model_dir)


def test_a_run_that_was_stopped_and_resumed(recipe: Any) -> None:
    """Law 4: a run of half the steps is continued with the processes that make pixels, and without."""
    # The same rate in each step, whatever number of them follows.
    keys = {"save_steps": 2, "lr_scheduler": "constant", "warmup_steps": 0}
    whole = train(recipe("whole", **keys), report=False)
    train(recipe("half", max_steps=4, **keys), report=False)
    resumed = train(recipe("half", dataloader_num_workers=0, **keys), resume=True, report=False)
    assert resumed.steps == whole.steps
    assert resumed.history["loss"].dropna().tolist()[-1] == whole.history["loss"].dropna().tolist()[-1]


def test_labelled_completions(recipe: Any) -> None:
    result = train(recipe("kto", rl="kto", max_steps=2, save_steps=2, eval_steps=2), report=False)
    assert {"kl", "rewards/chosen", "eval_loss"} <= set(result.history)


def test_an_adapter_answers_is_evaluated_and_merged(recipe: Any, tmp_path: Path) -> None:
    keys = {**LORA, "eval_steps": 4, "dpo_generate_during_eval": True, "learning_rate": 5e-3}
    result = train(recipe("adapter", **keys), report=False)
    (table, *_) = sorted((result.run_dir / "generations").glob("step-*.jsonl"))
    answers = [json.loads(line) for line in table.read_text().splitlines()]
    assert answers and {"prompt", "policy", "reference"} <= answers[0].keys()
    assert all(answer["prompt"].count("<image>") <= 1 for answer in answers)
    found = evaluate(
        str(result.run_dir),
        rewards=["tests.reward_functions.length"],
        answers=4,
        options=SamplingOptions(max_new_tokens=8),
    )
    for name in ("rewards/margins", "logps/chosen"):
        assert found.metrics[name].value == pytest.approx(result.metrics[f"eval_{name}"], rel=1e-4, abs=1e-6)
    assert found.answers is not None and found.answers["logratio"].notna().all()
    (pair, *_) = [row for row in raw_pictures(20)[16:] if row["images"]]
    (local,) = generate(str(result.run_dir), [{"images": pair["images"], "prompt": pair["prompt"]}], options=GREEDY).rows
    on_ray = evaluate(str(result.run_dir), answers=4, options=GREEDY, rewards=["tests.reward_functions.length"]).answers
    assert on_ray is not None and on_ray["policy"][0] == local["policy"]
    merged = merge(result.run_dir, tmp_path / "merged")
    assert merged.differences is not None and merged.differences.is_explained
    AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    AutoProcessor.from_pretrained(tmp_path / "merged")
    PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), str(result.model_dir))


@pytest.mark.parametrize(
    "sharding",
    [
        pytest.param({"deepspeed": "zero3"}, marks=pytest.mark.release, id="zero3"),
        pytest.param({"fsdp_config": {}}, id="fsdp2"),
    ],
)
def test_divided_among_two_workers(recipe: Any, sharding: dict[str, Any]) -> None:
    result = train(recipe("divided", max_steps=2, save_steps=2, ray={"num_workers": 2}, **sharding), report=False)
    assert result.steps == 2
    AutoModelForImageTextToText.from_pretrained(result.model_dir)
    AutoProcessor.from_pretrained(result.model_dir)


@pytest.mark.parametrize("rl", ["dpo", "simpo"])
def test_a_picture_that_breaks_after_it_was_prepared(recipe: Any, rl: str) -> None:
    """Where the reference is scored, and in a worker's data loader: one message, and no restart."""
    cfg = recipe("broken", rl=rl, max_steps=2)
    for path in (prepare(cfg).path / "images").rglob("*.png"):
        path.write_bytes(b"x" * path.stat().st_size)  # of the same size, which alone is compared when a store is opened
    with pytest.raises(
        UserError, match=r"a picture can't be read: .* no format that Pillow knows \(.*/images/.*\.png\)"
    ) as error:
        train(cfg, report=False)
    assert "Traceback" not in str(error.value) and len(str(error.value).splitlines()) == 1
    path.unlink()
    with pytest.raises(UserError, match=r"doesn't hold what was prepared: images/.* is missing"):
        train(cfg, report=False)


@pytest.mark.release
def test_another_size_of_pictures_is_not_resumed_with(recipe: Any) -> None:
    train(recipe("sized", max_steps=2, save_steps=2, image_size=32), report=False)
    with pytest.raises(UserError, match="image_size: was 32, is 16"):
        train(recipe("sized", max_steps=4, save_steps=2, image_size=16), resume=True, report=False)
