"""The main job on real parts and in one folder, command by command; each takes what the ones before have left.

Prepare, score, train on two workers that are killed, resume, evaluate, generate, merge, report, sweep.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
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
from pipeline.runs.folder import RunFolder
from pipeline.runs.metrics import MetricsFile
from strategies.checkpoints.manifest import verify
from tests.runs import adapter_recipe
from tests.waiting import wait_for

pytestmark = [pytest.mark.main_job, pytest.mark.usefixtures("ray_session")]

STEPS = list(range(1, 41))
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def prefray() -> Run:
    """`prefray(*words)`: the command, in this process; it must end with `status`."""

    def run(*words: str, status: int = 0) -> Result:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logging, "raiseExceptions", False)  # Ray's handlers keep the stream of the first command
            result = CliRunner().invoke(app, list(words))
        assert result.exit_code == status, result.output + result.stderr
        assert "Traceback" not in result.stderr
        return result

    return run


@pytest.fixture(scope="module")
def quiet(finished_adapter: TrainResult) -> Path:
    """The folder of the same run, prepared and scored elsewhere, that nothing happened to."""
    return Path(str(finished_adapter.run_dir))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything goes: a folder of odd letters, for whatever takes a path for something else."""
    folder = tmp_path_factory.mktemp("main-job") / "a #1 50% \u00e9 [x] %20?"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def recipe(root: Path, tiny_base: str) -> Path:
    cfg = adapter_recipe(tiny_base, root, ray={"num_workers": 2, "max_failures": 1, "hang_timeout": 300})
    (root / "recipe.yaml").write_text(dump_config(cfg))
    return root / "recipe.yaml"


@pytest.fixture(scope="module")
def prepared(prefray: Run, recipe: Path) -> Result:
    """What `prefray prepare` has said."""
    return prefray("prepare", str(recipe), "--quiet")


@pytest.fixture(scope="module")
def scored(prefray: Run, recipe: Path, prepared: Result) -> Result:
    """What `prefray score` has said."""
    return prefray("score", str(recipe), "--quiet")


@dataclass
class Killed:
    """The run in `folder`, whose workers were killed twice, and what its two commands have said."""

    folder: Path
    first: Result
    resumed: Result


@pytest.fixture(scope="module")
def killed(prefray: Run, recipe: Path, scored: Result, root: Path) -> Killed:
    """A worker is killed after the checkpoint of step 8, and restarted; and once more, when no restart is left."""
    folder, has_ended = RunFolder(root / "run"), threading.Event()

    def kill() -> None:
        wait_for(lambda: has_ended.is_set() or 8 in folder.checkpoints())
        training_workers()[1].send_signal(signal.SIGKILL)
        wait_for(lambda: has_ended.is_set() or events(folder.path).count("training") == 2)
        restarted_from = folder.checkpoints()[-1]
        wait_for(lambda: has_ended.is_set() or folder.checkpoints()[-1] > restarted_from)
        training_workers()[1].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        first = prefray("train", str(recipe), status=1)
    finally:
        has_ended.set()
        killer.join()
    return Killed(root / "run", first, prefray("train", str(recipe), "--resume", "--quiet"))


@pytest.fixture(scope="module")
def longer(prefray: Run, recipe: Path, killed: Killed, root: Path) -> Path:
    """A copy of the run, continued for an epoch; its base is in the recipe, its data are where they were."""
    shutil.copytree(killed.folder, root / "longer")
    said = prefray("train", str(recipe), "--resume", "--set", "num_epochs=11", "--set", f"output_dir={root}/longer").stderr
    assert "continuing from the checkpoint of step 40" in said, said
    return root / "longer"


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


def store_of(folder: Path) -> Path:
    (manifest,) = folder.glob("*/manifest.json")
    return manifest.parent


def test_prepare_shows_the_data(prepared: Result, root: Path, quiet: Path) -> None:
    assert {"38", "32", "4", "6"} <= set(prepared.stdout.split())  # read, train, eval, rejected
    assert "What is" in prepared.stdout and "p99" in prepared.stdout
    mine, theirs = store_of(root / "prepared"), store_of(quiet.parent / "prepared")
    for split in ("train", "eval", "rejected"):
        one, other = (pq.read_table(store / split).drop_columns("source").to_pylist() for store in (mine, theirs))
        assert one == other and len(one) == {"train": 32, "eval": 4, "rejected": 6}[split]


