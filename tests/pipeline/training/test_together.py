"""Several recipes in one command: each run is what it is alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cluster.placement import WorkerPlan
from pipeline import TrainResult, train, train_together
from pipeline.cli import app
from pipeline.config import RunConfig, dump_config, parse_config
from pipeline.errors import UserError
from pipeline.runs.folder import RunFolder
from pipeline.runs.metrics import MetricsFile
from pipeline.training.together import schedule
from pipeline.training.together.display import TogetherDisplay
from pipeline.training.together.rules import find_problems
from pipeline.training.together.schedule import RunsFailed, Schedule
from pipeline.ui.display import SilentDisplay
from tests.recipes import small_recipe
from tests.waiting import WAIT_S, wait_for

ROOT = Path(__file__).parents[3]
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True, "lora_dropout": 0.1}


class Notes(SilentDisplay):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tables: list[Any] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def show(self, table: Any) -> None:
        self.tables.append(table)


@pytest.fixture(scope="module")
def make(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`make(output_dir, **keys)`: the tiny model, 32 pairs, one worker, 8 steps an epoch."""
    return small_recipe(tiny_base, tmp_path_factory.mktemp("data"), sequence_len=128, eval_steps=8, save_steps=4, bf16=False)


@pytest.fixture(scope="module")
def display() -> Notes:
    return Notes()


@pytest.fixture(scope="module")
def together(ray_session: Any, make: Any, display: Notes, tmp_path_factory: pytest.TempPathFactory) -> RunsFailed:
    """Runs of two adapters, of one that fails beside them, and of all weights, on two CPUs."""
    root = tmp_path_factory.mktemp("runs")
    recipes = [
        make(root / "dpo", **LORA),
        make(root / "ipo", rl="ipo", **{**LORA, "lora_r": 4}),
        make(root / "bad", **LORA | {"learning_rate": 1e30}),
        make(root / "full"),
    ]
    with pytest.raises(RunsFailed) as failed:
        train_together(recipes, display=display)
    return failed.value


def test_a_run_that_fails_ends_no_other(together: RunsFailed, display: Notes) -> None:
    assert {name: result.steps for name, result in together.finished.items()} == {"dpo": 8, "ipo": 8, "full": 8}
    first, bad = str(together).splitlines()
    assert first == "1 of 4 runs has failed; the same command with --resume continues it, and leaves others as they are"
    assert bad.startswith("  bad: ") and "not finite" in bad
    assert all(result.report is not None and Path(str(result.report)).exists() for result in together.finished.values())


def test_which_run_shares_a_base_and_why_another_does_not(together: RunsFailed, display: Notes) -> None:
    assert "dpo, ipo and bad share one copy of the base model" in display.notes
    why = [note for note in display.notes if "workers of its own" in note]
    assert why == ["full: it has workers of its own: adapter: not set: it trains the base itself; write adapter: lora"]
    assert display.tables[-1].row_count == 4
    assert [column.header.plain for column in display.tables[-1].columns][:2] == ["run", "step"]
    for name in ("dpo", "ipo", "full"):
        assert [note for note in display.notes if note.startswith(f"{name}: saved")] == [
            f"{name}: saved checkpoint-00000{step}" for step in (4, 8)
        ]


def test_a_run_among_others_is_what_it_is_alone(together: RunsFailed, make: Any, tmp_path: Path) -> None:
    alone = train(make(tmp_path / "alone", **LORA))
    beside = together.finished["dpo"]
    ours, theirs = (load_file(run.model_dir / "adapter_model.safetensors") for run in (beside, alone))
    # Rows of runs at once stand in one forward, which rounds otherwise.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    configs = [(run.model_dir / "adapter_config.json").read_text() for run in (beside, alone)]
    assert configs[0] == configs[1] and _files(alone) == _files(beside)
    compared = ["step", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_rewards/margins"]
    pandas.testing.assert_frame_equal(beside.history[compared], alone.history[compared], rtol=1e-4, atol=1e-5)


def _files(result: TrainResult) -> set[str]:
    # Ray Train leaves a marker.
    return {path.name for path in Path(str(result.run_dir)).iterdir() if not path.name.startswith(".")}


@pytest.mark.driver
def test_sigterm_ends_all_and_resume_continues_them(together: RunsFailed, make: Any, tmp_path: Path, display: Notes) -> None:
    keys = {"num_epochs": 20, "eval_steps": 160}
    recipes = {name: make(tmp_path / name, **of, **keys) for name, of in {"one": LORA, "two": LORA, "full": {}}.items()}
    folders = [RunFolder(tmp_path / name) for name in recipes]
    process = _started(recipes, tmp_path)
    wait_for(lambda: all(folder.checkpoints() for folder in folders) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 143, errors
    assert "prefray: stopped by SIGTERM; continue with the same command and --resume" in errors
    last = [folder.last_checkpoint() for folder in folders]
    for name, step in zip(recipes, last, strict=True):
        assert f"  {name}: the checkpoint of step {step} is complete" in errors.splitlines()
    assert "Traceback" not in errors

    again = Notes()
    finished = make(together.finished["ipo"].run_dir, rl="ipo", **{**LORA, "lora_r": 4})
    results = train_together([*recipes.values(), finished], resume=True, display=again)
    assert [result.steps for result in results] == [160, 160, 160, 8]
    assert any(note.startswith("ipo: the run has already finished with step 8") for note in again.notes)
    for name, folder, step in zip(recipes, folders, last, strict=True):
        assert f"{name}: continuing from the checkpoint of step {step}" in " ".join(again.notes)
        assert [record["step"] for record in MetricsFile(folder.ledger).read()] == list(range(1, 161))


def _started(recipes: dict[str, RunConfig], folder: Path) -> subprocess.Popen[str]:
    """`prefray train` of recipes in a process of its own."""
    files = [folder / f"{name}.yaml" for name in recipes]
    for file, cfg in zip(files, recipes.values(), strict=True):
        file.write_text(dump_config(cfg))
    command = [sys.executable, "-m", "pipeline", "train", *map(str, files), "--quiet"]
    pipe = subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=pipe, stdout=pipe, text=True, start_new_session=True)


class Begun:
    """A job that only remembers whether it was started."""

    def __init__(self, cpus: float) -> None:
        self.workers = [WorkerPlan(1, False, {"CPU": cpus})]
        self.has_begun = self.has_ended = False

    def start(self) -> None:
        self.has_begun = True


def test_runs_begin_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "node_resources", lambda: [{"CPU": 3.0}])
    jobs: list[Any] = [Begun(2), Begun(2), Begun(1), Begun(9)]
    order = []
    for _ in range(4):
        Schedule([], TogetherDisplay(Notes(), []), False)._start(jobs)
        order.append([job.has_begun for job in jobs])
        for job in jobs:
            job.has_ended = job.has_begun
    # The last one fits no cluster like this one, and is left to Ray, which says what it waits for.
    assert order == [[True, False, True, False], [True, True, True, False], [True] * 4, [True] * 4]


