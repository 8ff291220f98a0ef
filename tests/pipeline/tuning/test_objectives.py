"""What trials are compared by, and which of them is best."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import parse_config
from pipeline.config.tuning import Bounds
from pipeline.errors import ConfigError
from pipeline.tuning.objective import Objective, SweepObjective, resolve_objective
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.space import check_trials, corners
from pipeline.tuning.table import best_record, winners

BASE: dict[str, Any] = {"base_model": "m", "datasets": [{"path": "d.jsonl"}], "val_set_size": 4}
RATE = {"learning_rate": {"uniform": [1e-6, 1e-5]}}


def measure(space: dict[str, Any] | None = None, recipe: dict[str, Any] | None = None, **section: Any) -> SweepObjective:
    cfg = parse_config({**BASE, **(recipe or {}), "tune": {"space": space or RATE, **section}})
    assert cfg.tune is not None
    return resolve_objective(cfg.tune, check_trials(cfg, corners(cfg.tune)))


@pytest.mark.parametrize(
    ("rl", "metric"), [("dpo", "eval_rewards/accuracies"), ("orpo", "eval_rewards/accuracies"), ("kto", "eval_rewards/margins")]
)
def test_the_strategys_own_metric_when_none_is_given(rl: str, metric: str) -> None:
    assert measure(recipe={"rl": rl}).objectives == (Objective(metric, "max"),)


@pytest.mark.parametrize(
    ("key", "space"),
    [
        ("rl_beta", {"rl_beta": {"uniform": [0.1, 0.2]}}),
        ("dpo_loss_type", {"dpo_loss_type": {"choice": ["sigmoid", "hinge"]}}),
        ("rl", {"rl": {"choice": ["dpo", "ipo"]}}),
    ],
)
def test_losses_of_different_kinds_are_not_compared(key: str, space: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"losses can't be compared where {key} differs.*use eval_rewards/accuracies"):
        measure(space, metric="eval_loss")


def test_losses_of_one_kind_are() -> None:
    assert measure(metric="eval_loss").objectives == (Objective("eval_loss", "min"),)


@pytest.mark.parametrize(
    ("section", "recipe", "message"),
    [
        ({"metric": "eval_accuracy"}, {}, "'eval_accuracy' is not reported by evaluations of rl: dpo; these are: eval_loss, "),
        ({"metric": "eval_answer_length"}, {}, "eval_answer_length needs dpo_generate_during_eval: true"),
        ({"constraints": {"eval_x": {"min": 1}}}, {}, "tune.constraints: 'eval_x' is not reported"),
        ({"metric": "eval_kl"}, {}, "tune.mode: whether eval_kl is to grow or to shrink isn't plain"),
        ({"metric": "eval_kl", "mode": "max"}, {"rl": "simpo"}, "'eval_kl' is not reported by evaluations of rl: simpo"),
    ],
)
def test_metrics_that_are_not_there(section: dict[str, Any], recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(recipe=recipe, **section)


def test_answer_length_is_a_metric_where_answers_are_generated() -> None:
    found = measure(recipe={"dpo_generate_during_eval": True}, metric="eval_answer_length", mode="min")
    assert found.first == Objective("eval_answer_length", "min")


def test_margins_grow_with_beta() -> None:
    with pytest.raises(ConfigError, match="the strategy's own, grows with beta, and rl_beta is searched; name a metric"):
        measure({"rl_beta": {"choice": [0.1, 0.2]}}, {"rl": "kto"})
    named = measure({"rl_beta": {"choice": [0.1, 0.2]}}, {"rl": "kto"}, metric="eval_rewards/margins")
    assert named.first.mode == "max"


def test_losses_are_no_constraints_either() -> None:
    with pytest.raises(ConfigError, match="losses can't be compared where rl_beta differs"):
        measure({"rl_beta": {"choice": [0.1, 0.2]}}, constraints={"eval_loss": {"max": 1}})


def test_strategies_with_different_metrics_need_a_name() -> None:
    with pytest.raises(ConfigError, match="whose own differ: eval_rewards/accuracies, eval_rewards/margins; name one"):
        measure({"rl": {"choice": ["dpo", "kto"]}}, {"datasets": [{"path": "d"}]})


def trial(number: int, status: str, **metrics: float) -> TrialRecord:
    return TrialRecord(number, {}, status, str(number), 1, 1, {f"eval_{name}": value for name, value in metrics.items()})  # type: ignore[arg-type]


def test_the_best_one_is_within_the_constraints_and_has_finished() -> None:
    found = SweepObjective((Objective("eval_a", "max"),), {"eval_kl": Bounds(min=-5, max=None)}, ("eval_a", "eval_kl"))
    records = [
        trial(0, "finished", a=0.5, kl=-1),
        trial(1, "finished", a=0.9, kl=-6),
        trial(2, "stopped", a=0.8, kl=-1),
        trial(3, "finished", a=0.6, kl=-2),
        trial(4, "failed"),
        trial(5, "finished", a=float("nan"), kl=0),
    ]
    best = best_record(records, found)
    assert best is not None and best.number == 3
    assert winners(records, found) == {3}
    assert winners([records[2]], found) == {2}
    assert best_record([records[1], records[4]], found) is None
    assert found.violation(records[1].metrics) == [1.0]
    assert not found.allows(records[4].metrics)


def test_the_front_is_what_nothing_beats() -> None:
    found = SweepObjective((Objective("eval_a", "max"), Objective("eval_b", "min")), {}, ("eval_a", "eval_b"))
    points = [(0.5, 1.0), (0.7, 2.0), (0.6, 2.0), (0.9, 5.0), (0.9, 6.0), (0.5, 1.0)]
    records = [trial(number, "finished", a=a, b=b) for number, (a, b) in enumerate(points)]
    assert winners(records, found) == {0, 1, 3, 5}
