"""Sweeps on Ray Tune, with real runs: what they share, what they free, what they leave."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ray.util import placement_group_table

from benchmarks.common import SHAPE
from pipeline import load_config, train, tune, write_report
from pipeline.config import RunConfig, parse_config
from pipeline.errors import RunFailed, UserError
from pipeline.runs.metrics import MetricsFile
from pipeline.tuning.folder import SweepFolder, load_sweep
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.result import SweepResult
from pipeline.tuning.sweep import _concurrency
from pipeline.ui.display import SilentDisplay
from tests.actors import actors
from tests.browser import needs_chromium, open_page, undrawn
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("ray_session")


class Shown(SilentDisplay):
    """A display that keeps what it is shown."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tables: list[Any] = []
        self.actors: Counter[str] = Counter()
        """When the first evaluation came."""
        self.running: set[str] = set()
        self.most_at_once = 0

    def log(self, text: str) -> None:
        trial = text.split()[1]
        if " begins: " in text:
            self.running.add(trial)
        elif " has finished " in text or " ended early " in text:
            self.running.discard(trial)
        self.most_at_once = max(self.most_at_once, len(self.running))
        if "  step " in text and not self.actors:
            self.actors = actors()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def show(self, table: Any) -> None:
        self.tables.append(table)


def history(result: SweepResult, record: TrialRecord) -> list[dict[str, Any]]:
    assert record.folder is not None and isinstance(result.run_dir, Path)
    return MetricsFile(result.run_dir / "trials" / record.folder / "metrics.jsonl").read()


def evaluations(result: SweepResult, record: TrialRecord) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in history(result, record) if "eval_loss" in row}


def nothing_is_left(ray: Any) -> bool:
    groups = {group["state"] for group in placement_group_table().values()}
    return groups <= {"REMOVED"} and not actors() and ray.available_resources()["CPU"] == 2


def assert_nothing_is_left(ray: Any) -> None:
    try:
        wait_for(lambda: nothing_is_left(ray))
    except AssertionError as error:
        raise AssertionError((placement_group_table(), actors(), ray.available_resources())) from error


