"""Turns: who runs when, and with which state of the process."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import GradientState

from strategies.compat import set_exchange
from strategies.slots import Attach, BaseChanged, Close, Ended, SharedBase, Slot, SlotHost, Stop
from strategies.slots.causes import causes
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def base() -> SharedBase:
    return SharedBase(tiny_model(tiny_tokenizer()))


def run(base: SharedBase, run_trial: Callable[[Slot], Any], *rounds: list[Any], slots: int = 2) -> dict[str, Ended]:
    ends: dict[str, Ended] = {}
    left = iter(rounds)
    host = SlotHost(base, run_trial, slots)
    host.run(lambda _: next(left, [Close()]), lambda ended: ends.update({ended.name: ended}))
    assert host.free == slots
    return ends


def test_turns_go_round(base: SharedBase) -> None:
    turns: list[str] = []

    def trial(slot: Slot) -> int:
        for number in range(slot.payload):
            turns.append(f"{slot.name}{number}")
            slot.pass_turn()
        return slot.payload

    ends = run(base, trial, [Attach("a", 2)], [Attach("b", 3)], [Stop("nobody")])
    assert turns == ["a0", "a1", "b0", "b1", "b2"]
    assert {name: ended.result for name, ended in ends.items()} == {"a": 2, "b": 3}


def draws() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_each_slot_has_its_own_random_states(base: SharedBase) -> None:
    def trial(slot: Slot) -> list[Any]:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(slot.payload)
        found = []
        for _ in range(3):
            found.append(draws())
            slot.pass_turn()
        return found

    torch.manual_seed(5)
    before = torch.get_rng_state()
    together = run(base, trial, [Attach("one", 1), Attach("two", 2)])
    assert torch.equal(before, torch.get_rng_state())
    for name, seed in (("one", 1), ("two", 2)):
        assert together[name].result == run(base, trial, [Attach(name, seed)])[name].result
    assert together["one"].result != together["two"].result


def test_each_slot_has_its_own_gradient_state(base: SharedBase) -> None:
    def trial(slot: Slot) -> list[bool]:
        found = []
        state = GradientState()
        set_exchange(state, slot.payload)
        for _ in range(2):
            slot.pass_turn()
            found.append(state.sync_gradients)
        return found

    ends = run(base, trial, [Attach("now", True), Attach("later", False)])
    assert ends["now"].result == [True, True] and ends["later"].result == [False, False]


def test_recording_of_gradients_is_each_slots_own(base: SharedBase) -> None:
    def trial(slot: Slot) -> bool:
        torch.set_grad_enabled(slot.payload)
        slot.pass_turn()
        return torch.is_grad_enabled()

    ends = run(base, trial, [Attach("on", True), Attach("off", False)])
    assert ends["on"].result and not ends["off"].result and torch.is_grad_enabled()


def test_errors_are_of_the_slot_and_keep_no_tensor(base: SharedBase) -> None:
    alive: list[Any] = []

    class Held:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def trial(slot: Slot) -> str:
        held = Held()
        slot.pass_turn()
        if slot.payload:
            raise KeyError(slot.name) from ValueError(f"because of {type(held).__name__}")
        return "done"

    ends = run(base, trial, [Attach("bad", True), Attach("good", False)])
    assert ends["good"].result == "done" and ends["good"].error is None
    assert isinstance(ends["bad"].error, KeyError) and ends["bad"].error.__traceback__ is None
    assert "because of Held" in ends["bad"].traceback and not ends["bad"].is_out_of_memory
    assert not alive


def test_what_can_not_attach(base: SharedBase) -> None:
    def trial(slot: Slot) -> None:
        while True:
            slot.pass_turn()

    with pytest.raises(ValueError, match="trial 'c' can't attach: all 2 slots are taken"):
        run(base, trial, [Attach("a"), Attach("b"), Attach("c")])
    with pytest.raises(ValueError, match="trial 'a' can't attach: has a slot already"):
        run(base, trial, [Attach("a"), Attach("a")])


def test_a_host_that_fails_ends_its_trials(base: SharedBase) -> None:
    ended = []

    def trial(slot: Slot) -> None:
        try:
            while True:
                slot.pass_turn()
        finally:
            ended.append(slot.name)

    def commands(host: SlotHost) -> list[Any]:
        if host.free == 0:
            raise RuntimeError("of the host's own")
        return [Attach("a"), Attach("b")]

    with pytest.raises(RuntimeError, match="of the host's own"):
        SlotHost(base, trial, 2).run(commands, lambda _: None)
    assert sorted(ended) == ["a", "b"]


def test_an_error_that_was_raised_from_itself_ends_its_trial(base: SharedBase) -> None:
    def fail(slot: Slot) -> None:
        try:
            raise ValueError("inner")
        except ValueError as error:
            raise error from error

    ends = run(base, fail, [Attach("a")])
    assert str(ends["a"].error) == "inner" and [str(one) for one in causes(ends["a"].error)] == ["inner"]


def test_a_trial_that_has_changed_the_base_ends_the_host() -> None:
    """Also where nobody joins after it."""
    base = SharedBase(tiny_model(tiny_tokenizer()))

    def change(slot: Slot) -> None:
        with torch.no_grad():
            slot.new_model().lm_head.weight[3, 5] += 1

    ends: list[Ended] = []
    with pytest.raises(BaseChanged, match="such as lm_head"):
        SlotHost(base, change, 1).run(lambda _: [Attach("bad"), Close()], ends.append)
    assert not ends


def test_a_worker_that_is_not_connected_is_refused(base: SharedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="connect the workers first"):
        SlotHost(base, lambda _: None, 1)
