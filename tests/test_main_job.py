"""The main job, on real parts and in one folder, as a person does it: each command takes what the ones before have left.

Prepare, score, train on two workers of which one is killed, resume, evaluate, generate, merge, report, sweep.
"""

from __future__ import annotations

import json
import logging
import math
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from benchmarks.chaos import training_workers
from pipeline import TrainResult, load_config
from pipeline.cli import app
from pipeline.config import RunConfig, dump_config
from pipeline.training.folder import RunFolder
from pipeline.training.metrics import MetricsFile
from strategies.checkpoints.manifest import find_damage
from tests.runs import adapter_recipe
from tests.waiting import wait_for

pytestmark = [pytest.mark.main_job, pytest.mark.usefixtures("ray_session")]

STEPS = list(range(1, 41))
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def root(finished_adapter: TrainResult) -> Path:
    """Where `finished_adapter` lies, with its data."""
    return Path(str(finished_adapter.run_dir)).parent


@pytest.fixture(scope="module")
def recipe(root: Path, tiny_base: str) -> Path:
    """The recipe of `finished_adapter`, for another folder: its data are prepared and scored there already."""
    cfg = adapter_recipe(
        tiny_base, root, output_dir=str(root / "hit"), ray={"num_workers": 2, "max_failures": 1, "hang_timeout": 300}
    )
    (root / "recipe.yaml").write_text(dump_config(cfg))
    return root / "recipe.yaml"


