"""Finalists: the best trials, repeated with other seeds, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline import load_config, tune
from pipeline.config import RunConfig, parse_config
from pipeline.config.tuning import Bounds
from pipeline.errors import ConfigError
from pipeline.report.sweep import sweep_page
from pipeline.tuning.finalists import Finals, choose_finalists, judge, plan_repeats
from pipeline.tuning.folder import SweepFolder
from pipeline.tuning.objective import Objective, SweepObjective
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.result import SweepResult, best_recipe
from pipeline.tuning.shared_stages import SharedStages
from pipeline.tuning.space import trial_recipe

MEASURE = SweepObjective((Objective("eval_a", "max"),), {}, ("eval_a",))
SHARED = SharedStages(evaluations=4, stores=1, rows=40, prepare_seconds=1.0, score_seconds=2.0, forwards=8, scored=True)


def sweep_recipe(tmp_path: Path = Path("sweep"), **keys: Any) -> RunConfig:
    space = {"learning_rate": {"grid": [1e-6, 1e-5, 1e-4]}}
    values = {"base_model": "m", "datasets": [{"path": "d.jsonl"}], "val_set_size": 4, "output_dir": str(tmp_path)}
    tune = {"space": space, "search": "grid", "baseline": False, "finalists": {"num": 2, "seeds": 3}}
    return parse_config({**values, "tune": tune, **keys})


def searched(*values: float, status: Any = "finished") -> list[TrialRecord]:
    rates = [1e-6, 1e-5, 1e-4, 1e-3]
    return [
        TrialRecord(number, {"learning_rate": rates[number]}, status, f"{number:03d}", 8, 8, {"eval_a": value})
        for number, value in enumerate(values)
    ]


def repeated(first: int, of: int, values: list[float], **cost: float) -> list[TrialRecord]:
    return [
        TrialRecord(
            first + index,
            {"seed": 43 + index},
            "finished",
            f"{first + index:03d}",
            8,
            8,
            {"eval_a": value},
            repeats=of,
            **{"operations": 10.0, **cost},
        )
        for index, value in enumerate(values)
    ]


def finals_of(records: list[TrialRecord], measure: SweepObjective = MEASURE) -> Finals:
    finals = judge(records, measure)
    assert finals is not None
    return finals


def test_the_best_finished_trials_within_the_constraints_are_finalists() -> None:
    bounded = SweepObjective(MEASURE.objectives, {"eval_a": Bounds(min=None, max=0.85)}, ("eval_a",))
    records = [*searched(0.5, 0.8, 0.9), TrialRecord(3, {}, "stopped", metrics={"eval_a": 0.7})]
    assert [one.number for one in choose_finalists(records, MEASURE, 2)] == [2, 1]
    assert [one.number for one in choose_finalists(records, bounded, 5)] == [1, 0]
    assert choose_finalists(searched(0.5, status="failed"), MEASURE, 3) == []


def test_repetitions_have_other_seeds_and_the_same_evaluation_rows() -> None:
    planned = plan_repeats(sweep_recipe(), choose_finalists(searched(0.5, 0.8, 0.9), MEASURE, 2), 3)
    assert [(one["number"], one["repeats"]) for one in planned] == [(3, 2), (4, 1), (5, 2), (6, 1), (7, 2), (8, 1)]
    assert [one["values"]["seed"] for one in planned] == [43, 43, 44, 44, 45, 45]
    trial = trial_recipe(sweep_recipe(), planned[0]["values"], "out")
    assert (trial.seed, trial.split_seed, trial.learning_rate) == (43, 42, 1e-4)
    apart = sweep_recipe(val_set_size=0, test_datasets=[{"path": "t.jsonl"}])
    values = plan_repeats(apart, searched(0.5), 1)[0]["values"]
    assert trial_recipe(apart, values, "out").split_seed is None


def test_a_finalist_beyond_the_spread_of_seeds_is_the_best() -> None:
    records = [*searched(0.8, 0.9), *repeated(2, 1, [0.5, 0.52, 0.51]), *repeated(5, 0, [0.6, 0.7, 0.65])]
    finals = finals_of(records)
    assert (finals.chosen.record.number, finals.equal) == (0, ())
    assert [finals.verdict(one) for one in finals.finalists] == ["best", "worse"]
    assert finals.sentence() == "Trial 0 is the best: its eval_a is beyond the spread of seeds."
    down = SweepObjective((Objective("eval_a", "min"),), {}, ("eval_a",))
    assert finals_of(records, down).chosen.record.number == 1


def test_of_equal_finalists_the_cheapest_is_taken() -> None:
    records = [
        *searched(0.7, 0.8, 0.9),
        # Wall time on a shared host is no cost: it counts what other trials do there.
        *repeated(3, 0, [0.60, 0.62, 0.66], operations=5.0, worker_seconds=10.0, seconds=99.0),
        *repeated(6, 1, [0.61, 0.63, 0.67], operations=10.0, worker_seconds=5.0, seconds=1.0),
        *repeated(9, 2, [0.1, 0.2, 0.3], operations=1.0, worker_seconds=1.0),
    ]
    finals = finals_of(records)
    assert [(one.record.number, finals.verdict(one)) for one in finals.finalists] == [(1, "equal"), (0, "equal"), (2, "worse")]
    assert finals.chosen.record.number == 0
    equal = "Trials 0 and 1 are equal within the spread of seeds"
    assert finals.sentence() == f"{equal}; trial 0 is taken, the cheapest by the operations of its steps."
    for run in records[3:6]:
        run.operations = 9.5
    assert finals_of(records).chosen.record.number == 1  # they cost the same, and its mean is better
    for run in records[6:9]:
        run.worker_seconds = 12.0
    records[9].operations = 0.0
    finals = finals_of(records)
    assert finals.chosen.record.number == 0
    words = "the cheapest by the time of its own steps, since operations are unknown"
    assert finals.sentence() == f"{equal}; trial 0 is taken, {words}."
    records[3].worker_seconds = 0.0
    finals = finals_of(records)
    assert (finals.chosen.record.number, finals.cost) == (1, None)
    assert finals.sentence() == f"{equal}; trial 1 is taken, whose mean is the best, since their cost is unknown."


def test_ties_and_failed_repetitions_decide_nothing() -> None:
    tied = [*searched(0.7, 0.8), *repeated(2, 0, [0.6, 0.6, 0.6]), *repeated(5, 1, [0.6, 0.6, 0.5])]
    assert len(finals_of(tied).equal) == 1
    # Two runs against three: better ones come first by chance in 1 of 10 cases.
    fewer = [*searched(0.7, 0.8), *repeated(2, 0, [0.9, 0.8]), *repeated(5, 1, [0.3, 0.2, 0.1])]
    assert len(finals_of(fewer).equal) == 1
    fewer[2].status = "failed"
    assert [one.seeds for one in finals_of(fewer).finalists] == [[44], [43, 44, 45]]
    assert judge(searched(0.7, 0.8), MEASURE) is None


def test_with_more_seeds_runs_may_overlap() -> None:
    """5 runs each: 25 comparisons, of which 21 are won by chance in 12 of 252 orderings, 20 in 19 of them."""
    first = [0.10, 0.20, 0.30, 0.40, 0.50]
    won_21 = [0.25, 0.35, 0.55, 0.60, 0.70]
    won_20 = [0.15, 0.35, 0.55, 0.60, 0.70]
    for ours, is_best in ((won_21, True), (won_20, False)):
        assert sum(a > b for a in ours for b in first) == (20 if is_best else 19)
    more = [0.26, 0.45, 0.55, 0.60, 0.70]
    assert sum(a > b for a in more for b in first) == 21
    for ours, is_best in ((more, True), (won_21, False)):
        finals = finals_of([*searched(0.7, 0.8), *repeated(2, 0, ours), *repeated(7, 1, first)])
        assert (not finals.equal) == is_best


def test_a_finalist_outside_the_constraints_on_average_does_not_count() -> None:
    bounded = SweepObjective(MEASURE.objectives, {"eval_a": Bounds(min=None, max=0.85)}, ("eval_a",))
    records = [*searched(0.7, 0.8), *repeated(2, 0, [0.9, 0.95, 0.8]), *repeated(5, 1, [0.3, 0.2, 0.1])]
    assert [one.record.number for one in finals_of(records, bounded).finalists] == [1]


def test_table_recipe_and_page_say_it(tmp_path: Path) -> None:
    records = [*searched(0.9, 0.8), *repeated(2, 0, [0.60, 0.62, 0.66], operations=20.0), *repeated(5, 1, [0.61, 0.63, 0.64])]
    result = SweepResult(tmp_path, sweep_recipe(tmp_path), MEASURE, records)
    console = Console(width=200, record=True)
    console.print(result)
    shown = " ".join(console.export_text().split())  # a caption is wrapped to its table
    sentence = (
        "Trials 0 and 1 are equal within the spread of seeds; trial 1 is taken, the cheapest by the operations of its steps."
    )
    assert sentence in shown and "*1" in shown and "0.6267 ± 0.015" in shown and "trial 0, seed 43" in shown
    assert "the cheapest of those that are equal within the spread of seeds" in shown and "* best" not in shown
    assert result.best_metrics == {"eval_a": pytest.approx(0.6266667)}
    text = best_recipe(result)
    assert f"# {sentence}\n" in text and "#   trial 1: 0.626667, 0.0153 (seeds 43, 44, 45)" in text
    assert "learning_rate: 1.0e-05" in text and "\nseed:" not in text
    page = sweep_page(result, SweepFolder(tmp_path), SHARED)
    assert sentence in page and "cheapest of equal" in page and ">Finalists<" in page
    assert "operations of a run" in shown and "operations of a run" in page and "time of a run" not in shown + page
    assert result.table["repeats"].tolist()[2:] == [0, 0, 0, 1, 1, 1] and result.table["repeats"].isna().sum() == 2


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"finalists": {"seeds": 2}}, "tune.finalists.seeds: must be at least 3, got 2"),
        ({"finalists": {"number": 2}}, "tune.finalists.number: unknown key"),
        (
            {"finalists": {}, "metric": ["eval_loss", "eval_kl"], "mode": ["min", "max"]},
            "by one metric, and there are 2",
        ),
        ({"finalists": {}, "search": "random", "scheduler": "pbt"}, "pbt changes values during a run, which no recipe repeats"),
        ({"finalists": {}, "space": {"seed": {"grid": [1, 2]}}}, "tune.space.seed: finalists repeat trials with other seeds"),
    ],
)
def test_what_is_refused(section: dict[str, Any], message: str) -> None:
    tune = {"space": {"weight_decay": {"choice": [0.0, 0.1]}}, **section}
    with pytest.raises(ConfigError) as refused:
        sweep_recipe(tune=tune)
    assert message in str(refused.value)


def test_a_split_seed_needs_a_split() -> None:
    with pytest.raises(ConfigError, match="split_seed: has no effect without val_set_size; remove it"):
        sweep_recipe(val_set_size=0, test_datasets=[{"path": "t.jsonl"}], split_seed=1)


@pytest.mark.usefixtures("ray_session")
def test_a_sweep_repeats_its_best_trials(recipe: Any, tmp_path: Path) -> None:
    section = {
        "space": {"learning_rate": {"grid": [1e-3, 1e-7]}},
        "search": "grid",
        "baseline": False,
        "metric": "eval_rewards/margins",
        "finalists": {"num": 2, "seeds": 3},
    }
    prepared = tmp_path / "prepared"
    cfg = recipe(tmp_path / "sweep", section, num_epochs=1, dataset_prepared_path=str(prepared))
    result = tune(cfg)
    assert [(record.status, record.reason) for record in result.records] == [("finished", None)] * 8
    assert [record.repeats for record in result.records] == [None, None, 0, 1, 0, 1, 0, 1]
    # Other seeds have left the evaluation rows as they were: one store, scored once.
    assert len(list(prepared.glob("*/manifest.json"))) == len(list(prepared.glob("reference/*/manifest.json"))) == 1
    assert result.finals is not None and result.best is not None and result.best.number == 0
    assert [result.finals.verdict(one) for one in result.finals.finalists] == ["best", "worse"]
    assert result.finals.cost is not None and result.finals.cost.field == "operations"
    runs = [run for one in result.finals.finalists for run in one.runs]
    assert len({run.operations for run in runs}) == 1 and min(run.worker_seconds for run in runs) > 0
    margins = result.finals.finalists[0].values("eval_rewards/margins")
    assert len(set(margins)) == 3
    assert "beyond the spread of seeds" in (tmp_path / "sweep" / "best.yaml").read_text()
    assert load_config(tmp_path / "sweep" / "best.yaml") == result.best_config
    again = tune(cfg, resume=True)
    assert again.finals == result.finals
