"""Steps of several slots at once: each hands its row over, rows run in joint forwards, and losses are each slot's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.packing.head import TokenOutputs
from strategies.packing.layout import RowTokens, pack, pair_tokens
from strategies.packing.support import PROBES, RowScorer, score_row
from strategies.slots.base import CantShare, SharedBase
from strategies.slots.joint_model import JointModel, LayersMissed, SlotRow, adapters_of, hooks_of, why_not_joint
from strategies.slots.limits import JOINT_TOKENS

__all__ = ["JointSteps", "SlotScorer"]

logger = logging.getLogger(__name__)


class SlotScorer(RowScorer):
    """A slot's side: hands rows over and waits, in place of a forward and backward in the slot's turn.

    Args:
        slot: whose trainer is known.
        hooks: those of the base.

    Attributes:
        row: the one that was handed over, None where there is none.
        is_last: whether `row` is the last one of a step, so that its backward exchanges gradients.
    """

    def __init__(self, slot: Any, hooks: int) -> None:
        self.slot = slot
        self.row: SlotRow | None = None
        self.is_last = False
        self.clock = slot.trainer.speed.clock
        self._adapters = adapters_of(slot.trainer.model)
        self._weights = [weight for weight in slot.trainer.model.parameters() if weight.requires_grad]
        self._hooks: int | None = hooks
        self._parts: list[tuple[Any, ...]] = []

    @property
    def length(self) -> int:
        """Tokens of the row."""
        assert self.row is not None
        return self.row.row.input_ids.shape[1]

    @property
    def gradients(self) -> list[Tensor]:
        """Gradients of the weights that the slot trains; 0 where there is none."""
        for weight in self._weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        return [weight.grad for weight in self._weights]

    def make_row(self, row: RowTokens, wanted: tuple[str, ...] = ()) -> SlotRow:
        """Return a row to hand over, in the slot's own turn."""
        device = row.input_ids.device.type
        with self.slot.trainer.accelerator.autocast():
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return SlotRow(self._adapters, row, self._weights, wanted, dtype)

    def run_alone(self) -> None:
        """Run the forward of the row that was handed over by the slot's own model: bit by bit what it is in a turn."""
        assert self.row is not None
        with self.row.random.used():
            self.row.take(score_row(self.slot.trainer.model, self.row.row, self.row.wanted))

    def score(self, row: RowTokens, wanted: tuple[str, ...]) -> TokenOutputs:
        """As `RowScorer`."""
        if self._hooks is not None and hooks_of(self.slot.trainer.model) != self._hooks:
            raise CantShare("a callback has put hooks on the model, whose forwards it would miss")
        self._hooks = (
            None  # once: it takes milliseconds for a model of many layers, and callbacks put theirs before the first step
        )
        self.row = asked = self.make_row(row, wanted)
        self._wait()
        if asked.error is not None:
            raise asked.error
        asked.random.put()
        assert asked.outputs is not None
        return asked.outputs

    def backward(self, is_last: bool) -> None:
        """As `RowScorer`."""
        self.is_last = is_last
        self._wait()
        row, self.row = self.row, None
        if row is not None and row.error is not None:
            raise row.error

    def count(self, part: Literal["forward", "backward"], began: Any, share: float) -> None:
        """Count a share of the time since a mark of the clock as a part of the slot's step."""
        self._parts.append((part, began, self.clock.mark(), share))

    def _wait(self) -> None:
        with self.clock.part("waiting"):
            self.slot.pass_turn()
        for part in self._parts:
            self.clock.add(*part)
        self._parts.clear()


