"""Spaces: what they may say, which values go together, and what is said before anything starts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig, parse_config
from pipeline.config.paths import absolute_paths
from pipeline.errors import ConfigError
from pipeline.tuning.space import check_trials, corners, grid, perturb, sample, trial_recipe

BASE: dict[str, Any] = {"base_model": "m", "datasets": [{"path": "d.jsonl"}], "val_set_size": 4, "output_dir": "sweep"}
STRATEGIES = {
    "rl": {"choice": ["dpo", "simpo"]},
    "rl_beta": [
        {"loguniform": [0.01, 0.5], "when": {"rl": "dpo"}},
        {"uniform": [1, 3], "when": {"rl": ["simpo"]}},
    ],
    "simpo_gamma": {"uniform": [0, 1], "when": {"rl": "simpo"}},
}


def sweep(space: dict[str, Any], recipe: dict[str, Any] | None = None, **section: Any) -> RunConfig:
    return parse_config({**BASE, **(recipe or {}), "tune": {"space": space, **section}})


def test_sections_may_be_nested_or_dotted() -> None:
    nested = sweep({"ray": {"score": {"num_actors": {"choice": [1, 2]}}}, "datasets.0.split": {"choice": ["a", "b"]}})
    assert nested.tune is not None
    assert list(nested.tune.space) == ["ray.score.num_actors", "datasets.0.split"]
    recipe = trial_recipe(nested, {"ray.score.num_actors": 2, "datasets.0.split": "b"}, "x")
    assert (recipe.ray.score.num_actors, recipe.datasets[0].split, recipe.output_dir, recipe.tune) == (2, "b", "x", None)


@pytest.mark.parametrize(
    ("space", "path", "message"),
    [
        ({}, "tune.space", "at least 1 item"),
        ({"learning_rate": {"uniform": [2, 1]}}, "learning_rate.0", "the range from 2 to 1 is empty"),
        ({"learning_rate": {"uniform": [1, 1]}}, "learning_rate.0", "is empty"),
        ({"learning_rate": {"loguniform": [0, 1]}}, "learning_rate.0", "needs a range above 0"),
        ({"learning_rate": {"quniform": [0, 1, 2]}}, "learning_rate.0", "q must be above 0 and at most the range, got 2"),
        ({"lora_r": {"randint": [8, 8]}}, "lora_r.0", "is empty"),
        ({"learning_rate": {"choice": []}}, "learning_rate.0.choice", "at least 1 item"),
        ({"learning_rate": {"choice": [1, 1]}}, "learning_rate.0", "1 stands twice"),
        ({"learning_rate": {"unifrom": [0, 1]}}, "learning_rate.0.unifrom", "did you mean 'uniform'"),
        ({"learning_rate": 0.1}, "tune.space", "a distribution is a mapping, such as .*, got 0.1"),
        ({"learning_rate": {"uniform": [0, 1], "choice": [1]}}, "learning_rate.0", "give one of .*, got uniform, choice"),
        ({"learning_rate": {"when": {"rl": "dpo"}}}, "learning_rate.0", "got none"),
        ({"output_dir": {"choice": ["a", "b"]}}, "output_dir", "belongs to the sweep as a whole"),
        ({"simpo_gamma": {"choice": [1], "when": {"rl": "simpo"}}}, "simpo_gamma", "rl is not searched"),
        (
            {"simpo_gamma": {"choice": [1], "when": {"rl": "simpoo"}}, "rl": {"choice": ["dpo", "simpo"]}},
            "simpo_gamma",
            r"rl is never 'simpoo'; its values are \['dpo', 'simpo'\]",
        ),
        ({"learning_rate": {"uniform": [0, float("inf")]}}, "learning_rate.0.uniform.1", "must be a finite number"),
        (
            {"rl_beta": {"choice": [1], "when": {"seed": 1}}, "seed": {"choice": [1], "when": {"rl_beta": 1}}},
            "rl_beta",
            "depend on each other",
        ),
        ({"rl_beta": [{"choice": [1]}, {"choice": [2]}]}, "rl_beta", "each needs a `when`"),
    ],
)
def test_what_a_space_may_not_say(space: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        sweep(space)
    assert any(place.endswith(path) for place, _ in error.value.problems)


@pytest.mark.parametrize(
    ("section", "path", "message"),
    [
        ({"search": "grid"}, "tune.space.learning_rate", "search: grid needs a list of values, got uniform"),
        ({"search": "grid", "num_samples": 3}, "tune.num_samples", "runs every combination"),
        ({"scheduler": "pbt", "search": "optuna"}, "tune.search", "optuna doesn't go with scheduler: pbt"),
        ({"scheduler": "asha", "metric": ["eval_loss", "eval_kl"]}, "tune.scheduler", "by one metric, and there are 2"),
        ({"mode": ["max", "min"]}, "tune.mode", "there are 1 metrics and 2 modes"),
        ({"metric": ["eval_kl", "eval_kl"]}, "tune.metric", "stands twice"),
        ({"grace_period": 0.5}, "tune.grace_period", "no effect with scheduler: none"),
        ({"constraints": {"eval_kl": {}}}, "tune.constraints.eval_kl", "give min, max, or both"),
        ({"constraints": {"eval_kl": {"min": 2, "max": 1}}}, "tune.constraints.eval_kl", "above max"),
        ({"metrik": "eval_loss"}, "tune.metrik", "did you mean 'metric'"),
        ({"num_samples": 0}, "tune.num_samples", "greater than 0"),
        ({"search": "bayes"}, "tune.search", "must be 'random', 'grid' or 'optuna', got 'bayes'"),
    ],
)
def test_what_the_section_may_not_say(section: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        sweep({"learning_rate": {"uniform": [1e-6, 1e-5]}}, **section)
    assert path in [place for place, _ in error.value.problems]


def test_a_grid_is_not_for_searches_that_choose() -> None:
    with pytest.raises(ConfigError, match="search: optuna chooses values itself; write choice"):
        sweep({"learning_rate": {"grid": [1e-6, 1e-5]}}, search="optuna")


def test_values_that_change_in_a_running_run_are_those_that_can() -> None:
    assert sweep({"learning_rate": {"uniform": [1e-6, 1e-5]}, "dpo_label_smoothing": {"choice": [0.1, 0.2]}}, scheduler="pbt")
    with pytest.raises(ConfigError, match=r"tune.space.lora_r: scheduler: pbt changes values while a run goes on"):
        sweep({"lora_r": {"choice": [4, 8]}}, scheduler="pbt")


def test_keys_are_set_where_their_condition_holds() -> None:
    cfg = sweep(STRATEGIES)
    assert cfg.tune is not None
    found = corners(cfg.tune)
    assert found[:6] == [
        {"rl": "dpo", "rl_beta": 0.01},
        {"rl": "dpo", "rl_beta": 0.5},
        {"rl": "simpo", "rl_beta": 1.0, "simpo_gamma": 0.0},
        {"rl": "simpo", "rl_beta": 1.0, "simpo_gamma": 1.0},
        {"rl": "simpo", "rl_beta": 3.0, "simpo_gamma": 0.0},
        {"rl": "simpo", "rl_beta": 3.0, "simpo_gamma": 1.0},
    ]
    assert [values["rl"] for values in found[6:]] == ["dpo", "simpo"]  # inside of the ranges
    assert [recipe.simpo_gamma for recipe in check_trials(cfg, found[:6])] == [None, None, 0.0, 1.0, 0.0, 1.0]


def test_a_range_for_what_wants_whole_numbers() -> None:
    cfg = sweep({"lora_r": {"uniform": [4, 8]}}, {"adapter": "lora"})
    assert cfg.tune is not None
    with pytest.raises(ConfigError, match="tune.space.lora_r: must be a whole number, got 5.5"):
        check_trials(cfg, corners(cfg.tune))


def test_a_searched_key_that_is_not_set_keeps_its_value_where_the_strategy_knows_it() -> None:
    space = {"rl": {"choice": ["dpo", "simpo"]}, "rl_beta": {"uniform": [1, 3], "when": {"rl": "simpo"}}}
    cfg = sweep(space, {"rl_beta": 0.3})
    assert trial_recipe(cfg, {"rl": "dpo"}, "x").rl_beta == 0.3


def test_a_searched_key_that_is_not_set_is_taken_out_where_it_would_have_no_effect() -> None:
    cfg = sweep({**STRATEGIES, "dpo_loss_type": {"choice": ["hinge"], "when": {"rl": "dpo"}}}, {"dpo_loss_type": ["ipo"]})
    assert trial_recipe(cfg, {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 0.5}, "x").dpo_loss_type is None
    assert trial_recipe(cfg, {"rl": "dpo", "rl_beta": 2.0, "dpo_loss_type": "hinge"}, "x").dpo_loss_type == ["hinge"]
    assert trial_recipe(cfg, None, "x").dpo_loss_type == ["ipo"]


def test_every_corner_is_checked_and_each_key_blamed_with_its_value() -> None:
    cfg = sweep(
        {
            "learning_rat": {"uniform": [0, 1]},
            "rl_beta": {"uniform": [-1, 1]},
            "lr_scheduler": {"choice": ["cosine", "foo"]},
        }
    )
    assert cfg.tune is not None
    with pytest.raises(ConfigError) as error:
        check_trials(cfg, corners(cfg.tune))
    problems = dict(error.value.problems)
    assert problems["tune.space.learning_rat"] == "unknown key; did you mean 'learning_rate'?"
    assert problems["tune.space.rl_beta"] == "must be greater than 0, got -1.0"


def test_values_that_do_not_go_together_name_each_other() -> None:
    cfg = sweep({"simpo_gamma": {"uniform": [0, 1]}, "rl": {"choice": ["dpo", "simpo"]}})
    assert cfg.tune is not None
    with pytest.raises(ConfigError, match=r"simpo_gamma: 0.0: has no effect with rl: dpo.*a `when` sets a key only where"):
        check_trials(cfg, corners(cfg.tune))


def test_a_path_that_runs_into_a_value() -> None:
    cfg = sweep({"learning_rate.x": {"choice": [3]}}, {"learning_rate": 1e-5})
    assert cfg.tune is not None
    with pytest.raises(ConfigError, match=r"learning_rate.x: the key before 'x' holds a value"):
        check_trials(cfg, corners(cfg.tune))


def test_of_a_huge_space_some_corners_are_tried_and_each_value_at_least_once() -> None:
    keys = ["learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "warmup_ratio", "rl_beta", "seed"]
    space: dict[str, Any] = {key: {"choice": [0.1, 0.2, 0.3, 0.4]} for key in keys[:-1]}
    cfg = sweep({**space, "seed": {"choice": list(range(9))}})
    assert cfg.tune is not None
    found = corners(cfg.tune)
    assert len(found) == 512
    for key in keys:
        assert {values[key] for values in found} == {*cfg.tune.space[key][0].values}


def test_a_grid_is_every_combination() -> None:
    cfg = sweep({"rl_beta": {"grid": [0.1, 0.2]}, "learning_rate": {"choice": [1e-6, 1e-5]}}, search="grid")
    assert cfg.tune is not None
    assert len(grid(cfg.tune)) == 4


def test_explored_values_stay_in_the_space() -> None:
    cfg = sweep(
        {
            "learning_rate": {"loguniform": [1e-6, 1e-4]},
            "weight_decay": {"quniform": [0.1, 0.5, 0.1]},
            "seed": {"randint": [1, 4]},
            "lr_scheduler": {"choice": ["cosine", "linear", "rex"]},
        }
    )
    assert cfg.tune is not None
    rng = random.Random(0)
    values = {"learning_rate": 1e-4, "weight_decay": 0.5, "seed": 3, "lr_scheduler": "cosine"}
    seen = [perturb(cfg.tune, values, rng) for _ in range(100)]
    assert all(1e-6 <= one["learning_rate"] <= 1e-4 and one["seed"] in (1, 2, 3) for one in seen)
    assert {one["weight_decay"] for one in seen} <= {0.1, 0.2, 0.3, 0.4, 0.5}
    assert {0.8e-4, 1e-4} <= {round(one["learning_rate"], 12) for one in seen}
    assert {one["lr_scheduler"] for one in seen} == {"cosine", "linear", "rex"}


def test_draws_cover_a_distribution() -> None:
    cfg = sweep({"learning_rate": {"loguniform": [1e-6, 1e-2]}, "seed": {"randint": [0, 3]}})
    assert cfg.tune is not None
    rng = random.Random(0)
    rates = [sample(cfg.tune.space["learning_rate"][0], rng) for _ in range(400)]
    assert all(1e-6 <= rate <= 1e-2 for rate in rates)
    assert 0.4 < sum(rate < 1e-4 for rate in rates) / 400 < 0.6
    assert {sample(cfg.tune.space["seed"][0], rng) for _ in range(50)} == {0, 1, 2}


def test_a_searched_path_is_the_same_as_the_sweeps_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else trials on one base would be taken for those of two."""
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    cfg = absolute_paths(
        parse_config({**BASE, "base_model": "base", "tune": {"space": {"base_model": {"grid": ["base", "m"]}}}})
    )
    assert [trial_recipe(cfg, {"base_model": name}, "x").base_model for name in ("base", "m")] == [str(tmp_path / "base"), "m"]
