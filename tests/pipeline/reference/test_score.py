"""What the score stage leaves: the reference's log-probabilities, row for row, once for all runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline import score
from pipeline.errors import UserError
from pipeline.io.storage import Folder
from pipeline.reference.actor import Job, ReferenceActor
from pipeline.reference.precision import resolve_precision
from pipeline.reference.score_files import Task
from tests.pipeline.reference.conftest import ROWS_PER_TASK, plain_logps
from tests.tiny import adapter_folder, save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("ray_session")


def assert_logps_of(model: Any, scores: Any, prepared: Any, rows: int | None = None) -> None:
    """Every score equals the plain computation with `model`."""
    model.eval()
    for split in ("train", "eval"):
        ids = prepared.read(split, ["prompt_ids", "chosen_ids", "rejected_ids"]).to_pylist()
        found = scores.read(split).to_pylist()
        assert len(found) == len(ids) > 0
        for row, logps in list(zip(ids, found, strict=True))[:rows]:
            for name in ("chosen", "rejected"):
                expected = plain_logps(model, row["prompt_ids"], row[f"{name}_ids"])
                assert logps[f"ref_{name}_logps"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_one_log_probability_per_completion_token(scores: Any, prepared: Any, tiny_base: str) -> None:
    assert (scores.train_rows, scores.eval_rows, scores.scored_rows) == (52, 8, 60)
    assert scores.forwards == scores.manifest["forwards"] > 60 / ROWS_PER_TASK
    schema = scores.read().schema
    assert [(field.name, str(field.type)) for field in schema] == [
        ("ref_chosen_logps", "list<element: float>"),
        ("ref_rejected_logps", "list<element: float>"),
    ]
    assert_logps_of(AutoModelForCausalLM.from_pretrained(tiny_base), scores, prepared)


def test_files_go_with_the_prepared_ones(scores: Any, prepared: Any) -> None:
    assert scores.path.parent == prepared.path.parent / "reference"
    assert sorted(path.name for path in scores.path.iterdir()) == ["eval", "manifest.json", "train"]
    for file in [*prepared.train_files(), *prepared.eval_files()]:
        part = scores.path / file.relative_to(prepared.path)
        assert pq.read_table(part)["row_id"].equals(pq.read_table(file)["row_id"])


def test_recompute_mends_and_other_actors_rows_and_tokens_give_the_same(
    scores: Any, copied: Any, recipe: Any, prepared: Any
) -> None:
    root, folder = copied[0].dataset_prepared_path, copied[1]
    (folder / "train" / "part-00000.parquet").write_bytes(b"damaged")
    seen: list[dict[str, Any]] = []
    ray = {"score": {"num_actors": 2, "resources_per_actor": {"cpu": 1}, "tokens_per_forward": 512}}
    again = score(recipe(dataset_prepared_path=root, ray=ray), prepared, progress=seen.append, recompute=True)
    assert (again.path, again.scored_rows) == (folder, 60)
    assert again.forwards < scores.forwards
    for split in ("train", "eval"):
        for mine, theirs in zip(again.read(split).to_pylist(), scores.read(split).to_pylist(), strict=True):
            assert mine["ref_chosen_logps"] == pytest.approx(theirs["ref_chosen_logps"], rel=1e-4)
    assert seen[-1] == {"stage": "score", "rows_done": 60, "rows_total": 60, "parts_done": 6, "parts_total": 6}
    assert score(recipe(dataset_prepared_path=root), prepared).forwards == 0


def test_a_later_run_scores_nothing(scores: Any, recipe: Any, prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.reference.scoring.run_pool", None)
    for keys in (
        {
            "learning_rate": 1e-3,
            "rl_beta": 0.3,
            "output_dir": "elsewhere",
            "micro_batch_size": 4,
            "attn_implementation": "eager",
        },
        {"dpo_loss_type": ["hinge"], "dpo_label_smoothing": None, "num_epochs": 2, "tokens_per_forward": 999},
        {"rl": "ipo", "sample_packing": False, "tokens_per_forward": None},
        {"adapter": "lora", "lora_r": 4},
    ):
        again = score(recipe(**keys), prepared)
        assert (again.path, again.forwards, again.scored_rows) == (scores.path, 0, 0)


def actor_of(cfg: Any, prepared: Any, staging: Path) -> ReferenceActor:
    """An actor in this process."""
    budget = {"tokens_per_forward": 512, "budget_key": "tokens_per_forward"}
    precision = resolve_precision(cfg, use_gpu=False)
    return ReferenceActor(
        Job(cfg, prepared, Folder(staging), **budget, precision=precision, grown=False, use_gpu=False, threads=1)
    )


def test_a_continued_adapter_is_a_part_of_the_reference(recipe: Any, prepared: Any, tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path / "adapter")
    policy = PeftModel.from_pretrained(tiny_model(tiny_tokenizer()), adapter).eval()
    task = Task("train/part-00001.parquet", 3, 8)
    actor_of(recipe(adapter="lora", lora_model_dir=adapter), prepared, tmp_path).run(task)
    found = pq.read_table(tmp_path / task.staged).to_pylist()
    rows = pq.read_table(prepared.path / task.part).slice(3, 5).to_pylist()
    for row, logps in zip(rows, found, strict=True):
        expected = plain_logps(policy, row["prompt_ids"], row["chosen_ids"])
        assert row["row_id"] == logps["row_id"]
        assert logps["ref_chosen_logps"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_why_rows_are_not_packed_comes_home(recipe: Any, prepared: Any, tmp_path: Path) -> None:
    task = Task("train/part-00000.parquet", 0, 1)
    assert actor_of(recipe(), prepared, tmp_path).run(task)["padded_because"] is None
    padded = actor_of(recipe(attn_implementation="eager"), prepared, tmp_path).run(task)
    assert (padded["rows"], padded["padded_because"]) == (1, "attn_implementation: eager doesn't take the mask")


@pytest.mark.main_job
def test_a_reference_that_does_not_load_is_a_message(recipe: Any, prepared: Any, tmp_path: Path) -> None:
    folder = Path(save_tiny(tmp_path / "broken"))
    (folder / "model.safetensors").write_bytes(b"no weights")
    actor = actor_of(recipe(reference_model=str(folder)), prepared, tmp_path)
    with pytest.raises(UserError, match="^reference_model: no model could be loaded from .*broken"):
        actor.run(Task("train/part-00000.parquet", 0, 1))


@pytest.mark.main_job
def test_rows_without_finite_scores_are_named(recipe: Any, prepared: Any, tmp_path: Path) -> None:
    """A row of the embeddings is NaN, of a letter that a few rows have; those that share their forwards are not accused."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    (letter,) = tokenizer("7")["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[letter] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    cfg = recipe(reference_model=str(tmp_path / "broken"), dataset_prepared_path=str(tmp_path))
    message = r"(?s)log-probabilities of (\d+) of \d+ rows are NaN or infinite.*pairs-..jsonl row \d+ \(row_id \d+\)"
    with pytest.raises(UserError, match=message) as caught:
        score(cfg, prepared, rows_per_task=ROWS_PER_TASK)
    named = {int(line.split("row_id ")[1][:-1]) for line in str(caught.value).splitlines()[1:]}
    having = {
        row["row_id"]
        for split in ("train", "eval")
        for row in prepared.read(split, ["row_id", "prompt", "chosen", "rejected"]).to_pylist()
        if "7" in row["prompt"] + row["chosen"] + row["rejected"]
    }
    assert named and named <= having
    assert not list(tmp_path.glob("reference/*/manifest.json"))


