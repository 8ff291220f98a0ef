"""Fused output head: log-probabilities of selected tokens, without materialising all logits.

TRL's head does this too. This one scores only the requested tokens, on every device (TRL's also projects prompts and padding
without Triton), in chunks that fit a cache, and with a frozen head it projects twice instead of four times.
`benchmarks/utilisation.py` compares them.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

__all__ = ["TokenOutputs", "add_token_scores", "scores_tokens", "token_outputs"]

ELEMENTS = 2**25
"""Logits per chunk: 128 MiB in float32."""


@dataclass
class TokenOutputs(ModelOutput):
    """Outputs for N tokens, tensors of shape (N,); statistics, without gradient, are None unless requested.

    A `ModelOutput`, so that wrappers that hook into the backward pass (DeepSpeed, FSDP2) find the tensors.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    aux_loss: Tensor | None = None
    """The router loss of a mixture of experts; padded batches only."""


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, wanted: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        projection = weight.to(_dtype(hidden))
        size = max(1, ELEMENTS // len(weight))
        # Buffers are reused by all chunks: allocating memory of this size costs as much as a pass over it.
        logits_buffer = _buffer(hidden, weight, size)
        # Entropy needs odds and logits at once; without it `exp` overwrites the logits.
        odds_buffer = _buffer(hidden, weight, size) if "entropy" in wanted else logits_buffer
        parts: dict[str, list[Tensor]] = {name: [] for name in ("log_probs", "log_z", *STATISTICS, "gradient")}
        for states, targets in zip(hidden.split(size), labels.split(size), strict=True):
            logits = _logits(states, projection, bias, out=logits_buffer[: len(states)])
            top = logits.max(dim=1)
            # What is needed of the logits themselves comes first: `sub_` below overwrites them.
            label_logits = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
            if "mean_logits" in wanted:
                parts["mean_logits"].append(logits.mean(dim=1))
            if "is_top1" in wanted:
                parts["is_top1"].append(top.indices == targets)
            below_top = logits.sub_(top.values.unsqueeze(1))
            odds = torch.exp(below_top, out=odds_buffer[: len(states)])
            total = odds.sum(dim=1)
            log_z = top.values + total.log()
            parts["log_z"].append(log_z)
            parts["log_probs"].append(label_logits - log_z)
            # H = log Z - E[logit], both relative to the largest logit.
            if "entropy" in wanted:
                parts["entropy"].append(total.log() - torch.linalg.vecdot(odds, below_top) / total)
            if "log_sum_sq_probs" in wanted:
                parts["log_sum_sq_probs"].append(torch.linalg.vecdot(odds, odds).log() - 2 * total.log())
            if frozen and ctx.needs_input_grad[0]:
                # With a frozen head, d log p / d hidden is computed here, so that the backward pass needs no logits.
                expected = (odds.div_(total.unsqueeze(1)).to(projection.dtype) @ projection).float()
                parts["gradient"].append(projection[targets].float() - expected)
        results = {name: torch.cat(values) for name, values in parts.items() if values}
        if "gradient" in results:
            ctx.save_for_backward(results["gradient"])
        else:
            # The backward pass projects again: kept, the chunks' logits would be the whole matrix.
            ctx.save_for_backward(hidden, weight, bias, labels, results["log_z"])
        ctx.frozen, ctx.size, ctx.dtype, ctx.hidden_dtype = frozen, size, projection.dtype, hidden.dtype
        statistics = tuple(results.get(name) for name in STATISTICS)
        ctx.mark_non_differentiable(*(value for value in statistics if value is not None))
        return (results["log_probs"], *statistics)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        if ctx.frozen:
            (per_token,) = ctx.saved_tensors
            return (gradient.unsqueeze(1) * per_token).to(ctx.hidden_dtype), None, None, None, None
        hidden, weight, bias, labels, log_z = ctx.saved_tensors
        with maybe_gather_lm_head_ctx(weight, bias):
            projection = weight.to(ctx.dtype)
            to_hidden = torch.empty_like(hidden)
            to_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            to_bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if bias is not None else None
            buffer = _buffer(hidden, weight, ctx.size)
            chunks = (tensor.split(ctx.size) for tensor in (hidden, labels, log_z, gradient.float(), to_hidden))
            for index, (states, targets, normaliser, upstream, target) in enumerate(zip(*chunks, strict=True)):
                # -d log p / d logits: probabilities minus the one-hot label. The upstream gradient is one number per token, so
                # the narrow factors (hidden size) are scaled by it instead of the logits (vocabulary size).
                logits = _logits(states, projection, bias, out=buffer[: len(states)])
                excess = logits.sub_(normaliser.unsqueeze(1)).exp_()
                excess.scatter_add_(1, targets.unsqueeze(1), excess.new_full((len(states), 1), -1.0))
                weights = -upstream.unsqueeze(1)
                if to_bias is not None:
                    to_bias += (excess.t() @ weights).squeeze(1)
                excess = excess.to(ctx.dtype)
                target.copy_((excess @ projection) * weights)
                _add_product(to_weight, excess.t(), (states * weights).to(ctx.dtype), first=index == 0)
        bias_gradient = to_bias.to(bias.dtype) if to_bias is not None else None
        return to_hidden, to_weight.to(weight.dtype), bias_gradient, None, None


STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def _dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _buffer(hidden: Tensor, weight: Tensor, size: int) -> Tensor:
    """Allocate the logits of a chunk."""
    return torch.empty(min(size, len(hidden)), len(weight), dtype=torch.float32, device=hidden.device)


def _logits(states: Tensor, projection: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if projection.dtype == torch.float32:
        torch.mm(states, projection.t(), out=out)
    else:
        out.copy_(states.to(projection.dtype) @ projection.t())
    return out if bias is None else out.add_(bias.float())


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Set total = left @ right for the first chunk, add left @ right for others; total is float32."""
    if left.dtype == torch.float32:
        # With beta=0 torch ignores what the uninitialised memory holds, NaN included.
        total.addmm_(left, right, beta=0.0 if first else 1.0)
    elif first:
        total.copy_(left @ right)
    else:
        total += left @ right


def token_outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, wanted: tuple[str, ...] = ()
) -> TokenOutputs:
    """Score `labels` under the distributions that `hidden` projects to.

    Args:
        hidden: shape (N, H).
        weight: of the head, shape (V, H); bias: shape (V,) or None.
        labels: shape (N,).
        wanted: statistics beside the log-probabilities, fields of `TokenOutputs`, without gradient.
    """
    values = _TokenLogps.apply(hidden, weight, bias, labels, wanted)
    return TokenOutputs(values[0], **dict(zip(STATISTICS, values[1:], strict=True)))


def scores_tokens(model: Any) -> bool:
    """Return whether `add_token_scores` was applied to the model."""
    return "has_token_scores" in model.__dict__


def add_token_scores(model: Any) -> None:
    """Make `model(..., scored_positions=positions, labels=labels)` return `TokenOutputs` of a row; idempotent.

    Other calls of the model are unchanged. Scoring is part of the model's `forward`, since wrappers such as DDP hook into it.

    Args:
        model: a causal language model of transformers; under PEFT the base model.
    """
    if scores_tokens(model):
        return
    model.whole_forward = model.forward  # on the model, so that a copy of it uses the copy's weights
    scale = _logit_scale(model.config.get_text_config())

    def forward(
        self: Any, *args: Any, scored_positions: Tensor | None = None, wanted: tuple[str, ...] = (), **kwargs: Any
    ) -> Any:
        if scored_positions is None:
            return self.whole_forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        states = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state[0]
        head = self.get_output_embeddings()
        if hasattr(head, "unshard"):
            head.unshard()  # FSDP2 does so in the module's forward, which isn't called here
        with maybe_gather_lm_head_ctx(head.weight, head.bias):
            return token_outputs(states[scored_positions] * scale, _whole(head.weight), _whole(head.bias), labels, wanted)

    # `generate` validates its arguments against the original signature.
    forward.__wrapped__ = type(model).forward  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
    model.has_token_scores = True


def _whole(tensor: Any) -> Any:
    """Gather a sharded parameter (FSDP2's DTensor)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _logit_scale(config: Any) -> float:
    """Return the factor of the model's logits; its name in the config depends on the model family."""
    # The names, and their order, of TRL's `add_fused_lm_head`.
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type.startswith("hyperclovax") else 1 / float(scaling)  # Granite's divides
