"""Rules find planted faults, in made curves and in real runs, and nothing bad in healthy runs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.config import parse_saved
from pipeline.findings.curves import Curves
from pipeline.findings.facts import ReferenceGap, RowCounts, RunFacts
from pipeline.findings.rows import interval
from pipeline.findings.rules import RULES
from pipeline.findings.run import apply_rules
from pipeline.ui.findings import Evidence, Finding, by_severity, finding_lines, read_finding

RUNS = Path(__file__).parent / "runs"
STEPS = np.arange(1, 41)
PACKED = {"device": "CPU", "packed": True}
ROWS = RowCounts(train=400, evaluation=400, looked_at=400, prompts=390)


def facts(records: list[dict[str, Any]], recipe: dict[str, Any] | None = None, **others: Any) -> RunFacts:
    """A run with these records, of `dpo` where the recipe doesn't say otherwise."""
    keys = {"base_model": "m", "datasets": [{"path": "rows.jsonl"}], **(recipe or {})}
    cfg = parse_saved(yaml.safe_dump(keys), "recipe")
    return RunFacts(**{"cfg": cfg, "curves": Curves(records), "setup": PACKED, "rows": ROWS, "gap": None, **others})


def curves(**changed: Any) -> list[dict[str, Any]]:
    """The records of a good run of 40 steps and 4 evaluations, with other values of some metrics; None leaves one out."""
    noise = np.random.default_rng(0).normal(0, 0.01, len(STEPS))
    done = STEPS / len(STEPS)
    good: dict[str, Any] = {
        "loss": 0.6931 - 0.3 * (done - done[0]) + noise * (STEPS > 1),
        "grad_norm": 2 + 10 * noise,
        "learning_rate": 5e-6 * np.minimum(1, STEPS / 4) * (1.05 - done),
        "rewards/chosen": 0.3 * (done - done[0]),
        "rewards/rejected": -0.6 * (done - done[0]),
        "rewards/margins": 0.9 * (done - done[0]),
        "rewards/accuracies": 0.5 + 0.3 * done,
        "logps/chosen": -100 + 3 * (done - done[0]),
        "logps/rejected": -110 - 6 * (done - done[0]),
        "tokens_per_second": np.full(40, 900.0),
        "fed_tokens_per_second": np.full(40, 600.0),
        "seconds/data": np.full(40, 0.01),
        "seconds/step": np.full(40, 1.0),
        **changed,
    }
    evaluated = {"loss": [0.65, 0.6, 0.55, 0.5], "rewards/accuracies": [0.6, 0.7, 0.75, 0.8]}
    records = []
    for index, step in enumerate(STEPS.tolist()):
        values = {
            name: float(value[index]) for name, value in good.items() if value is not None and not name.startswith("eval_")
        }
        records.append({"step": step, **values})
        if step % 10 == 0:
            at = {f"eval_{name}": good.get(f"eval_{name}", values)[step // 10 - 1] for name, values in evaluated.items()}
            more = {name: value[step // 10 - 1] for name, value in changed.items() if name.startswith("eval_")}
            records.append({"step": step, **at, **more})
    return records


def rising(start: float, end: float) -> Any:
    return np.linspace(start, end, len(STEPS))


def fell(chosen: float, rejected: float) -> dict[str, Any]:
    """Curves of answers that have lost so many nats of 100 and 110 by the end; beta is 0.1."""
    return {
        "rewards/chosen": rising(0, -chosen / 10),
        "rewards/rejected": rising(0, -rejected / 10),
        "logps/chosen": rising(-100, -100 - chosen),
        "logps/rejected": rising(-110, -110 - rejected),
        "rewards/margins": rising(0, (rejected - chosen) / 10),
    }


FLAT = {"loss": np.full(40, math.log(2)), **fell(0, 0), "rewards/margins": np.full(40, 1e-4)}
SATURATED = {"rewards/accuracies": np.where(STEPS < 15, 0.8, 1.0), "rewards/margins": rising(0, 9)}
LENGTHS = {"eval_answer_length": [40.0, 60.0, 90.0, 120.0]}
SPIKE = np.where(STEPS == 23, 90.0, 2.0)
LEDGER = {23: ["4", "17", "201"], 5: ["8"]}


def rows_of(steps: Iterable[int] | None) -> dict[int, list[str]]:
    return {step: LEDGER[step] for step in ([5] if steps is None else steps) if step in LEDGER}


KTO, GRPO = {"rl": "kto"}, {"rl": "grpo", "trl": {"beta": 0.1, "num_generations": 4}}
KL = {"kl": rising(0, 30)}
PLANTED: list[tuple[str, str, RunFacts]] = [
    ("learning_rate_is_zero", "error", facts(curves(learning_rate=np.zeros(40)))),
    ("learning_rate_is_zero", "warning", facts(curves(learning_rate=rising(0, 1e-6)))),
    ("loss_stays", "error", facts(curves(**FLAT, grad_norm=np.zeros(40)), {"adapter": "lora"})),
    ("loss_stays", "warning", facts(curves(**FLAT, grad_norm=np.full(40, 2.0)))),
    ("loss_above_start", "error", facts(curves(loss=rising(math.log(2), 3)))),
    ("loss_above_start", "warning", facts(curves(loss=np.where((STEPS > 5) & (STEPS < 12), 4.0, 0.69)))),
    ("both_fall", "info", facts(curves(**fell(10, 40)))),
    ("both_fall", "warning", facts(curves(**fell(60, 80)))),
    ("both_fall", "error", facts(curves(**fell(200, 220)))),
    (
        "accuracy_saturates",
        "info",
        facts(curves(**SATURATED)),
    ),
    ("evaluation_turns", "warning", facts(curves(eval_loss=[0.6, 0.5, 0.6, 0.8]))),
    ("evaluation_turns", "info", facts(curves(eval_loss=[0.6, 0.5, 0.6, 0.8]), {"load_best_model_at_end": True})),
    ("answers_grow", "warning", facts(curves(**LENGTHS))),
    ("kl_beyond_budget", "warning", facts(curves(**KL), KTO)),
    ("kl_beyond_budget", "warning", facts(curves(**KL), GRPO)),
    ("gradient_spikes", "warning", facts(curves(grad_norm=SPIKE), rows_of=rows_of)),
    ("steps_skipped", "warning", facts(curves(skipped_steps=np.where(STEPS < 5, 0, 1)), rows_of=rows_of)),
    ("steps_skipped", "error", facts(curves(skipped_steps=STEPS / 2), rows_of=rows_of)),
    ("reference_differs", "error", facts(curves(**{"rewards/chosen": rising(-4, -5), "rewards/rejected": rising(-3, -4)}))),
    (
        "reference_differs",
        "warning",
        facts(curves(**{"rewards/chosen": rising(-2, -3), "rewards/rejected": rising(-2, -3)}), {"reference_model": "r"}),
    ),
    ("labels_flipped", "error", facts(curves(), gap=ReferenceGap(pairs=300, right=30, gap=-0.6))),
    ("labels_flipped", "warning", facts(curves(), gap=ReferenceGap(pairs=300, right=90, gap=-0.2))),
    ("few_prompts", "warning", facts(curves(), rows=replace(ROWS, prompts=12))),
    ("evaluation_is_small", "warning", facts(curves(), rows=replace(ROWS, evaluation=6))),
    ("padding", "warning", facts(curves(fed_tokens_per_second=np.full(40, 2400.0)), setup={"packed": False})),
    ("data_waits", "warning", facts(curves(**{"seconds/data": np.full(40, 0.4)}))),
    ("rewards_alike", "error", facts(curves(frac_reward_zero_std=np.full(40, 0.97)), GRPO)),
]
"""Rule, severity, and a run with that fault."""


def test_every_rule_has_a_planted_fault() -> None:
    assert {name for name, _, _ in PLANTED} == {rule.name for rule in RULES}
    assert len({rule.name for rule in RULES}) == len(RULES) >= 13


@pytest.mark.parametrize(("name", "severity", "run"), PLANTED, ids=[f"{name}-{severity}" for name, severity, _ in PLANTED])
def test_a_planted_fault_is_found(name: str, severity: str, run: RunFacts) -> None:
    findings = apply_rules(run)
    (found,) = [finding for finding in findings if finding.rule == name]
    assert found.severity == severity and found.evidence and found.advice and found.sentence.endswith(".")
    # What else is found is no worse: nothing leads a user elsewhere.
    assert findings[0].severity == severity
    assert all(math.isfinite(evidence.value) for evidence in found.evidence)
    assert read_finding(json.loads(json.dumps(found.as_json()))) == found


def test_a_good_run_has_no_finding() -> None:
    assert apply_rules(facts(curves(), gap=ReferenceGap(pairs=300, right=170, gap=0.02))) == ()
    assert apply_rules(facts(curves(), KTO)) == () and apply_rules(facts(curves(), GRPO)) == ()
    assert apply_rules(facts([])) == (), "nor one that has recorded nothing"


@pytest.mark.parametrize("recipe", [{"rl": "ipo"}, {"dpo_loss_type": ["sppo_hard"]}, {"dpo_label_smoothing": 0.1}])
def test_a_margin_that_the_loss_asks_for_may_grow(recipe: dict[str, Any]) -> None:
    assert [finding.severity for finding in apply_rules(facts(curves(**SATURATED)))] == ["info"]
    assert apply_rules(facts(curves(**SATURATED), recipe)) == ()
    worse = {**SATURATED, "eval_rewards/accuracies": [0.8, 0.8, 0.79, 0.78]}
    (found,) = apply_rules(facts(curves(**worse), recipe))
    assert (found.rule, found.severity) == ("accuracy_saturates", "warning") and "ipo" not in found.advice


def test_an_evaluation_with_little_to_gain_is_no_worse() -> None:
    for accuracies, severity in (([0.8, 0.98, 0.98, 0.98], "info"), ([0.8, 0.9, 0.9, 0.9], "warning")):
        (found,) = apply_rules(facts(curves(**SATURATED, **{"eval_rewards/accuracies": accuracies})))
        assert found.severity == severity


def test_evidence_names_steps_and_rows() -> None:
    (spike,) = apply_rules(facts(curves(grad_norm=SPIKE), rows_of=rows_of))
    assert spike.evidence[0] == Evidence("grad_norm", 90.0, 23) and spike.rows == ("4", "17", "201")
    assert spike.evidence_text == "grad_norm 90 (step 23); median before 2; rows 4, 17, 201"
    (skipped,) = apply_rules(facts(curves(skipped_steps=np.where(STEPS < 5, 0, 1)), rows_of=rows_of))
    assert skipped.rows == ("8",) and Evidence("skipped_steps", 1.0, 5) in skipped.evidence


def recorded(file: Path) -> RunFacts:
    """A run that `make_runs.py` or `make_ray_runs.py` has written."""
    seen, *records = map(json.loads, file.read_text().splitlines())
    gap = ReferenceGap(**seen["gap"]) if seen["gap"] else None
    return facts(records, seen["recipe"], setup={"packed": seen["packed"]}, rows=RowCounts(**seen["rows"]), gap=gap)


SPOILED = {
    "ray-rate-times-100": ("both_fall", "error"),
    "ray-rate-zero": ("learning_rate_is_zero", "error"),
    "ray-labels-flipped": ("labels_flipped", "error"),
    "ray-wrong-reference": ("reference_differs", "error"),
    "ray-small-evaluation": ("evaluation_is_small", "warning"),
    "spoiled-rate-times-1000": ("both_fall", "error"),
    "spoiled-rate-too-low": ("loss_stays", "warning"),
    "spoiled-warming-up": ("learning_rate_is_zero", "warning"),
    "spoiled-nothing-attached": ("loss_stays", "error"),
}
"""Runs that one fault spoils, each with what is found first; those of all other files are healthy."""
HEALTHY = [file for file in sorted(RUNS.glob("*.jsonl")) if file.stem not in SPOILED]


@pytest.mark.parametrize("file", HEALTHY, ids=lambda file: file.stem)
def test_real_healthy_runs_have_no_error(file: Path) -> None:
    assert [finding for finding in apply_rules(recorded(file)) if finding.severity == "error"] == []


def test_healthy_runs_are_of_all_methods_and_several_seeds() -> None:
    recipes = [recorded(file).cfg for file in HEALTHY]
    assert len(recipes) >= 10 and {cfg.rl for cfg in recipes} == {"dpo", "ipo", "simpo", "orpo", "kto", "grpo"}
    assert len({cfg.seed for cfg in recipes if cfg.rl == "dpo"}) >= 3


@pytest.mark.parametrize("name", SPOILED)
def test_real_spoiled_runs_are_found(name: str) -> None:
    first = apply_rules(recorded(RUNS / f"{name}.jsonl"))[0]
    assert (first.rule, first.severity) == SPOILED[name]


def test_rules_take_no_time() -> None:
    """4,400 records: twenty times as many as a run has by default."""
    records = [{**record, "step": record["step"] + 40 * part} for part in range(100) for record in curves()]
    start = time.process_time()
    apply_rules(facts(records))
    assert len(records) == 4400 and time.process_time() - start < 0.1


def test_an_interval_is_wilsons() -> None:
    assert interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert interval(0, 6) == pytest.approx((0.0, 0.3903343), abs=1e-6)


def test_findings_are_lines_with_what_to_do() -> None:
    info, error = (
        Finding("b", "info", "It grows.", (Evidence("loss", 2.0, 1200),), "nothing"),
        Finding("a", "error", "It fell.", (Evidence("kl", 0.123456),), "stop"),
    )
    assert by_severity([info, error]) == (error, info)
    assert finding_lines([error]).plain == "error: It fell.\n  seen:  kl 0.1235\n  try:   stop"
    assert info.evidence_text == "loss 2 (step 1,200)"
    with pytest.raises(ValueError, match="needs evidence"):
        replace(info, evidence=())
