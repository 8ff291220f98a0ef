"""Before each step ranks agree whether it is finite, and whether it is the last; the ledger says what was trained on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from benchmarks.processes import free_port, spawn
from strategies.mixins import NonFiniteLossError
from tests.laws.runs import built, prepared, trained
from tests.tiny import pairs, prepared_pairs

BAD = 5
KEYS: dict[str, Any] = {"micro_batch_size": 4, "num_epochs": 2.0}


def scored(number: int, bad: int | None = None) -> list[dict[str, Any]]:
    """Prepared rows with scores; those of the rejected answer of row `bad` overflow when they are added up.

    The loss of that pair is infinite, its gradient isn't.
    """
    rows = prepared_pairs(number)
    for index, row in enumerate(rows):
        row["ref_chosen_logps"] = [-5.5] * len(row["chosen_ids"])
        row["ref_rejected_logps"] = [-3e38 if index == bad else -5.5] * len(row["rejected_ids"])
    return rows


def state_of(trainer: Any) -> list[torch.Tensor]:
    """Copies of all weights and of what the optimizer keeps of each."""
    moments = [value for kept in trainer.optimizer.state.values() for value in kept.values()]
    return [tensor.detach().clone() for tensor in (*trainer.model.parameters(), *moments)]


class Watcher(TrainerCallback):
    """Keeps the state after every step, and asks for a stop after step `stop_at`."""

    def __init__(self, trainer: Any, stop_at: int | None = None) -> None:
        self.trainer, self.stop_at = trainer, stop_at
        self.states: dict[int, list[torch.Tensor]] = {}
        self.saved: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.stop_at:
            self.trainer.request_stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.states[state.global_step] = state_of(self.trainer)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved.append(state.global_step)


def watched(folder: Path, stop_at: int | None = None, **keys: Any) -> tuple[Any, Watcher]:
    trainer = built(folder, **{**KEYS, **keys})
    watcher = Watcher(trainer, stop_at)
    trainer.add_callback(watcher)
    return trainer, watcher


def bad_steps(ledger: Any) -> list[int]:
    return [record["step"] for record in ledger.steps if f"{BAD:04d}" in record["row_ids"]]


def test_a_loss_that_is_not_finite_ends_the_run_before_its_step(tmp_path: Path) -> None:
    good = trained(tmp_path / "good", rows=scored(16), **KEYS)
    first = bad_steps(good.ledger)[0]
    trainer, watcher = watched(tmp_path / "bad", rows=scored(16, BAD))
    with pytest.raises(NonFiniteLossError, match=f"step {first}: the loss is not finite for row 0005; the step was not taken"):
        trainer.train()
    assert trainer.state.global_step == first - 1
    assert [record["step"] for record in trainer.ledger.steps] == list(range(1, first))
    now = state_of(trainer)
    assert first > 1
    assert all(torch.equal(one, other) for one, other in zip(now, watcher.states[first - 1], strict=True))


@pytest.mark.parametrize("keys", [{}, {"sample_packing": False}, {"dpo_loss_type": ["aot"]}, {"tokens_per_forward": 60}])
def test_a_skipped_step_leaves_weights_and_moments(tmp_path: Path, keys: dict[str, Any]) -> None:
    trainer, watcher = watched(tmp_path, rows=scored(16, BAD), nonfinite_loss="skip", **keys)
    trainer.train()
    skipped = trainer.ledger.skipped
    assert skipped == bad_steps(trainer.ledger) == [record["step"] for record in trainer.ledger.steps if "skipped" in record]
    assert len(skipped) == 2
    for step, state in watcher.states.items():
        before = watcher.states.get(step - 1)
        if before is not None and len(before) == len(state):
            same = all(torch.equal(one, other) for one, other in zip(before, state, strict=True))
            assert same == (step in skipped)
    assert all(torch.isfinite(tensor).all() for tensor in state_of(trainer))
    logged = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert [step for step, loss in logged.items() if not math.isfinite(loss)] == skipped
    counts = [entry["skipped_steps"] for entry in trainer.state.log_history if "skipped_steps" in entry]
    assert counts == [sum(step <= now for step in skipped) for now in range(1, 9)]


def test_the_number_of_skipped_steps_survives_a_restart(tmp_path: Path) -> None:
    keys = {"rows": scored(16, BAD), "nonfinite_loss": "skip", "save_strategy": "epoch"}
    whole, _ = watched(tmp_path / "whole", **keys)
    whole.train()
    again, _ = watched(tmp_path / "again", **keys)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert again.ledger.skipped == whole.ledger.skipped
    assert again.ledger.steps == whole.ledger.steps[4:]
    assert again.state.log_history[-2]["skipped_steps"] == 2


def explode(trainer: Any) -> None:
    """From now on gradients are infinite, and losses as they were."""
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient / 0)


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    trainer = built(tmp_path, rows=prepared_pairs(4), **KEYS)
    explode(trainer)
    with pytest.raises(NonFiniteLossError, match="step 1: the gradient norm is not finite; its global batch has rows 0000,"):
        trainer.train()


def test_other_strategies_stop_too(tmp_path: Path) -> None:
    trainer = built(tmp_path, rl="kto", **KEYS)
    explode(trainer)
    with pytest.raises(NonFiniteLossError, match="step 1: the gradient norm is not finite; the step was not taken"):
        trainer.train()


def rank(number: int, port: int, folder: str) -> None:
    """One of two processes: a run that skips and one that stops; leaves what it knows of them."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    keys = {**KEYS, "micro_batch_size": 2, "rows": scored(16, BAD)}
    skipping = trained(Path(folder), **keys, nonfinite_loss="skip")
    found = {"steps": skipping.ledger.steps, "skipped": skipping.ledger.skipped}
    found["weights"] = sum(parameter.detach().double().sum().item() for parameter in skipping.model.parameters())
    try:
        trained(Path(folder), **keys)
    except NonFiniteLossError as error:
        found["message"] = str(error)
    stopping = built(Path(folder), **keys | {"rows": scored(16), "save_strategy": "epoch"})
    if number == 1:
        stopping.add_callback(Watcher(stopping, stop_at=3))
    stopping.train()
    found["stopped"] = [stopping.stopped, stopping.state.global_step]
    (Path(folder) / f"{number}.json").write_text(json.dumps(found))