def test_score_says_what_it_has_computed(prefray: Run, recipe: Path, scored: Result, root: Path, quiet: Path) -> None:
    assert {"rows", "32", "4"} <= set(scored.stdout.split())
    assert re.search(r"forwards  \d+ over 36 rows in ", scored.stdout) and "scoring the reference" in scored.stderr
    mine, theirs = (store_of(folder / "prepared" / "reference") for folder in (root, quiet.parent))
    for split in ("train", "eval"):
        columns = ["ref_chosen_logps", "ref_rejected_logps"]
        one, other = (pq.read_table(store / split, columns=columns).to_pylist() for store in (mine, theirs))
        assert one == other and all(row["ref_chosen_logps"] for row in one)
    assert "forwards  none, the scores were there already" in prefray("score", str(recipe), "--quiet").stdout


def test_a_run_learns_and_leaves_its_files(quiet: Path, finished_adapter: TrainResult, tiny_base: str) -> None:
    names = {path.name for path in quiet.iterdir() if not path.name.startswith(".")}
    assert {"config.yaml", "metrics.jsonl", "ledger.jsonl", "run.json", "model", "report.html", "generations"} <= names
    assert {"checkpoint-000016", "checkpoint-000040"} <= names and verify(quiet / "checkpoint-000040") is None
    losses = history(quiet, "loss")
    assert list(losses) == STEPS and losses[1] == pytest.approx(math.log(2), abs=1e-5) and losses[40] < 0.6
    assert list(history(quiet, "eval_loss")) == [20, 40]
    assert finished_adapter.steps == 40 and finished_adapter.history["epoch"].iloc[-1] == 10
    assert yaml.safe_load((quiet / "config.yaml").read_text())["ray"]["num_workers"] == 2
    assert "| Global batch | 8 pairs |" in (quiet / "model" / "README.md").read_text()
    table = (quiet / "generations" / "step-000040.jsonl").read_text().splitlines()
    assert len(table) == 4 and set(json.loads(table[0])) == {"prompt", "policy", "reference"}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), quiet / "model")
    assert AutoTokenizer.from_pretrained(quiet / "model").chat_template
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_every_pair_is_trained_once_an_epoch(quiet: Path) -> None:
    records = ledger(quiet)
    assert [record["step"] for record in records] == STEPS
    epochs = [sorted(row for record in records[start : start + 4] for row in record["row_ids"]) for start in range(0, 40, 4)]
    assert all(len(set(epoch)) == len(epoch) == 32 and epoch == epochs[0] for epoch in epochs)
    assert records[0]["row_ids"] != records[4]["row_ids"]


def test_a_worker_that_is_killed_is_restarted(killed: Killed) -> None:
    said = killed.first.stderr
    assert "they were there already" in said and "starting 2 workers" in said
    assert len(re.findall(r"worker \d on \S+ died at \d\d:\d\d:\d\d after step \d+: ", said)) >= 1, said
    assert re.search(r"restarting from the checkpoint of step \d+ \(restart 1 of 1\)", said), said
    found = re.search(r"continuing from the checkpoint of step (\d+)(?:: (\d+) steps? (?:is|are) repeated)?", said)
    assert found is not None and int(found[2] or 0) <= 8, said
    assert re.search(r"the checkpoint of step \d+ is complete, continue with --resume", said), said
    page = (killed.folder / "report.html").read_text(encoding="utf-8")
    assert re.search(r"worker \d on \S+ died: .*restart 1 \(ray.max_failures\)", page, flags=re.DOTALL)
    assert "<span>restarts after failures" in page and "Vertical lines mark steps" in page


def test_a_run_that_was_killed_and_resumed_is_the_run_that_was_not(killed: Killed, quiet: Path) -> None:
    """Bit for bit."""
    assert "step 40/40  loss" in killed.resumed.stderr and "rewards/margins" in killed.resumed.stdout
    assert f"model   {killed.folder}/model" in killed.resumed.stdout
    told = events(killed.folder)
    assert told[:4] == ["began", "training", "failure", "training"] and told[-3:] == ["began", "training", "ended"]
    rows = [[record["row_ids"] for record in ledger(folder)] for folder in (killed.folder, quiet)]
    assert rows[0] == rows[1]
    assert history(killed.folder, "loss") == history(quiet, "loss")
    mine, theirs = weights(killed.folder), weights(quiet)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_finished_run_is_continued_with_more_epochs_only(prefray: Run, recipe: Path, killed: Killed, longer: Path) -> None:
    refused = prefray("train", str(recipe), status=2)
    assert "holds a finished run of 40 steps; continue it with --resume" in refused.stderr
    assert "already finished with step 40" in prefray("train", str(recipe), "--resume").stderr
    assert list(history(longer, "loss")) == [record["step"] for record in ledger(longer)] == list(range(1, 45))
    before = weights(killed.folder)
    assert any(not torch.equal(before[name], value) for name, value in weights(longer).items())


