"""Trials on one base, and each of them alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback, set_seed

from cluster.config import ClusterKeys
from cluster.sharding import sharding_arguments
from strategies.config import as_config
from strategies.models.gather_weights import gather
from strategies.models.loading import load_model
from strategies.slots import Attach, Close, Command, DividedBase, Ended, SharedBase, Slot, SlotHost, Stop, WorkersDisagree
from tests.laws.runs import CONFIG, LORA, alike, built, join, prepared
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
WAYS = {"turns": 0, "joint": None}
"""How slots run together -> `joint_tokens`."""
TOLERANCES = {"turns": None, "joint": 1e-4}


def trainer_of(folder: Path, keys: dict[str, Any], new_model: Callable[[Any], Any], extra: dict[str, Any] | None = None) -> Any:
    """A trainer as a worker builds it: the seed is set before the model is made."""
    keys = {**KEYS, **keys}
    set_seed(keys.get("seed", 42))
    model = new_model(as_config({**CONFIG, **keys}))
    return built(folder, rows=prepared(ROWS, keys), eval_rows=EVAL_ROWS, model=model, extra=extra, **keys)


def outcome(trainer: Any) -> dict[str, Any]:
    """What a law compares: everything logged, but for times, and the trained weights, whole."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    weights = {name: value.detach().clone() for name, value in gather(model, trained)}
    return {"history": [alike(entry) for entry in trainer.state.log_history], "weights": weights}


def run_alone(folder: Path, keys: dict[str, Any], resume: str | None = None, **sharding: Any) -> dict[str, Any]:
    """Train without a host.

    Args:
        sharding: keys that divide the model among two workers.
    """
    extra = sharding_arguments(ClusterKeys.model_validate({"ray": {"num_workers": 2}, **sharding}))
    trainer = trainer_of(folder, keys, lambda cfg: load_model(cfg, tiny_tokenizer()), extra)
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer)


def shared_base(base_model: str) -> SharedBase:
    return SharedBase(load_model(as_config({**CONFIG, "base_model": base_model}), tiny_tokenizer()))


def divided_base(base_model: str) -> DividedBase:
    return DividedBase(load_model(as_config({**CONFIG, "base_model": base_model}), tiny_tokenizer()))


class Planted(RuntimeError):
    """A fault that a test has planted."""


class FaultAt(TrainerCallback):
    """A fault within a step of a trial."""

    def __init__(self, step: int, fault: Callable[[], None]) -> None:
        self.step, self.fault = step, fault

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            self.fault()


def raise_planted() -> None:
    raise Planted("planted")


def raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("planted")


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS = {"raise": raise_planted, "memory": raise_out_of_memory, "kill": kill_this_process}