class JointSteps:
    """The host's side: which rows run in which forward.

    Args:
        base: of the slots.
        tokens: most tokens of a joint forward, 0 for none of them; those of `JOINT_TOKENS` when not given. Half of those of a
            forward that has failed where its rows alone have not, from then on.
    """

    def __init__(self, base: SharedBase, tokens: int | None = None) -> None:
        self._base, self._tokens = base, tokens
        self._made: JointModel | None = None

    def take_turns(self) -> None:
        """Run each row alone from now on."""
        self._tokens = 0

    @property
    def _model(self) -> JointModel:
        if self._made is None:
            self._made = JointModel(self._base)
        return self._made

    def scorer_of(self, slot: Any) -> SlotScorer | None:
        """Return the scorer of a slot whose rows can stand in joint forwards, None for another."""
        trainer = slot.trainer
        if self._tokens == 0 or why_not_joint(trainer) is not None:
            return None
        scorer = SlotScorer(slot, hooks_of(self._base.model))
        vocabulary = trainer.model.get_base_model().config.get_text_config().vocab_size
        tiny = ([token % vocabulary for token in ids] for ids in PROBES[0])
        pair = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), tiny, strict=True))
        try:
            with torch.no_grad():
                self._model.forward([scorer.make_row(pack([pair_tokens(pair)]).to(trainer.args.device))])
        except LayersMissed:
            return None
        return scorer

    def groups(self, scorers: Sequence[SlotScorer]) -> Iterator[list[SlotScorer]]:
        """Yield those whose rows share a forward, in their order.

        The same ones on every worker, but where one of them has had less room for a forward.
        """
        if not scorers:
            return
        device = scorers[0].slot.trainer.args.device
        lengths = torch.tensor([scorer.length for scorer in scorers], device=device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(lengths, dist.ReduceOp.MAX)
        limit = JOINT_TOKENS.get(device.type, 0) if self._tokens is None else self._tokens
        group: list[SlotScorer] = []
        room = limit
        for scorer, length in zip(scorers, lengths.tolist(), strict=True):
            room -= length
            if group and room < 0:
                yield group
                group, room = [], limit - length
            group.append(scorer)
        yield group

    def forward(self, group: Sequence[SlotScorer]) -> None:
        """Run the forward of a group; if it fails, that of each row alone, so that an error is that of its own slot."""
        rows = [_row(scorer) for scorer in group]
        began = group[0].clock.mark()
        failure = self._run(group, group[0].run_alone if len(group) == 1 else lambda: self._model.forward(rows))
        if failure is None:
            _count(group, "forward", began)
            return
        for scorer, row in zip(group, rows, strict=True):
            row.restart()
            self.forward([scorer])
        self._note_split(group, failure)

    def backward(self, group: Sequence[SlotScorer]) -> None:
        """Run the backward of a group's forward, for those that have a loss; if it fails, forward and backward of each row."""
        rows = [_row(scorer) for scorer in group]
        before: list[list[Tensor | None]] = []

        def run() -> None:
            if self._may_split(group):
                before.extend([row.gradients_of_weights() for row in rows])
            self._model.backward(rows)

        began = group[0].clock.mark()
        failure = self._run(group, run)
        if failure is None:
            _count(group, "backward", began)
            return
        of_losses = [row.gradient() for row in rows]
        for row in rows:
            row.restart()  # all of them first: they keep the activations of the joint forward
        for row, gradients in zip(rows, before, strict=False):  # none where there was no memory for them: none has changed
            row.put_gradients_of_weights(gradients)
        for scorer, row, of_loss in zip(group, rows, of_losses, strict=True):
            if of_loss is None:
                continue
            self.forward([scorer])
            if row.outputs is not None:
                row.outputs.log_probs.grad = of_loss
                self.backward([scorer])
        self._note_split(group, failure)

    def _may_split(self, group: Sequence[SlotScorer]) -> bool:
        """Whether rows can run again alone: not where a forward is one of all workers, which may not all have failed."""
        return len(group) > 1 and not self._base.is_divided

    def _run(self, group: Sequence[SlotScorer], run: Callable[[], None]) -> str | None:
        """Run a forward or backward; return why it has failed where its rows are to run again alone, else None.

        Where they can't, what it raises is an error of every slot of the group.
        """
        try:
            run()
        except Exception as error:  # raised by the slot whose row it is
            if isinstance(error, torch.AcceleratorError):
                raise  # at once: the device takes no work of this process any more, and other slots have turns before this one
            if self._may_split(group):
                return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            for scorer in group:
                _row(scorer).error = error
        return None

    def _note_split(self, group: Sequence[SlotScorer], failure: str) -> None:
        """Let half the tokens stand in a forward from now on, where the rows alone haven't failed."""
        if any(_row(scorer).error is not None for scorer in group):
            return
        tokens = sum(scorer.length for scorer in group)
        self._tokens = tokens // 2
        logger.warning(
            "%d tokens of %d trials can't run in one forward (%s); from now on there are at most %d",
            *(tokens, len(group), failure, self._tokens),
        )

    def exchange(self, scorers: Sequence[SlotScorer]) -> None:
        """Average the gradients of slots over the workers, where a step ends; as DDP does, whose forwards didn't run."""
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return
        for scorer in scorers:
            if scorer.is_last:
                _average(scorer.gradients)


def _row(scorer: SlotScorer) -> SlotRow:
    assert scorer.row is not None
    return scorer.row


def _count(group: Sequence[SlotScorer], part: Literal["forward", "backward"], began: Any) -> None:
    total = sum(scorer.length for scorer in group)
    for scorer in group:
        scorer.count(part, began, scorer.length / total)


def _average(tensors: Sequence[Tensor]) -> None:
    """Average tensors over the workers, in place, by one collective for each of their types."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in same]).div_(dist.get_world_size())
        dist.all_reduce(flat)
        for tensor, values in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(values.view_as(tensor))
