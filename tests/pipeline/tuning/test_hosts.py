"""Sweeps whose trials share one base: each trial is what it is with workers of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import tune
from pipeline.errors import UserError
from pipeline.runs.metrics import MetricsFile
from pipeline.tuning.result import SweepResult
from pipeline.ui.display import SilentDisplay
from strategies.checkpoints.manifest import read_manifests

pytestmark = pytest.mark.usefixtures("ray_session")
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True, "lora_dropout": 0.1}


class Notes(SilentDisplay):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def history(result: SweepResult, trial: str) -> list[dict[str, Any]]:
    rows = MetricsFile(Path(str(result.run_dir)) / "trials" / trial / "metrics.jsonl").read()
    exact = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_rewards/margins", "rewards/margins")
    return [{name: row[name] for name in exact if name in row} for row in rows]


def adapter(result: SweepResult, trial: str) -> dict[str, Any]:
    return load_file(Path(str(result.run_dir)) / "trials" / trial / "model" / "adapter_model.safetensors")


def files(result: SweepResult, trial: str) -> set[str]:
    names = {path.name for path in Path(str(result.run_dir), "trials", trial).iterdir()}
    return {name for name in names if not name.startswith(".")}  # Ray Train leaves a marker


def test_a_trial_among_others_is_what_it_is_alone(recipe: Any, tmp_path: Path) -> None:
    """Law 10, of whole trials."""
    results, display = {}, Notes()
    for share in (True, False):
        section = {
            "space": {"rl": {"grid": ["dpo", "ipo"]}, "lora_r": {"grid": [4, 8]}},
            "search": "grid",
            "share_base": share,
            "metric": "eval_rewards/accuracies",
            **({"slots": 2} if share else {}),
        }
        results[share] = tune(recipe(tmp_path / f"{share}", section, **LORA), display=display)
        assert [(one.status, one.reason) for one in results[share].records] == [("finished", None)] * 5
    for record in results[True].records:
        trial = f"{record.number:03d}"
        shared, alone = (history(results[share], trial) for share in (True, False))
        assert len(shared) == len(alone)
        # Rows of trials at once stand in one forward, which rounds otherwise.
        assert all(ours == pytest.approx(theirs, rel=1e-4, abs=1e-5) for ours, theirs in zip(shared, alone, strict=True))
        for name, weight in adapter(results[True], trial).items():
            torch.testing.assert_close(weight, adapter(results[False], trial)[name], rtol=1e-4, atol=1e-5)
        assert files(results[True], trial) == files(results[False], trial)
    assert "up to 2 trials share one copy of the base model, of which there are 2" in display.notes


def test_two_workers_divide_the_base(recipe: Any, tmp_path: Path) -> None:
    """And each trains the whole adapter, as its checkpoints say."""
    section = {
        "space": {"learning_rate": {"grid": [1e-4, 1e-3]}},
        "search": "grid",
        "baseline": False,
        "share_base": True,
        "slots": 2,
        "metric": "eval_rewards/accuracies",
    }
    keys: dict[str, Any] = {"fsdp_config": {"activation_checkpointing": True}, "ray": {"num_workers": 2}, "max_steps": 4}
    display = Notes()
    result = tune(recipe(tmp_path / "sweep", section, save_steps=4, eval_steps=4, **keys, **LORA), display=display)
    assert [(one.status, one.step, one.reason) for one in result.records] == [("finished", 4, None)] * 2
    assert "fsdp_config: 2 workers divide the layers of a copy by FSDP2; adapters are whole on each" in display.notes
    for trial in ("000", "001"):
        assert len(history(result, trial)) >= 2 and adapter(result, trial)
        (checkpoint,) = (tmp_path / "sweep" / "trials" / trial).glob("checkpoint-*")
        manifests = read_manifests(checkpoint)
        assert len(manifests) == 2 and manifests[0]["identity"]["sharding"] == "whole"


def test_slots_are_freed_by_the_scheduler(recipe: Any, tmp_path: Path) -> None:
    section = {
        "space": {"learning_rate": {"grid": [1e-3, 1e-7, 5e-7, 2e-7]}},
        "search": "grid",
        "scheduler": "asha",
        "reduction_factor": 2,
        "baseline": False,
        "metric": "eval_rewards/margins",
        "slots": 1,
    }
    result = tune(recipe(tmp_path / "sweep", section, num_epochs=4, evals_per_epoch=1, **LORA))
    statuses = [one.status for one in result.records]
    assert statuses[0] == "finished" and "stopped" in statuses and "failed" not in statuses
    assert not (tmp_path / "sweep" / "hosts").exists()


def test_population_based_training_uses_slots(recipe: Any, tmp_path: Path) -> None:
    section = {
        "space": {"learning_rate": {"choice": [1e-6, 1e-2]}},
        "scheduler": "pbt",
        "num_samples": 2,
        "baseline": False,
        "metric": "eval_rewards/margins",
        "slots": 2,
    }
    result = tune(recipe(tmp_path / "sweep", section, num_epochs=8, eval_steps=16, save_total_limit=20, **LORA))
    assert [(one.status, one.reason) for one in result.records] == [("finished", None)] * 2
    exploited = [one for one in result.records if one.origins]
    assert exploited and all(one.folder == f"{one.number:03d}.{len(one.origins)}" for one in exploited)
    assert [one.step for one in result.records] == [64, 64]


def test_a_trial_that_fails_touches_no_other(recipe: Any, tmp_path: Path) -> None:
    section = {
        "space": {"learning_rate": {"grid": [1e-4, 1e30]}, "rl": {"grid": ["dpo", "ipo"]}},
        "search": "grid",
        "baseline": False,
        "slots": 4,
        "metric": "eval_rewards/accuracies",
    }
    result = tune(recipe(tmp_path / "sweep", section, **LORA))
    by_rate = result.table.groupby("learning_rate")
    assert by_rate.get_group(1e-4)["status"].tolist() == ["finished", "finished"]
    failed = by_rate.get_group(1e30)
    assert failed["status"].tolist() == ["failed", "failed"]
    assert failed["reason"].str.contains("not finite").all()


def test_more_slots_than_memory(recipe: Any, tmp_path: Path) -> None:
    section = {"space": {"learning_rate": {"grid": [1e-4, 1e-3]}}, "search": "grid", "slots": 100_000}
    with pytest.raises(UserError, match=r"tune.slots: 100000 trials don't fit the memory beside one copy .*: \d+ do"):
        tune(recipe(tmp_path / "sweep", section, **LORA))
