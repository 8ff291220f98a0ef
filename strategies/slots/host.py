"""Trials attach to slots, take turns, and leave."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from transformers import TrainerCallback

from strategies.compat import leave_out_of_ddp
from strategies.slots.base import BaseChanged, SharedBase
from strategies.slots.causes import causes
from strategies.slots.commands import Attach, Close, Command, Stop, TakeTurns
from strategies.slots.control import WorkersOfHost
from strategies.slots.joint_steps import JointSteps, SlotScorer
from strategies.slots.turns import TurnTaker

__all__ = ["Ended", "Slot", "SlotHost"]


@dataclass(frozen=True)
class Ended:
    """How a trial ended on this worker; the same way on all workers."""

    name: str
    result: Any = None
    """What `run_trial` returned; None if it failed."""
    error: BaseException | None = None
    """What it raised, without its traceback, which would keep the trial's tensors."""
    traceback: str = ""
    """The traceback as text."""

    @property
    def is_out_of_memory(self) -> bool:
        """Whether the device had no memory left, of which a trial alone may have enough."""
        return isinstance(self.error, torch.OutOfMemoryError | MemoryError)


class Slot:
    """A trial's place on the host: what `run_trial` is given.

    Attributes:
        name, payload: of its `Attach`.
        trainer: None before `join`.
        scorer: where its rows stand in joint forwards.
    """

    def __init__(self, trial: Attach, base: SharedBase, joint: JointSteps, run_trial: Callable[[Slot], Any]) -> None:
        self.name, self.payload = trial.name, trial.payload
        self.trainer: Any = None
        self.scorer: SlotScorer | None = None
        self.stop_requested = False
        self._base, self._joint = base, joint
        self.turns = TurnTaker(lambda: run_trial(self))

    def new_model(self) -> Any:
        """Return a model on the shared base, without adapter, for `HFRLTrainerBuilder`."""
        return self._base.new_model()

    def join(self, trainer: Any) -> None:
        """Let a trainer that was built on `new_model()` pass its turns in each of its steps; before `trainer.train()`.

        Raises:
            CantShare: if it would train weights of the base. Also raised later, by a trainer in joint forwards whose callbacks
                have put hooks on its model.
            BaseChanged: if building it has changed the base.
        """
        self._base.check_frozen(trainer.model)
        self._base.check_unchanged()
        self.trainer = trainer
        if getattr(trainer, "packed", False) and trainer.vision is None:
            self._base.model.is_known_to_pack = True
        leave_out_of_ddp(trainer.model, self._base.names_in(trainer.model))
        self.scorer = self._joint.scorer_of(self)
        if self.scorer is not None:
            trainer.row_scorer = self.scorer
        else:
            # First, so that the waiting counts as no part of the step.
            trainer.callback_handler.callbacks.insert(0, TurnCallback(self))
        if self.stop_requested:
            trainer.request_stop()

    def pass_turn(self) -> None:
        """Let the other slots have their turns; not within a step, a context of torch's, or a collective."""
        self.turns.pass_back()

    def request_stop(self) -> None:
        """Let the trainer stop after its current step, or after its first one if it has not begun."""
        self.stop_requested = True
        if self.trainer is not None:
            self.trainer.request_stop()


class TurnCallback(TrainerCallback):
    """Passes the turn before each step, in which no other slot has one."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the next turn; the step's metrics don't count the waiting."""
        with self._slot.trainer.speed.clock.part("waiting"):
            self._slot.pass_turn()


class Outcome(IntEnum):
    """Of a turn, as workers compare it."""

    CONTINUES = 0
    RETURNED = 1
    RAISED = 2