def run_trial(folder: Path) -> Callable[[Slot], dict[str, Any]]:
    """What a host's slots run.

    A payload is the keys of a trial; `resume`, the checkpoint that it resumes from; `fault`, a step, a name of `FAULTS`, and
    the rank if it has a fault on one rank alone.
    """

    def run(slot: Slot) -> dict[str, Any]:
        keys = dict(slot.payload)
        resume, fault = keys.pop("resume", None), keys.pop("fault", None)
        trainer = trainer_of(folder / slot.name, keys, lambda _: slot.new_model())
        if fault is not None and (len(fault) < 3 or fault[2] == trainer.args.process_index):
            trainer.add_callback(FaultAt(fault[0], FAULTS[fault[1]]))
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
    assert one["weights"] and one["weights"].keys() == other["weights"].keys()
    if rtol is None:
        assert one["history"] == other["history"]
    assert len(one["history"]) == len(other["history"])
    for ours, theirs in zip(one["history"], other["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=rtol, abs=1e-5)
    for name, value in one["weights"].items():
        if rtol is None:
            assert torch.equal(value, other["weights"][name]), name
        else:
            # Adam divides by the gradient's size, so that a gradient of almost 0 moves a weight by some of the rate of 5e-3.
            torch.testing.assert_close(value, other["weights"][name], rtol=rtol, atol=5e-6)


def host_worker(rank: int, world_size: int, port: int, folder: str, base: str, trials: dict[str, dict[str, Any]]) -> None:
    """One process of two: the trials together, one of which fails and one is stopped, then alone; leaves `{rank}.pt`.

    Together twice: in turns of whole steps, and with joint forwards.
    """
    join(rank, world_size, port)
    dist.init_process_group("gloo")
    place = Path(folder)
    others = {"fails": {"base_model": base, "fault": (3, "raise")}, "stopped": {"base_model": base, "seed": 5}}
    first, *rest = attach(trials)
    found: dict[str, Any] = {}
    for way, tokens in WAYS.items():
        host = SlotHost(shared_base(base), run_trial(place / way), slots=len(trials) + 2, joint_tokens=tokens)
        ends = run_together(host, [[first, *attach(others)], [], rest, [Stop("stopped")]])
        found |= {f"{name} {way}": (ends[name].result, repr(ends[name].error)) for name in ends}
    for name, keys in trials.items():
        found[f"{name} alone"] = run_alone(place / f"{name}-alone", keys)
    torch.save(found, place / f"{rank}.pt")


def divided_worker(rank: int, world_size: int, port: int, folder: str, base: str, trials: dict[str, dict[str, Any]]) -> None:
    """One process of two: the trials on a divided base, then alone, whole and divided; leaves `{rank}.pt`."""
    join(rank, world_size, port)
    dist.init_process_group("gloo")
    place, shared = Path(folder), divided_base(base)
    between, whole = shared.nbytes, shared_base(base)
    layers = sum(weight.nbytes for weight in whole.model.model.layers.parameters())
    found: dict[str, Any] = {"between layers": between, "layers": layers, "rest": whole.nbytes - layers}
    del whole
    others = {"fails": {"base_model": base, "fault": (3, "raise")}, "stopped": {"base_model": base, "seed": 5}}
    held: list[int] = []

    def note_held(_: str | None = None) -> None:
        tensors = (*shared.model.parameters(), *shared.model.buffers())
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))

    first, *rest = attach(trials)
    host = SlotHost(shared, run_trial(place), len(trials) + 2, on_turn=note_held)
    ends = run_together(host, [[first, *attach(others)], [], rest, [Stop("stopped")]])
    note_held()
    found |= {"whole between turns": max(held), "whole at the end": held[-1]}
    found |= {"ends": {name: repr(end.error) for name, end in ends.items()}, **{name: end.result for name, end in ends.items()}}
    for name, keys in trials.items():
        found[f"{name} whole"] = run_alone(place / f"{name}-whole", keys)
        found[f"{name} fsdp2"] = run_alone(place / f"{name}-fsdp2", keys, fsdp_config={})
    torch.save(found, place / f"{rank}.pt")


def fail_apart(slot: Slot) -> None:
    """Fail on both of two workers, one of which has begun a collective that the other one hasn't."""
    slot.pass_turn()
    if dist.get_rank() == 1:
        dist.all_reduce(torch.ones(1), async_op=True)
    raise_planted()


def torn_worker(rank: int, world_size: int, port: int, folder: str, base: str, trials: dict[str, Any] | None) -> None:
    """One process of two: a trial fails on one alone, or on both apart; leaves what the host raised in `{rank}.txt`."""
    join(rank, world_size, port)
    dist.init_process_group("gloo")
    run = fail_apart if trials is None else run_trial(Path(folder))
    host = SlotHost(shared_base(base), run, slots=2, patience_s=1.0)
    try:
        run_together(host, [attach(trials or {"apart": {}})])
    except WorkersDisagree as error:
        Path(folder, f"{rank}.txt").write_text(str(error))


def killed_worker(folder: str, base: str, trials: dict[str, dict[str, Any]]) -> None:
    """A process in which a trial ends all of them."""
    run_together(SlotHost(shared_base(base), run_trial(Path(folder)), slots=len(trials)), [attach(trials)])