@pytest.fixture(scope="module")
def real_rows(shared_data: Path, tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A sweep over learning rate, beta and loss on real pairs."""
    folder = tmp_path_factory.mktemp("real")
    rows = json.loads((shared_data / "dpo_en_demo.json").read_text())[:56]
    (folder / "rows.json").write_text(json.dumps(rows))
    return parse_config(
        {
            "base_model": tiny_base,
            "datasets": [
                {
                    "path": str(folder / "rows.json"),
                    **SHAPE,
                }
            ],
            "val_set_size": 8,
            "dataset_prepared_path": str(folder / "prepared"),
            "excess_length_strategy": "truncate",
            "sequence_len": 512,
            "max_rejected_fraction": 0.5,
            "micro_batch_size": 4,
            "num_epochs": 2,
            "evals_per_epoch": 3,
            "save_strategy": "epoch",
            "output_dir": str(folder / "sweep"),
            "tune": {
                "space": {
                    "learning_rate": {"loguniform": [1e-5, 1e-2]},
                    "rl_beta": {"choice": [0.05, 0.1, 0.5]},
                    "dpo_loss_type": {"choice": ["sigmoid", "hinge", "ipo"]},
                },
                "scheduler": "asha",
                "reduction_factor": 3,
                "num_samples": 5,
            },
        }
    )


@pytest.fixture(scope="module")
def shown() -> Shown:
    return Shown()


@pytest.fixture(scope="module")
def swept(ray_session: Any, real_rows: RunConfig, shown: Shown) -> SweepResult:
    return tune(real_rows, display=shown)


def test_the_reference_is_run_once_for_all_trials(swept: SweepResult, real_rows: RunConfig) -> None:
    """Law 9."""
    prepared = Path(real_rows.dataset_prepared_path)
    assert len(list(prepared.glob("*/manifest.json"))) == 1
    (scores,) = prepared.glob("reference/*/manifest.json")
    state = json.loads((Path(swept.run_dir) / "sweep.json").read_text())
    assert state["shared"]["stores"] == 1
    assert state["shared"]["forwards"] == json.loads(scores.read_text())["forwards"] > 0
    assert all(record.folder is not None for record in swept.records)


def test_no_more_trials_run_at_once_than_have_room(swept: SweepResult, shown: Shown) -> None:
    assert shown.most_at_once == 2 < len(swept.records)


def test_a_sweep_has_no_actors_but_trials_and_what_ray_train_starts(swept: SweepResult, shown: Shown) -> None:
    """Their events come to the driver without another process."""
    kinds = {kind.replace("ResourceTrainable", "TrialRun") for kind in shown.actors}  # as Tune wraps it
    assert kinds == {"TrialRun", "TrainController", "RayTrainWorker", "SynchronizationActor"}
    assert shown.actors.total() <= 4 * shown.most_at_once


def test_every_trial_is_in_the_table(swept: SweepResult) -> None:
    table = swept.table
    assert table["trial"].tolist() == [0, 1, 2, 3, 4, 5]
    assert table["baseline"].tolist() == [True] + 5 * [False]
    assert set(table["status"]) == {"finished", "stopped"}
    assert {"learning_rate", "rl_beta", "dpo_loss_type", "eval_rewards/accuracies", "eval_kl", "tokens", "seconds"} <= {*table}
    folder = Path(swept.run_dir)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "trials.parquet"), table)
    assert pd.read_csv(folder / "trials.csv")["step"].tolist() == table["step"].tolist()


def test_trials_that_end_early_free_their_workers(swept: SweepResult, shown: Shown, ray_session: Any) -> None:
    assert shown.actors  # so that what isn't left would be seen
    early = [record for record in swept.records if record.status == "stopped"]
    assert early and all(record.step < record.total_steps for record in early)
    assert_nothing_is_left(ray_session)


def test_finished_trials_have_a_model(swept: SweepResult) -> None:
    for record in swept.records:
        has_model = (Path(swept.run_dir) / "trials" / str(record.folder) / "model" / "config.json").exists()
        assert has_model == (record.status == "finished")


def test_the_best_recipe_trains_and_gives_the_same_metrics(swept: SweepResult) -> None:
    best = swept.best
    assert best is not None and best.status == "finished"
    assert swept.best_metrics["eval_rewards/accuracies"] == max(
        record.metrics["eval_rewards/accuracies"] for record in swept.records if record.status == "finished"
    )
    cfg = load_config(Path(swept.run_dir) / "best.yaml")
    assert cfg == swept.best_config
    result = train(cfg)
    again = {row["step"]: row for row in MetricsFile(Path(result.run_dir) / "metrics.jsonl").read() if "eval_loss" in row}
    first_epoch = [row for row in history(swept, best) if "eval_loss" in row and row["epoch"] <= 1]
    assert first_epoch
    for row in first_epoch:
        for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_kl"):
            assert again[row["step"]][name] == row[name]


def test_a_person_sees_how_trials_stand(shown: Shown, swept: SweepResult) -> None:
    from rich.console import Console

    console = Console(width=200, record=True)
    console.print(shown.tables[-1])
    text = console.export_text()
    for word in ("trial", "learning_rate", "status", "step", "eval accuracy", "left", "ended early", "recipe"):
        assert word in text
    assert len(shown.tables) > 10
    assert sum("reference log-probabilities of" in note for note in shown.notes) == 1


@needs_chromium
def test_the_report_in_a_browser(swept: SweepResult, tmp_path: Path) -> None:
    for width, scheme in ((1280, "light"), (400, "dark")):
        with open_page(Path(str(swept.report)), width, scheme) as (page, said):
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert undrawn(page) == []
            assert page.locator(".js-plotly-plot .main-svg").count() >= 10
            titles = page.locator("h2").all_inner_texts()
            assert titles[0] == "Metrics over time" and "Cost, and what sharing has saved" in titles
            lines = page.locator("#time .scatterlayer").first.locator(".js-line").count()
            assert lines == len(swept.records)
            text = page.locator("body").inner_text()
            assert "trials share 1 prepared data set" in text and "Ending trials early left out" in text
            assert said == []
            page.screenshot(path=tmp_path / f"report-{width}.png", full_page=True)
            assert (tmp_path / f"report-{width}.png").stat().st_size > 20_000


def test_a_sweep_is_not_begun_twice(swept: SweepResult, real_rows: RunConfig) -> None:
    with pytest.raises(UserError, match=r"holds a sweep \(finished\); continue it with `prefray tune --resume"):
        tune(real_rows)
    again = tune(real_rows, resume=True)
    assert [record.number for record in again.records] == [0, 1, 2, 3, 4, 5]


def test_a_grid_over_what_changes_the_data_and_a_trial_that_fails(recipe: Any, tmp_path: Path) -> None:
    section = {
        "space": {"sequence_len": {"grid": [96, 128]}, "learning_rate": {"grid": [1e-4, 1e30]}},
        "search": "grid",
        "baseline": False,
    }
    display = Shown()
    result = tune(recipe(tmp_path / "sweep", section, num_epochs=1, dataset_prepared_path=str(tmp_path / "p")), display=display)
    state = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert state["shared"]["stores"] == 2 == len(list((tmp_path / "p").glob("*/manifest.json")))
    by_rate = result.table.groupby("learning_rate")
    assert by_rate.get_group(1e-4)["status"].tolist() == ["finished", "finished"]
    failed = by_rate.get_group(1e30)
    assert failed["status"].tolist() == ["failed", "failed"]
    assert failed["reason"].str.contains("not finite").all()
    assert sum("failed at" in note and "not finite" in note for note in display.notes) == 2


@pytest.mark.main_job
def test_when_every_trial_fails_the_reasons_are_said(recipe: Any, tmp_path: Path) -> None:
    section = {"space": {"learning_rate": {"grid": [1e30]}}, "search": "grid", "baseline": False}
    with pytest.raises(RunFailed, match="every trial has failed: .*not finite"):
        tune(recipe(tmp_path / "sweep", section, num_epochs=1))
    assert (tmp_path / "sweep" / "report.html").exists()


def test_population_based_training_goes_on_from_better_trials(recipe: Any, tmp_path: Path) -> None:
    section = {
        "space": {"learning_rate": {"choice": [1e-6, 1e-3]}, "weight_decay": {"uniform": [0.0, 0.1]}},
        "scheduler": "pbt",
        "num_samples": 2,
        "baseline": False,
        "metric": "eval_rewards/margins",
    }
    # On a busy machine the worse trial may have come to its end before the better one reports, and nobody follows anybody.
    for attempt in range(2):
        cfg = recipe(tmp_path / f"sweep{attempt}", section, num_epochs=8, eval_steps=16, save_total_limit=20)
        result = tune(cfg)
        if exploited_ones := [record for record in result.records if record.origins]:
            break
    (exploited,) = exploited_ones
    (donor,) = [record for record in result.records if not record.origins]
    assert exploited.folder == f"{exploited.number:03d}.{len(exploited.origins)}"
    assert exploited.status == donor.status == "finished"
    number, step = (int(word) for word in exploited.origins[-1].split() if word.isdigit())
    assert number == donor.number
    own, given = evaluations(result, exploited), evaluations(result, donor)
    # The donor's history comes along with its weights, and what follows is another run's.
    assert {at: loss for at, loss in own.items() if at <= step} == {at: loss for at, loss in given.items() if at <= step}
    assert all(own[at] != given[at] for at in own if at > step)
    assert "went on from" in (Path(result.run_dir) / "report.html").read_text()


def test_hyperband_lets_good_trials_go_on(recipe: Any, tmp_path: Path) -> None:
    section = {
        "space": {"learning_rate": {"grid": [1e-3, 2e-3, 1e-7, 5e-4]}},
        "search": "grid",
        "scheduler": "hyperband",
        "reduction_factor": 2,
        "baseline": False,
        "metric": "eval_rewards/margins",
    }
    # All at once: a trial that is alone in its bracket when it evaluates isn't compared with those that are still to come.
    ray = {"num_workers": 1, "resources_per_worker": {"CPU": 0.5}}
    result = tune(recipe(tmp_path / "sweep", section, evals_per_epoch=1, ray=ray))
    # Its first bracket holds two trials, which run to their ends; of the second one's two, one goes on.
    assert [record.status for record in result.records] == ["finished", "finished", "stopped", "finished"]


def test_the_median_ends_what_is_worse_than_most(recipe: Any, tmp_path: Path) -> None:
    section = {
        "space": {"learning_rate": {"grid": [1e-3, 2e-3, 1e-7]}},
        "search": "grid",
        "scheduler": "median",
        "baseline": False,
        "metric": "eval_rewards/margins",
    }
    result = tune(recipe(tmp_path / "sweep", section, evals_per_epoch=2))
    assert [record.status for record in result.records] == ["finished", "finished", "stopped"]


def test_optuna_searches_for_several_metrics_within_constraints(recipe: Any, tmp_path: Path) -> None:
    section = {
        "space": {
            "rl": {"choice": ["dpo", "ipo"]},
            "rl_beta": {"loguniform": [0.05, 0.5]},
            "dpo_loss_type": {"choice": ["sigmoid", "hinge"], "when": {"rl": "dpo"}},
        },
        "search": "optuna",
        "num_samples": 3,
        "metric": ["eval_rewards/margins", "eval_kl"],
        "mode": ["max", "max"],
        "constraints": {"eval_kl": {"min": -50}},
    }
    # Adapters share one base, so that a trial starts at once.
    result = tune(recipe(tmp_path / "sweep", section, num_epochs=1, adapter="lora", lora_r=4, lora_alpha=8))
    assert [record.number for record in result.records] == [0, 1, 2, 3]
    assert all(
        ("dpo_loss_type" in (record.values or {})) == ((record.values or {}).get("rl") == "dpo")
        for record in result.records[1:]
    )
    assert result.front and result.best in result.front
    folder, page = Path(result.run_dir), tmp_path / "again.html"
    assert not list(folder.glob("trials/*/report.html"))
    assert write_report(folder, page) == page
    first, again = (re.findall("<td.*?</td>", file.read_text(encoding="utf-8")) for file in (folder / "report.html", page))
    assert again == first and len(first) >= 16
    assert write_report(folder / "trials" / "000") == folder / "trials" / "000" / "report.html"


def test_a_time_budget_ends_a_trial_between_its_evaluations(recipe: Any, ray_session: Any, tmp_path: Path) -> None:
    section = {"space": {"num_epochs": {"grid": [5000]}}, "search": "grid", "baseline": False, "time_budget": 12}
    began = time.monotonic()
    with contextlib.suppress(RunFailed):  # on a busy machine it has not evaluated yet, so that there is no best trial
        tune(recipe(tmp_path / "sweep", section, eval_steps=10**6, eval_on_start=True, save_strategy="no"))
    assert time.monotonic() - began < 300
    (record,) = SweepFolder(tmp_path / "sweep").records()
    assert record.status == "stopped" and record.step < 40_000
    assert_nothing_is_left(ray_session)


@pytest.mark.main_job
def test_a_trial_that_can_never_fit_is_refused(recipe: Any, tmp_path: Path) -> None:
    section = {"space": {"ray.num_workers": {"choice": [1, 64]}}}
    with pytest.raises(UserError, match="no trial can run: ray.num_workers: 64 workers .* don't fit"):
        tune(recipe(tmp_path / "sweep", section))
    mended = recipe(tmp_path / "sweep", {"space": {"learning_rate": {"choice": [1e-5, 1e-4]}}})
    SweepFolder(tmp_path / "sweep").open(mended, resume=False)  # what was refused has left nothing in the way
    assert load_sweep(str(tmp_path / "sweep")).tune == mended.tune


@pytest.mark.main_job
def test_of_more_trials_than_fit_as_many_run_as_do(ray_session: Any, recipe: Any, tmp_path: Path) -> None:
    notes: list[str] = []

    class Notes(SilentDisplay):
        def note(self, text: str) -> None:
            notes.append(text)

    section = {"space": {"learning_rate": {"choice": [1e-5, 1e-4]}}, "max_concurrent_trials": 3}
    cfg = recipe(tmp_path / "sweep", section)
    assert _concurrency(cfg, [cfg], Notes()) == 2
    assert notes[0].startswith("tune.max_concurrent_trials: 2 of 3 trials fit the cluster at once")