class SlotHost:
    """Runs trials on one base, in every worker.

    A trial among others computes what it computes alone: its random states, accelerate's singletons and all else that libraries
    keep per process are put in place for its turns. Bit by bit where its rows share no forward; those in joint forwards round
    otherwise, in float32 by about 1e-7.

    Args:
        base: of all trials.
        run_trial: builds a trainer on `slot.new_model()`, joins it, trains and saves; called in the slot's own turns,
            on every worker, in the thread of `run`. What it returns or raises is the trial's end, and touches no other trial.
        slots: how many trials may run at once.
        patience_s: how long workers whose trial has failed wait for the others to fail, too, beside the longest turn so far.
        joint_tokens: most tokens of a forward in which rows of several slots stand; 0 for turns of whole steps alone. The
            device's own number when not given.
        on_turn: called with the name of the slot whose turn begins, and with None where a forward or backward of several does.
    """

    def __init__(
        self,
        base: SharedBase,
        run_trial: Callable[[Slot], Any],
        slots: int,
        patience_s: float = 60.0,
        joint_tokens: int | None = None,
        on_turn: Callable[[str | None], None] = lambda name: None,
    ) -> None:
        self.base, self.slots = base, slots
        self._on_turn = on_turn
        self._joint = JointSteps(base, joint_tokens)
        self._run_trial, self._patience_s = run_trial, patience_s
        self._workers = WorkersOfHost()
        self._running: dict[str, Slot] = {}
        self._closing = False
        self._longest_s = 0.0

    @property
    def free(self) -> int:
        """Slots that no trial has."""
        return self.slots - len(self._running)

    def run(self, next_commands: Callable[[SlotHost], Sequence[Command]], on_end: Callable[[Ended], None]) -> None:
        """Give turns until `Close` came and no trial is left.

        Args:
            next_commands: called on rank 0 before each round of turns, with this host; must return soon, unless all slots are
                free: then it should wait for a command.
            on_end: called on every worker, in this thread, when a trial has ended and its slot is free.

        Raises:
            WorkersDisagree: if a trial failed on some workers alone. No trial can continue.
            BaseChanged: if a trial has changed the base. No trial can continue.
            ValueError: for an `Attach` without a free slot, or of a name that has one.
        """
        # Every trainer asks for a collection as it starts, which would look at all that was imported until now.
        gc.collect()
        gc.freeze()
        with ExitStack() as at_the_end:
            at_the_end.callback(gc.unfreeze)
            at_the_end.callback(self._close_slots)
            while self._running or not self._closing:
                commands = self._workers.broadcast(self._ask(next_commands) if self._workers.rank == 0 else None)
                for command in commands:
                    self._obey(command)
                self._turns(list(self._running.values()), on_end)
                self._run_rows(on_end)

    def _run_rows(self, on_end: Callable[[Ended], None]) -> None:
        """Run the rows that slots have handed over; each has a turn for its loss, between forward and backward."""
        scorers = [slot.scorer for slot in self._running.values() if slot.scorer is not None and slot.scorer.row is not None]
        for group in self._joint.groups(scorers):
            self._on_turn(group[0].slot.name if len(group) == 1 else None)
            self._joint.forward(group)
            self._turns([scorer.slot for scorer in group], on_end)
            if left := [scorer for scorer in group if scorer.slot.name in self._running]:
                self._on_turn(left[0].slot.name if len(left) == 1 else None)
                self._joint.backward(left)
        self._joint.exchange([scorer for scorer in scorers if scorer.slot.name in self._running])

    def _turns(self, slots: Sequence[Slot], on_end: Callable[[Ended], None]) -> None:
        for slot in slots:
            if (ended := self._turn(slot)) is not None:
                on_end(ended)

    def _close_slots(self) -> None:
        with ExitStack() as at_the_end:
            while self._running:
                at_the_end.callback(self._running.popitem()[1].turns.close)

    def _ask(self, next_commands: Callable[[SlotHost], Sequence[Command]]) -> Sequence[Command]:
        """Return the next commands; where no trial runs, only once they attach one or close the host."""
        commands: list[Command] = []
        while True:
            commands += next_commands(self)
            if self._running or any(isinstance(command, Attach | Close) for command in commands):
                return commands

    def _obey(self, command: Command) -> None:
        if isinstance(command, Close):
            self._closing = True
        elif isinstance(command, TakeTurns):
            self._joint.take_turns()
        elif isinstance(command, Stop):
            if command.name in self._running:
                self._running[command.name].request_stop()
        elif command.name in self._running or not self.free:
            why = "has a slot already" if command.name in self._running else f"all {self.slots} slots are taken"
            raise ValueError(f"trial {command.name!r} can't attach: {why}")
        else:
            self._running[command.name] = Slot(command, self.base, self._joint, self._run_trial)

    def _turn(self, slot: Slot) -> Ended | None:
        """Give a slot a turn; return how its trial ended, None if it continues."""
        began = time.monotonic()
        self._on_turn(slot.name)
        result, error = None, None
        try:
            result = slot.turns.give()
        except BaseChanged:
            raise
        except Exception as raised:  # noqa: BLE001 - a trial may raise anything, and that touches no other one
            error = raised
        is_over = slot.turns.is_over
        outcome = Outcome.RAISED if error is not None else Outcome.RETURNED if is_over else Outcome.CONTINUES
        self._longest_s = max(self._longest_s, time.monotonic() - began)
        self._workers.check_equal(outcome, self._patience_s + 2 * self._longest_s)
        if not is_over:
            return None
        del self._running[slot.name]
        slot.trainer = slot.scorer = None
        if self._running:
            self._on_turn(None)  # what is found now, any of them may have done
        self.base.check_unchanged()
        ended = Ended(slot.name, result) if error is None else _failed(slot.name, error)
        # A trainer stands in cycles, and keeps its adapter and optimizer.
        gc.collect()
        return ended


def _failed(name: str, error: BaseException) -> Ended:
    text = "".join(traceback.format_exception(error))
    for one in causes(error):
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None
    return Ended(name, error=error, traceback=text)