def test_evaluate_reproduces_the_last_evaluation(
    prefray: Run, killed: Killed, finished_adapter: TrainResult, tmp_path: Path
) -> None:
    command = ["evaluate", str(killed.folder), "--answers", "3", "--max-new-tokens", "4", "--temperature", "0"]
    shown = prefray(*command, "--json", str(tmp_path / "found.json"))
    for words in ("rewards/accuracies", "95% interval", "answers/length"):
        assert words in shown.stdout, words
    found = json.loads((tmp_path / "found.json").read_text())["metrics"]
    for name in ("rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen", "logps/rejected"):
        assert found[name]["value"] == pytest.approx(finished_adapter.metrics[f"eval_{name}"], rel=1e-4, abs=1e-6), name
    assert found["answers/length"]["n"] == 3 and found["rewards/margins"]["n"] == 4


def test_generate_answers_with_both_models(prefray: Run, killed: Killed, tiny_base: str) -> None:
    options = ["--max-new-tokens", "6", "--temperature", "0", "--json", "-"]
    (row,) = json.loads(prefray("generate", str(killed.folder), "Why?", *options).stdout)["answers"]
    tokenizer, base = AutoTokenizer.from_pretrained(tiny_base), AutoModelForCausalLM.from_pretrained(tiny_base)
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(killed.folder / "model"))
    turn = [{"role": "user", "content": "Why?"}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    for name, model in (("policy", policy), ("reference", base)):
        answer = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert row[name] == tokenizer.decode(answer, skip_special_tokens=True), name


def test_merge_gives_a_model_that_needs_no_peft(prefray: Run, longer: Path, tiny_base: str) -> None:
    shown = prefray("merge", str(longer), "--quiet")
    assert f"model    {longer}/merged" in shown.stdout
    assert "verifying on evaluation rows of the run" in shown.stderr
    merged = AutoModelForCausalLM.from_pretrained(longer / "merged")
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), longer / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(merged(ids).logits, policy(ids).logits, rtol=1e-4, atol=1e-5)


def test_report_writes_the_page_again(prefray: Run, longer: Path, tmp_path: Path) -> None:
    shown = prefray("report", str(longer), "--output", str(tmp_path / "page.html"))
    assert shown.stdout == f"{tmp_path}/page.html\n"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>finished</b>" in page and "<b>44 of 44</b>" in page
    assert "continued on " in page and " died: " in page


def test_a_sweep_shares_data_and_scores(prefray: Run, recipe: Path, scored: Result, root: Path, ray_session: Any) -> None:
    """Two trials; what they share is what the run has used, so no row is scored again (law 9)."""
    values = {**yaml.safe_load(recipe.read_text()), "output_dir": str(root / "sweep"), "num_epochs": 2}
    values |= {"save_strategy": "epoch", "save_steps": None, "eval_steps": 4, "dpo_generate_during_eval": False}
    values["ray"] = {"num_workers": 1}
    values["tune"] = {"space": {"learning_rate": {"grid": [1e-4, 1e-2]}}, "search": "grid", "baseline": False}
    values["tune"] |= {"metric": "eval_rewards/margins"}
    (root / "sweep.yaml").write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    stores = sorted((root / "prepared").glob("**/manifest.json"))
    shown = prefray("tune", str(root / "sweep.yaml"), "--quiet")
    assert sorted((root / "prepared").glob("**/manifest.json")) == stores
    assert json.loads((root / "sweep" / "sweep.json").read_text())["shared"]["stores"] == 1
    assert "learning_rate" in shown.stdout
    best: RunConfig = load_config(root / "sweep" / "best.yaml")
    assert best.learning_rate == 1e-2
    assert (root / "sweep" / "report.html").is_file() and (root / "sweep" / "trials.csv").is_file()
    margins = [history(root / "sweep" / "trials" / trial, "eval_rewards/margins")[16] for trial in ("000", "001")]
    assert margins[0] < margins[1]
    again = prefray("tune", str(root / "sweep.yaml"), status=2)
    assert "holds a sweep (finished); continue it with `prefray tune --resume" in again.stderr
    wait_for(lambda: ray_session.available_resources().get("CPU") == 2)
