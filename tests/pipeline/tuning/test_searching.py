"""From the section to Tune's searches and schedulers, without running a trial."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler, MedianStoppingRule, PopulationBasedTraining

from pipeline.config import parse_config
from pipeline.config.tuning import Bounds, TuneConfig
from pipeline.tuning.importance import importances
from pipeline.tuning.objective import Objective, SweepObjective
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.search import SAMPLE, drawn_points, plan_search, trial_number

SPACE: dict[str, Any] = {
    "learning_rate": {"loguniform": [1e-6, 1e-4]},
    "rl": {"choice": ["dpo", "simpo"]},
    "rl_beta": [{"uniform": [0.1, 0.5], "when": {"rl": "dpo"}}, {"uniform": [1, 3], "when": {"rl": "simpo"}}],
    "lora_target_modules": {"choice": [["q_proj"], None]},
    "lora_r": {"randint": [4, 8]},
    "weight_decay": {"quniform": [0.0, 0.3, 0.1]},
}
MEASURE = SweepObjective((Objective("eval_a", "max"),), {}, ("eval_a",))


def section(**keys: Any) -> TuneConfig:
    given = {"base_model": "m", "datasets": [{"path": "d.jsonl"}], "tune": {"space": SPACE, **keys}}
    tune = parse_config(given).tune
    assert tune is not None
    return tune


def test_random_draws_follow_from_the_seed_and_differ() -> None:
    points = drawn_points(section(num_samples=6), seed=1)
    assert points is not None and len(points) == 6
    assert points == drawn_points(section(num_samples=6), seed=1) != drawn_points(section(num_samples=6), seed=2)
    assert all((1 <= one["rl_beta"] <= 3) == (one["rl"] == "simpo") for one in points)


def test_a_small_space_is_not_drawn_twice() -> None:
    points = drawn_points(section(num_samples=4, space={"seed": {"choice": [1, 2, 3, 4]}}), seed=0)
    assert points is not None and sorted(one["seed"] for one in points) == [1, 2, 3, 4]


def test_random_draws_stand_beside_every_value_of_a_grid() -> None:
    space = {"rl_beta": {"grid": [0.1, 0.2]}, "learning_rate": {"uniform": [0.1, 0.2]}}
    points = drawn_points(section(num_samples=3, space=space), seed=0)
    assert points is not None and [one["rl_beta"] for one in points] == [0.1, 0.2] * 3


def test_the_baseline_is_trial_0() -> None:
    points = drawn_points(section(num_samples=2), seed=0)
    plan = plan_search(section(num_samples=2), MEASURE, points, 4, seed=0)
    draws = plan.space[SAMPLE]["grid_search"]
    assert [(draw["number"], draw["values"]) for draw in draws] == list(enumerate([None, *(points or [])]))
    assert plan_search(section(num_samples=2, baseline=False), MEASURE, points, 4, seed=0).trials == 2


def test_a_trial_that_takes_over_values_keeps_its_number() -> None:
    assert trial_number("ab12c_00003", {SAMPLE: {"number": 1}}) == 3
    assert trial_number("3f7a2b1c", {SAMPLE: {"number": 1}}) == 1


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        ("asha", ASHAScheduler),
        ("median", MedianStoppingRule),
        ("hyperband", HyperBandScheduler),
        ("pbt", PopulationBasedTraining),
    ],
)
def test_schedulers(scheduler: str, kind: type) -> None:
    space = {"learning_rate": {"loguniform": [1e-6, 1e-4]}}
    plan = plan_search(section(scheduler=scheduler, space=space), MEASURE, [{}], 4, seed=0)
    assert isinstance(plan.scheduler, kind)


def test_optuna_learns_and_never_sees_the_baseline() -> None:
    tune = section(search="optuna", num_samples=12)
    plan = plan_search(tune, MEASURE, None, 4, seed=0)
    search = plan.search
    seen = []
    for number in range(plan.trials):
        draw = search.suggest(f"t{number}")[SAMPLE]
        assert draw["number"] == number
        seen.append(draw["values"])
        score = 0.0 if draw["values"] is None else -abs(draw["values"]["learning_rate"] - 1e-5)
        search.on_trial_complete(f"t{number}", {"eval_a": score, "training_iteration": 1})
    assert plan.trials == 13 and seen[0] is None
    for values in seen[1:]:
        assert 1e-6 <= values["learning_rate"] <= 1e-4 and values["lora_r"] in range(4, 8)
        assert values["lora_target_modules"] in (["q_proj"], None) and values["weight_decay"] in (0.0, 0.1, 0.2, 0.3)
        assert (1 <= values["rl_beta"] <= 3) == (values["rl"] == "simpo")
    assert search._ot_study.trials[0].params == {}
    assert set(search._ot_study.trials[1].params) >= {"learning_rate", "rl", "lora_r"}


def test_optuna_keeps_what_it_knows_when_the_driver_is_stored(tmp_path: Any) -> None:
    tune = section(search="optuna", num_samples=4, constraints={"eval_kl": {"min": -1}})
    measure = SweepObjective((Objective("eval_a", "max"),), {"eval_kl": Bounds(min=-1, max=None)}, ("eval_a", "eval_kl"))
    search = plan_search(tune, measure, None, 4, seed=0).search
    for number in range(3):
        search.suggest(f"t{number}")
        search.on_trial_complete(f"t{number}", {"eval_a": 1.0, "eval_kl": -3.0, "training_iteration": 1})
    search.save(str(tmp_path / "state"))
    other = plan_search(tune, measure, None, 4, seed=0).search
    other.restore(str(tmp_path / "state"))
    assert [trial.user_attrs["violation"] for trial in other._ot_study.trials] == [[2.0]] * 3
    assert other.suggest("t3")[SAMPLE]["number"] == 3
    pickle.dumps(other)


def test_the_key_that_matters_is_found() -> None:
    tune = section(num_samples=40)
    points = drawn_points(tune, seed=0) or []
    records = [
        TrialRecord(number, values, "finished", metrics={"eval_a": -abs(values["lora_r"] - 6)})
        for number, values in enumerate(points)
    ]
    found = importances(tune, records, MEASURE.first)
    assert max(found, key=lambda name: found[name]) == "lora_r"
    assert sum(found.values()) == pytest.approx(1)
    assert importances(tune, records[:3], MEASURE.first) == {}
    assert importances(tune, [TrialRecord(n, p, metrics={"eval_a": 1.0}) for n, p in enumerate(points)], MEASURE.first) == {}
