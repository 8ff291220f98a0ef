"""Law 10: a trial among others on one base is the trial alone; bit by bit where slots take turns of whole steps."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.processes import free_port, spawn
from strategies.slots import Attach, SlotHost, Stop
from tests.laws.slots import (
    TOLERANCES,
    WAYS,
    Planted,
    assert_same,
    attach,
    host_worker,
    killed_worker,
    run_alone,
    run_together,
    run_trial,
    shared_base,
    torn_worker,
)
from tests.tiny import save_tiny

TRIALS: dict[str, dict[str, Any]] = {
    "sigmoid": {"rl": "dpo", "seed": 1},
    "rslora": {"rl": "ipo", "peft_use_rslora": True, "lora_r": 8, "learning_rate": 5e-3},
    "dora": {"rl": "simpo", "peft_use_dora": True, "seed": 7, "lora_target_modules": ["q_proj", "down_proj"]},
    # Forwards that accelerate counts, and batches that its loader fills up.
    "kto": {"rl": "kto", "micro_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"), initializer_range=0.15)


@pytest.fixture(scope="module")
def trials(base: str) -> dict[str, dict[str, Any]]:
    return {name: {**keys, "base_model": base} for name, keys in TRIALS.items()}


@pytest.fixture(scope="module")
def alone(trials: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each trial without a host, and without others."""
    return {name: run_alone(tmp_path_factory.mktemp(name), keys) for name, keys in trials.items()}


@pytest.mark.parametrize("way", list(WAYS))
def test_trials_come_and_go(way: str, base: str, trials: dict[str, Any], alone: dict[str, Any], tmp_path: Path) -> None:
    """One joins in the middle, one takes the slot of another, and one is stopped."""
    host = SlotHost(shared_base(base), run_trial(tmp_path), slots=4, joint_tokens=WAYS[way])
    first, second, third, fourth = attach(trials)
    stopped = Attach("stopped", {"base_model": base, "seed": 5})
    ends = run_together(host, [[first, stopped], [], [second], [fourth, Stop("stopped")], [], [third]])
    assert next(iter(ends)) == "stopped" and len(ends["stopped"].result["history"]) < len(alone["sigmoid"]["history"])
    for name in trials:
        assert_same(ends[name].result, alone[name], TOLERANCES[way])


@pytest.mark.parametrize("fault", ["raise", "memory"])
def test_a_trial_that_fails_touches_no_other(
    fault: str, base: str, trials: dict[str, Any], alone: dict[str, Any], tmp_path: Path
) -> None:
    host = SlotHost(shared_base(base), run_trial(tmp_path), slots=4)
    bad = {"fails": {"base_model": base, "fault": (3, fault)}}
    absurd = {"absurd": {"base_model": base, "learning_rate": 1e30, "max_grad_norm": 0.0}}
    sigmoid, rslora, *_ = attach(trials)
    ends = run_together(host, [[*attach(bad), sigmoid, *attach(absurd), rslora]])
    assert isinstance(ends["fails"].error, Planted if fault == "raise" else torch.OutOfMemoryError)
    assert ends["fails"].is_out_of_memory == (fault == "memory") and "on_pre_optimizer_step" in ends["fails"].traceback
    assert "is not finite" in str(ends["absurd"].error)
    for name in ("sigmoid", "rslora"):
        assert_same(ends[name].result, alone[name], TOLERANCES["joint"])


@pytest.mark.processes
def test_killed_and_resumed_equals_never_killed(
    base: str, trials: dict[str, Any], alone: dict[str, Any], tmp_path: Path
) -> None:
    """Each goes on from its own last checkpoint; they were at different steps."""
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    trials = {name: {**keys, **saving} for name, keys in trials.items()}
    trials["rslora"]["save_steps"] = 5
    trials["kto"]["save_steps"] = 3
    killed = {**trials, "dora": {**trials["dora"], "fault": (6, "kill")}}
    process = multiprocessing.get_context("spawn").Process(target=killed_worker, args=(str(tmp_path), base, killed))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found = {name: get_last_checkpoint(str(tmp_path / name)) for name in trials}
    assert [Path(str(folder)).name for folder in found.values()] == [
        "checkpoint-6",
        "checkpoint-5",
        "checkpoint-4",
        "checkpoint-3",
    ]
    resumed = {name: {**keys, "resume": found[name]} for name, keys in trials.items()}
    ends = run_together(SlotHost(shared_base(base), run_trial(tmp_path), slots=4), [attach(resumed)])
    for name in trials:
        for result in (ends[name].result, alone[name]):
            result["history"] = [entry for entry in result["history"] if "train_loss" not in entry]
        assert_same(ends[name].result, alone[name], TOLERANCES["joint"])


@pytest.fixture(scope="module")
def two_processes(trials: dict[str, Any], base: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("host")
    keys = {name: {**trial, "micro_batch_size": 2} for name, trial in trials.items()}
    spawn(host_worker, 2, 2, free_port(), str(folder), base, keys)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", list(TRIALS))
def test_over_two_workers(name: str, way: str, two_processes: list[dict[str, Any]]) -> None:
    for found in two_processes:
        result, error = found[f"{name} {way}"]
        assert error == "None"
        assert_same(result, found[f"{name} alone"], TOLERANCES[way])
        assert "planted" in found[f"fails {way}"][1]
        assert len(found[f"stopped {way}"][0]["history"]) < len(result["history"])
    one, other = two_processes
    assert_same(one[f"{name} {way}"][0], other[f"{name} {way}"][0])


@pytest.mark.processes
@pytest.mark.parametrize("where", ["one", "both"])
def test_a_trial_that_fails_otherwise_on_another_worker_ends_the_host(where: str, base: str, tmp_path: Path) -> None:
    trials = {"torn": {"base_model": base, "fault": (3, "raise", 1)}, "other": {"base_model": base}}
    spawn(torn_worker, 2, 2, free_port(), str(tmp_path), base, trials if where == "one" else None)
    said = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert said.keys() == {"0.txt", "1.txt"}
    if where == "both":
        assert all("['2 0', '2 1'] on the workers" in text for text in said.values())