@pytest.mark.processes
def test_two_processes_take_the_same_decisions(tmp_path: Path) -> None:
    """The bad row is only one rank's; the other one asks for the stop."""
    spawn(rank, 2, free_port(), str(tmp_path))
    ranks = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    alone = trained(tmp_path / "alone", rows=scored(16, BAD), nonfinite_loss="skip", **KEYS)
    for found in ranks:
        assert found["skipped"] == alone.ledger.skipped
        assert found["message"].startswith(f"step {alone.ledger.skipped[0]}: the loss is not finite for row 0005; ")
        assert found["weights"] == ranks[0]["weights"]
        assert found["stopped"] == [True, 3]
    for record, *parts in zip(alone.ledger.steps, *(found["steps"] for found in ranks), strict=True):
        assert sorted(row for part in parts for row in part["row_ids"]) == record["row_ids"]
        assert all(part["row_ids"] for part in parts)


@pytest.mark.parametrize("keys", [{}, {"gradient_accumulation_steps": 2, "micro_batch_size": 1, "tokens_per_forward": 60}])
def test_every_row_stands_in_the_ledger_once_per_epoch(tmp_path: Path, keys: dict[str, Any]) -> None:
    trainer = trained(tmp_path, rows=prepared_pairs(13), **{**KEYS, **keys})
    steps = trainer.ledger.steps
    assert [record["step"] for record in steps] == list(range(1, trainer.state.max_steps + 1))
    half = len(steps) // 2
    for epoch in (steps[:half], steps[half:]):
        assert sorted(row for record in epoch for row in record["row_ids"]) == [f"{row:04d}" for row in range(13)]


def test_rows_are_known_by_their_row_id_or_their_number(tmp_path: Path) -> None:
    named = [{**pair, "row_id": f"mine-{index}"} for index, pair in enumerate(pairs(4))]
    for rows, expected in ((named, [f"mine-{index}" for index in range(4)]), (pairs(4), [0, 1, 2, 3])):
        trainer = trained(tmp_path, rows=rows, micro_batch_size=4)
        assert trainer.ledger.steps == [{"step": 1, "row_ids": expected}]


@pytest.mark.parametrize(("stop_at", "keys"), [(3, {"save_strategy": "epoch"}), (4, {"save_strategy": "epoch"}), (3, {})])
def test_a_run_that_is_stopped_saves_once_and_goes_on_as_if_it_was_not(
    tmp_path: Path, stop_at: int, keys: dict[str, Any]
) -> None:
    whole, _ = watched(tmp_path / "whole", **keys)
    whole.train()
    stopped, watcher = watched(tmp_path / "stopped", stop_at, **keys)
    stopped.train()
    assert (stopped.stopped, stopped.state.global_step, watcher.saved) == (True, stop_at, [stop_at])
    again, _ = watched(tmp_path / "again", **keys)
    again.train(resume_from_checkpoint=str(tmp_path / "stopped" / f"checkpoint-{stop_at}"))
    assert not again.stopped
    assert stopped.ledger.steps + again.ledger.steps == whole.ledger.steps
    assert all(torch.equal(one, other) for one, other in zip(state_of(again), state_of(whole), strict=True))


def test_a_stop_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    trainer, watcher = watched(tmp_path, stop_at=8, rows=prepared(16, {}))
    trainer.train()
    assert (trainer.stopped, trainer.state.global_step, watcher.saved) == (False, 8, [])


def test_rows_with_and_without_a_row_id_are_told_apart(tmp_path: Path) -> None:
    rows = [
        {name: value for name, value in pair.items() if name != "row_id" or index != 2}
        for index, pair in enumerate(prepared_pairs(4))
    ]
    trainer = trained(tmp_path, rows=rows, rl="simpo", micro_batch_size=4)
    assert trainer.ledger.steps == [{"step": 1, "row_ids": [2, "0000", "0001", "0003"]}]