@pytest.mark.parametrize(
    ("folder", "keys", "message"),
    [
        ("one", {}, "output_dir: a and b have the same, '/runs/one'; give each run a folder of its own"),
        ("x/../one", {}, "output_dir: a and b have the same"),
        ("one/in", {}, "output_dir: that of b, '/runs/one/in', is inside that of a, '/runs/one'; give each run a folder"),
        ("", {}, "output_dir: that of a, '/runs/one', is inside that of b, '/runs'"),
        ("two", {"hub_model_id": "me/model"}, "hub_model_id: a and b have the same, 'me/model', which belongs to one run"),
        (
            "two",
            {"use_wandb": True, "wandb_run_id": "w1"},
            "wandb_run_id: a and b have the same, 'w1', which belongs to one run",
        ),
        ("two", {"ray": {"address": "h:1"}}, "ray.address: a has None and b 'h:1', and one command trains on one cluster"),
    ],
)
def test_recipes_that_cannot_be_run_together(make: Any, folder: str, keys: dict[str, Any], message: str) -> None:
    one = make(Path("/runs/one"), hub_model_id="me/model", use_wandb=True, wandb_run_id="w1")
    (problem,) = find_problems(["a", "b"], [one, make(Path("/runs") / folder, **keys)])
    assert problem.startswith(message)


def test_folders_in_a_bucket() -> None:
    def of(*folders: str) -> list[RunConfig]:
        recipe = {"base_model": "m", "datasets": [{"path": "d.jsonl"}]}
        return [parse_config({**recipe, "output_dir": folder}) for folder in folders]

    assert len(list(find_problems("ab", of("s3://bucket/runs?region=eu", "s3://bucket/runs/b?region=eu")))) == 1
    assert list(find_problems("abc", of("s3://bucket/run", "s3://bucket/run-2", "/bucket/run"))) == []


def test_recipes_are_checked_before_anything_starts(make: Any, tmp_path: Path) -> None:
    one = make(tmp_path / "one")
    with pytest.raises(UserError, match="^b: base_model: "):
        train_together([one, make(tmp_path / "two", base_model=str(tmp_path / "no"))], ["a", "b"])
    with pytest.raises(UserError, match="^output_dir: a and b have the same"):
        train_together([one, one], ["a", "b"])
    with pytest.raises(UserError, match="names: each of the 2 recipes needs one of its own, got a, a"):
        train_together([one, one], ["a", "a"])
    with pytest.raises(UserError, match="recipes: there are none to train"):
        train_together([])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_refused_before_anything_starts(make: Any, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="^two: output_dir: .*two' is not empty"):
        train_together([make(tmp_path / "one"), make(tmp_path / "two")])
    assert not (tmp_path / "one").exists()


def test_the_command_names_the_files_of_invalid_recipes(make: Any, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(dump_config(make(tmp_path / "run")))
    bad.write_text("base_model: m\nrl_bta: 0.1\n")
    ended = CliRunner().invoke(app, ["train", str(good), str(bad), "none.yaml", "--quiet"])
    assert ended.exit_code == 2
    assert ended.stderr.splitlines() == [
        f"prefray: {bad}: 2 problems",
        "  datasets: is required",
        "  rl_bta: unknown key; did you mean 'rl_beta'?",
        "none.yaml: can't be read: no such file",
    ]
    for arguments, message in (
        ([str(bad), "--set", "output_dir=x"], "--set output_dir: would be that of all 2 recipes, and each run needs its own"),
        ([str(good)], f"{good}: stands twice, and would be two runs in one folder; give each recipe once"),
    ):
        ended = CliRunner().invoke(app, ["train", str(good), *arguments, "--quiet"])
        assert ended.exit_code == 2
        assert f"prefray: {message}" in ended.stderr


def test_a_job_is_submitted_for_one_recipe() -> None:
    ended = CliRunner().invoke(app, ["submit", "train", "a.yaml", "b.yaml"])
    assert ended.exit_code == 2
    assert "prefray: RECIPE: 2 were given, and a job is submitted for one; a job that trains several is" in ended.stderr
    assert "ray job submit --working-dir . -- python -m pipeline train a.yaml b.yaml" in ended.stderr
