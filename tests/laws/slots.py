"""Trials on one base, and each of them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from strategies.config import as_config
from strategies.models.loading import load_model
from strategies.slots import Attach, Close, Command, Ended, SharedBase, Slot, SlotHost
from tests.laws.runs import CONFIG, LORA, alike, built, prepared
from tests.tiny import tiny_tokenizer

KEYS: dict[str, Any] = {
    **LORA,
    "lora_dropout": 0.2,
    "micro_batch_size": 4,
    "num_epochs": 2.0,
    "eval_steps": 3,
}
"""Of every trial: eight steps, dropout on, evaluations of five rows."""
ROWS, EVAL_ROWS = 16, 5


def trainer_of(folder: Path, keys: dict[str, Any], new_model: Callable[[Any], Any]) -> Any:
    """A trainer as a worker builds it: the seed is set before the model is made."""
    keys = {**KEYS, **keys}
    set_seed(keys.get("seed", 42))
    model = new_model(as_config({**CONFIG, **keys}))
    return built(folder, rows=prepared(ROWS, keys), eval_rows=EVAL_ROWS, model=model, **keys)


def outcome(trainer: Any) -> dict[str, Any]:
    """What a law compares: everything logged, but for times, and the trained weights."""
    weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    return {"history": [alike(entry) for entry in trainer.state.log_history], "weights": weights}


def run_alone(folder: Path, keys: dict[str, Any], resume: str | None = None) -> dict[str, Any]:
    """Train without a host."""
    trainer = trainer_of(folder, keys, lambda cfg: load_model(cfg, tiny_tokenizer()))
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer)


def shared_base(base_model: str) -> SharedBase:
    return SharedBase(load_model(as_config({**CONFIG, "base_model": base_model}), tiny_tokenizer()))


def run_trial(folder: Path) -> Callable[[Slot], dict[str, Any]]:
    """What a host's slots run; a payload is the keys of a trial, and `resume`, the checkpoint that it goes on from."""

    def run(slot: Slot) -> dict[str, Any]:
        keys = dict(slot.payload)
        resume = keys.pop("resume", None)
        trainer = trainer_of(folder / slot.name, keys, lambda _: slot.new_model())
        slot.join(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return outcome(trainer)

    return run


def run_together(host: SlotHost, rounds: Iterable[Sequence[Command]]) -> dict[str, Ended]:
    """Run trials until all have ended.

    Args:
        rounds: commands of each round of turns; the host closes after the last one.
    """
    ends: dict[str, Ended] = {}
    left: Iterator[Sequence[Command]] = iter(rounds)
    host.run(lambda _: next(left, [Close()]), lambda ended: ends.update({ended.name: ended}))
    return ends


def attach(trials: dict[str, dict[str, Any]]) -> list[Command]:
    return [Attach(name, keys) for name, keys in trials.items()]


def assert_same(one: dict[str, Any], other: dict[str, Any], rtol: float | None = None) -> None:
    """Assert that two outcomes are equal, bit by bit unless there is a tolerance."""
    assert one["weights"].keys() == other["weights"].keys()
    assert len(one["history"]) == len(other["history"])
    if rtol is None:
        assert one["history"] == other["history"]
    for name, value in one["weights"].items():
        if rtol is None:
            assert torch.equal(value, other["weights"][name]), name
        else:
            torch.testing.assert_close(value, other["weights"][name], rtol=rtol, atol=1e-7)