@pytest.fixture
def prefray(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`prefray(*words)`: the command, in this process; without a status it must succeed."""
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Ray's handlers keep the stream of the first command

    def run(*words: str, status: int = 0) -> Result:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == status, result.output + result.stderr
        assert "Traceback" not in result.stderr
        return result

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "adapter_model.safetensors")


def events(folder: Path) -> list[str]:
    return [event["event"] for event in (RunFolder(folder).state() or {})["events"]]


def ledger(folder: Path) -> list[dict[str, Any]]:
    return MetricsFile(RunFolder(folder).ledger).read()


def history(folder: Path, name: str) -> dict[int, float]:
    """The values of a metric, by their step."""
    records = MetricsFile(RunFolder(folder).metrics).read()
    return {record["step"]: record[name] for record in records if name in record}


def test_prepare_shows_the_data(prefray: Run, recipe: Path, root: Path, tmp_path: Path) -> None:
    shown = prefray("prepare", str(recipe), "--quiet", "--set", f"dataset_prepared_path={tmp_path}")
    assert {"38", "32", "4", "6"} <= set(shown.stdout.split())  # read, train, eval, rejected
    assert "What is" in shown.stdout and "p99" in shown.stdout
    (store,) = (path.parent for path in (root / "prepared").glob("*/manifest.json"))
    (again,) = (path.parent for path in tmp_path.glob("*/manifest.json"))
    assert store.name == again.name
    for file in store.glob("*/*.parquet"):
        assert file.read_bytes() == (again / file.relative_to(store)).read_bytes(), file


def test_score_finds_what_was_scored(prefray: Run, recipe: Path) -> None:
    shown = prefray("score", str(recipe), "--quiet")
    assert {"rows", "32", "4"} <= set(shown.stdout.split())
    assert "forwards  none, the scores were there already" in shown.stdout
    assert "scoring the reference" in shown.stderr


def test_the_run_learns_and_leaves_its_files(finished_adapter: TrainResult, root: Path, tiny_base: str) -> None:
    folder = root / "run"
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert {"config.yaml", "metrics.jsonl", "ledger.jsonl", "run.json", "model", "report.html", "generations"} <= names
    assert {"checkpoint-000016", "checkpoint-000040"} <= names and find_damage(folder / "checkpoint-000040") is None
    losses = history(folder, "loss")
    assert list(losses) == STEPS and losses[1] == pytest.approx(math.log(2), abs=1e-5) and losses[40] < 0.6
    assert list(history(folder, "eval_loss")) == [20, 40]
    assert finished_adapter.steps == 40 and finished_adapter.history["epoch"].iloc[-1] == 10
    assert yaml.safe_load((folder / "config.yaml").read_text())["ray"]["num_workers"] == 2
    assert "| Global batch | 8 pairs |" in (folder / "model" / "README.md").read_text()
    table = (folder / "generations" / "step-000040.jsonl").read_text().splitlines()
    assert len(table) == 4 and set(json.loads(table[0])) == {"prompt", "policy", "reference"}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder / "model")
    assert AutoTokenizer.from_pretrained(folder / "model").chat_template
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_every_pair_is_trained_once_an_epoch(finished_adapter: TrainResult, root: Path) -> None:
    records = ledger(root / "run")
    assert [record["step"] for record in records] == STEPS
    epochs = [sorted(row for record in records[start : start + 4] for row in record["row_ids"]) for start in range(0, 40, 4)]
    assert all(len(set(epoch)) == len(epoch) == 32 and epoch == epochs[0] for epoch in epochs)
    assert records[0]["row_ids"] != records[4]["row_ids"]


def test_a_worker_is_killed_and_the_run_is_as_if_nothing_was(prefray: Run, recipe: Path, root: Path) -> None:
    """SIGKILL in the middle: the run restarts from its checkpoint, and its weights are those of the quiet run, bit for bit."""
    hit = RunFolder(root / "hit")

    def kill() -> None:
        wait_for(lambda: 8 in hit.checkpoints())
        training_workers()[1].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    shown = prefray("train", str(recipe))
    killer.join()
    said = shown.stderr
    assert re.search(r"worker \d on \S+ died at \d\d:\d\d:\d\d after step \d+: ", said), said
    assert re.search(r"restarting from the checkpoint of step \d+ \(restart 1 of 1\)", said), said
    found = re.search(r"continuing from the checkpoint of step (\d+)(?:: (\d+) steps? (?:is|are) repeated)?", said)
    assert found is not None and int(found[2] or 0) <= 8, said
    assert "they were there already" in said and "step 40/40  loss" in said
    assert "rewards/margins" in shown.stdout and f"model   {root}/hit/model" in shown.stdout
    assert events(root / "hit") == ["began", "training", "failure", "training", "ended"]
    assert ledger(root / "hit") == ledger(root / "run")
    assert history(root / "hit", "loss") == history(root / "run", "loss")
    mine, theirs = weights(root / "hit"), weights(root / "run")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    page = (root / "hit" / "report.html").read_text(encoding="utf-8")
    assert re.search(r"worker \d on \S+ died: .*restart 1 \(ray.max_failures\)", page, flags=re.DOTALL)
    assert "<b>1</b><span>restarts after failures" in page and "Vertical lines mark steps" in page


def test_a_finished_run_is_continued_with_more_epochs_only(prefray: Run, recipe: Path, root: Path) -> None:
    refused = prefray("train", str(recipe), status=2)
    assert "holds a finished run of 40 steps; continue it with --resume" in refused.stderr
    assert "already finished with step 40" in prefray("train", str(recipe), "--resume").stderr
    before = {name: value.clone() for name, value in weights(root / "hit").items()}
    said = prefray("train", str(recipe), "--resume", "--set", "num_epochs=11").stderr
    assert "continuing from the checkpoint of step 40" in said
    assert list(history(root / "hit", "loss")) == list(range(1, 45))
    assert [record["step"] for record in ledger(root / "hit")] == list(range(1, 45))
    assert events(root / "hit")[-3:] == ["began", "training", "ended"]
    assert any(not torch.equal(before[name], value) for name, value in weights(root / "hit").items())


def test_evaluate_reproduces_the_last_evaluation(prefray: Run, finished_adapter: TrainResult, tmp_path: Path) -> None:
    command = ["evaluate", str(finished_adapter.run_dir), "--answers", "3", "--max-new-tokens", "4", "--temperature", "0"]
    shown = prefray(*command, "--json", str(tmp_path / "found.json"))
    for words in ("rewards/accuracies", "95% interval", "answers/length"):
        assert words in shown.stdout, words
    found = json.loads((tmp_path / "found.json").read_text())["metrics"]
    for name in ("rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen", "logps/rejected"):
        assert found[name]["value"] == pytest.approx(finished_adapter.metrics[f"eval_{name}"], rel=1e-4, abs=1e-6), name
    assert found["answers/length"]["n"] == 3 and found["rewards/margins"]["n"] == 4


def test_generate_answers_with_both_models(prefray: Run, finished_adapter: TrainResult, tiny_base: str) -> None:
    shown = prefray(
        "generate", str(finished_adapter.run_dir), "Why?", "--max-new-tokens", "6", "--temperature", "0", "--json", "-"
    )
    (row,) = json.loads(shown.stdout)["answers"]
    tokenizer, base = AutoTokenizer.from_pretrained(tiny_base), AutoModelForCausalLM.from_pretrained(tiny_base)
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(finished_adapter.model_dir))
    turn = [{"role": "user", "content": "Why?"}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    for name, model in (("policy", policy), ("reference", base)):
        answer = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert row[name] == tokenizer.decode(answer, skip_special_tokens=True), name


def test_merge_gives_a_model_that_needs_no_peft(prefray: Run, root: Path, tiny_base: str) -> None:
    shown = prefray("merge", str(root / "hit"), "--quiet")
    assert f"model    {root}/hit/merged" in shown.stdout
    assert "verifying on evaluation rows of the run" in shown.stderr
    merged = AutoModelForCausalLM.from_pretrained(root / "hit" / "merged")
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), root / "hit" / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(merged(ids).logits, policy(ids).logits, rtol=1e-4, atol=1e-5)


def test_report_writes_the_page_again(prefray: Run, root: Path, tmp_path: Path) -> None:
    shown = prefray("report", str(root / "hit"), "--output", str(tmp_path / "page.html"))
    assert shown.stdout == f"{tmp_path}/page.html\n"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>finished</b>" in page and "<b>44 of 44</b>" in page
    assert "continued on " in page and " died: " in page


def test_a_sweep_shares_data_and_scores(prefray: Run, recipe: Path, root: Path, ray_session: Any) -> None:
    """Two trials; what they share is what the run has left, so no row is scored again (law 9)."""
    values = {
        **yaml.safe_load(recipe.read_text()),
        "output_dir": str(root / "sweep"),
        "num_epochs": 2,
        "save_strategy": "epoch",
    }
    values |= {"save_steps": None, "eval_steps": 4, "dpo_generate_during_eval": False, "ray": {"num_workers": 1}}
    values["tune"] = {"space": {"learning_rate": {"grid": [1e-4, 1e-2]}}, "search": "grid", "baseline": False}
    values["tune"] |= {"metric": "eval_rewards/margins"}
    (root / "sweep.yaml").write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    stores = sorted((root / "prepared").glob("**/manifest.json"))
    shown = prefray("tune", str(root / "sweep.yaml"), "--quiet")
    assert sorted((root / "prepared").glob("**/manifest.json")) == stores
    shared = json.loads((root / "sweep" / "sweep.json").read_text())["shared"]
    assert shared["stores"] == 1 and "learning_rate" in shown.stdout
    best: RunConfig = load_config(root / "sweep" / "best.yaml")
    assert best.learning_rate == 1e-2
    assert (root / "sweep" / "report.html").is_file() and (root / "sweep" / "trials.csv").is_file()
    margins = [history(root / "sweep" / "trials" / trial, "eval_rewards/margins")[16] for trial in ("000", "001")]
    assert margins[0] < margins[1]
    wait_for(lambda: ray_session.available_resources().get("CPU") == 2)