@pytest.mark.main_job
def test_keys_of_scoring_where_nothing_is_scored(recipe: Any) -> None:
    for keys in ({"rl": "simpo"}, {"reference": "live"}):
        with pytest.raises(UserError, match=r"ray.score: has no effect with rl: \w+, which has no cached reference here"):
            recipe(**keys, ray={"score": {"num_actors": 1}})


@pytest.mark.main_job
def test_what_is_not_there_to_score(recipe: Any) -> None:
    with pytest.raises(UserError, match="reference: rl: simpo uses no reference; there is nothing to score"):
        score(recipe(rl="simpo"))
    with pytest.raises(UserError, match="reference: rl: dpo keeps its reference in memory.*write `reference: cached`"):
        score(recipe(reference="live"))
    with pytest.raises(UserError, match="reference: rl: kto keeps its reference in memory here.*train without this stage"):
        score(recipe(rl="kto", tokens_per_forward=None))


@pytest.mark.main_job
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"ray": {"score": {"tokens_per_forward": 30}}},
            r"ray.score.tokens_per_forward: 30 tokens don't hold row \d+ of .*pairs-..jsonl, which takes (\d+) .*other rows "
            r"are too long as well; the smallest budget that fits every row is \1: set ray.score.tokens_per_forward: \1",
        ),
        ({"tokens_per_forward": 30}, "^tokens_per_forward: 30 tokens don't hold row"),
        (
            {"ray": {"score": {"num_actors": 3, "resources_per_actor": {"CPU": 1}}}},
            "ray.score.num_actors: 3 actors of 1 CPU each don't fit: the cluster has 2 CPU on 1 node, enough for 2",
        ),
        ({"fp16": True, "bf16": False}, "fp16: float16 needs a GPU and the scoring actors have none"),
        ({"reference_model": "./none"}, "reference_model: no such folder: './none'"),
    ],
)
def test_bad_input_is_said_before_actors_start(
    recipe: Any, prepared: Any, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("pipeline.reference.scoring.run_pool", None)
    with pytest.raises(UserError, match=message):
        score(recipe(**keys), prepared)


@pytest.mark.main_job
def test_the_smallest_budget_that_is_named_fits(scores: Any, recipe: Any, prepared: Any) -> None:
    with pytest.raises(UserError) as caught:
        score(recipe(tokens_per_forward=30), prepared)
    smallest = int(str(caught.value).split("tokens_per_forward: ")[2].split(",")[0])
    assert score(recipe(tokens_per_forward=smallest), prepared).path == scores.path
    with pytest.raises(UserError, match=f"is {smallest}: set"):
        score(recipe(tokens_per_forward=smallest - 1), prepared)
