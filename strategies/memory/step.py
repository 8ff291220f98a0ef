"""One forward and backward pass of the worst case, run on tensors that hold nothing: every allocation is counted."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.trainer.utils import add_fused_lm_head

from strategies.memory import Forward
from strategies.memory.shadow import Shadow
from strategies.packing.layout import pack, pair_tokens
from strategies.packing.support import prepare_packing
from strategies.pair_batch import PackedPairs, PaddedPairs
from strategies.registry import get_strategy

__all__ = ["Held", "hold", "largest_forward", "longest_pair", "worst_lengths"]

STATISTICS = ("entropy", "mean_logits", "is_top1")


@dataclass(frozen=True)
class Held:
    """Bytes at the moment of a forward and backward pass at which most is held, weights and their gradients left out."""

    activations: int
    token_head: int
    """Tensors that have a dimension of the vocabulary's size."""
    note: str | None = None


def longest_pair(cfg: Any) -> int:
    """Most tokens of one pair in a packed row: two sequences that share a prompt of one token."""
    return 2 * (cfg.sequence_len - 1)


def worst_lengths(cfg: Any, packed: bool) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected of the pairs that a full forward holds.

    Prompts of one token: then all others are scored, and the attention of each completion is as wide as it gets.
    """
    whole = (1, cfg.sequence_len - 1, cfg.sequence_len - 1)
    if not packed:
        return cfg.micro_batch_size * [whole]
    number, rest = divmod(cfg.tokens_per_forward or 2 * cfg.sequence_len, longest_pair(cfg))
    return [*(number * [whole]), *([(1, rest - rest // 2, rest // 2)] if rest >= 2 else [])]


def largest_forward(cfg: Any, shadow: Shadow) -> Forward:
    """The worst case that the config allows."""
    pairs = get_strategy(cfg.rl).batch_kind == "pair"
    packed = pairs and cfg.sample_packing and shadow.padded_because is None
    lengths = worst_lengths(cfg, packed)
    if packed:
        return Forward(True, sum(map(sum, lengths)) - len(lengths), len(lengths))
    because = shadow.padded_because if pairs and cfg.sample_packing else None
    return Forward(False, (1 + pairs) * cfg.micro_batch_size * cfg.sequence_len, cfg.micro_batch_size, because)


def hold(cfg: Any, shadow: Shadow, forward: Forward) -> Held:
    """Simulate the pass.

    A model whose tensors depend on values (experts that tokens choose) can't be simulated; its activations are taken to
    be 34 bytes per token, layer and dimension in 16 bit, as of a dense transformer (arXiv 2205.05198, section 4.1, without
    the attention scores), and everything else to be 0: of experts that is too little.
    """
    try:
        with _silent_failures(), shadow.mode:
            batch = _batch(cfg, shadow, forward)
            for parameter in shadow.trainable():
                parameter.grad = torch.zeros_like(parameter)
            return _run(shadow, batch, forward)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return _dense(cfg, shadow, forward, type(error).__name__)


@contextmanager
def _silent_failures() -> Iterator[None]:
    """Keep torch from logging a traceback for an operation that can't be simulated: it is said in the estimate."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _run(shadow: Shadow, batch: PackedPairs | PaddedPairs, forward: Forward) -> Held:
    """One pass."""
    models, vocabulary = [shadow.policy, shadow.reference], shadow.policy.get_input_embeddings().num_embeddings
    autocast = nullcontext() if shadow.autocast is None else torch.autocast("cpu", dtype=shadow.autocast)
    with _Allocations(models, forward.tokens, vocabulary) as counted:
        with autocast:
            scores = batch.run(shadow.policy, STATISTICS).log_probs
            if shadow.reference is not None:
                with torch.no_grad():
                    batch.run(shadow.reference)
            loss = scores.sum()
        loss.backward()
    return counted.peak


def _dense(cfg: Any, shadow: Shadow, forward: Forward, error: str) -> Held:
    model, config = shadow.policy, shadow.policy.config.get_text_config()
    size = 2 if shadow.autocast is not None or model.dtype != torch.float32 else 4
    layers = 1 if cfg.gradient_checkpointing else config.num_hidden_layers
    note = (
        f"{config.model_type} can't be simulated ({error}): activations are those of a dense transformer of its size, without "
        "a token head; --measure knows better"
    )
    return Held(17 * size * forward.tokens * config.hidden_size * layers, 0, note)


def _batch(cfg: Any, shadow: Shadow, forward: Forward) -> PackedPairs | PaddedPairs:
    models = [model for model in (shadow.policy, shadow.reference) if model is not None]
    if forward.packed:
        for model in models:
            prepare_packing(model)
        return PackedPairs(pack([pair_tokens(row(lengths)) for lengths in worst_lengths(cfg, packed=True)]))
    for model, outputs in zip(models, (("log_probs", *STATISTICS), ("log_probs",)), strict=False):
        add_fused_lm_head(model.get_base_model() if isinstance(model, PeftModel) else model, outputs=outputs)
    shape = (forward.tokens // cfg.sequence_len, cfg.sequence_len)
    ids, mask = torch.ones(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)
    return PaddedPairs(ids, mask, mask.clone())


def row(lengths: tuple[int, int, int]) -> Mapping[str, list[int]]:
    """A prepared row of tokens 1."""
    return {name: [1] * length for name, length in zip(("prompt_ids", "chosen_ids", "rejected_ids"), lengths, strict=True)}


class _Allocations(TorchDispatchMode):
    """Counts the storages that operations make, from when they are made until they are freed.

    Args:
        models: whose weights and gradients are not counted.
        tokens: of the packed row.
        vocabulary: tensors with a dimension of this size are the token head's.
    """

    def __init__(self, models: list[Any], tokens: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.vocabulary = tokens, vocabulary
        self.peak = self._live = Held(0, 0)
        self._known: dict[int, Any] = {}
        for tensor in _held(models):
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.repeat_interleave.Tensor:
            # The only size that values decide: which pair, and which part of it, each token of the row belongs to.
            kwargs = {**kwargs, "output_size": self.tokens}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._known:
            return
        change = Held(0, storage.nbytes()) if self.vocabulary in tensor.shape else Held(storage.nbytes(), 0)
        self._known[place] = weakref.ref(storage, lambda _: self._free(place, change))
        self._live = Held(self._live.activations + change.activations, self._live.token_head + change.token_head)
        if _bytes(self._live) > _bytes(self.peak):
            self.peak = self._live

    def _free(self, place: int, change: Held) -> None:
        self._known.pop(place, None)
        self._live = Held(self._live.activations - change.activations, self._live.token_head - change.token_head)


def _bytes(held: Held) -> int:
    return held.activations + held.token_head


def _held(models: list[Any]) -> Iterator[Tensor]:
    for model in models:
        if model is not None:
            for tensor in (*model.parameters(), *model.buffers()):
                yield tensor
                if tensor.grad is not None:
                    yield tensor.grad
