"""Log-probabilities of single tokens, without the logits of all of them.

TRL's head does this too. This one scores only the tokens that are asked for, on every device (TRL's projects prompts and
padding as well where there is no Triton), in pieces that suit a cache, and under a frozen head it projects twice instead of
four times. `benchmarks/utilisation.py` compares them.
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
"""Logits that are held at once: 128 MiB in float32."""


@dataclass
class TokenOutputs(ModelOutput):
    """Of N tokens, each tensor of shape (N,); those without gradient are None unless they were asked for.

    A `ModelOutput`, so that wrappers which hook into the backward pass (DeepSpeed, FSDP2) find the tensors in it.
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
        parts: dict[str, list[Tensor]] = {name: [] for name in ("log_probs", "log_z", *STATISTICS, "gradient")}
        for states, targets in zip(hidden.split(size), labels.split(size), strict=True):
            logits = _logits(states, projection, bias)
            top = logits.max(dim=1)
            label_logits = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
            if "mean_logits" in wanted:
                parts["mean_logits"].append(logits.mean(dim=1))
            if "is_top1" in wanted:
                parts["is_top1"].append(top.indices == targets)
            if "entropy" in wanted:
                kept = logits.clone()
            odds = logits.sub_(top.values.unsqueeze(1)).exp_()
            total = odds.sum(dim=1)
            log_z = top.values + total.log()
            parts["log_z"].append(log_z)
            parts["log_probs"].append(label_logits - log_z)
            if "entropy" in wanted:
                parts["entropy"].append(log_z - torch.linalg.vecdot(odds, kept) / total)
            if "log_sum_sq_probs" in wanted:
                parts["log_sum_sq_probs"].append(torch.linalg.vecdot(odds, odds).log() - 2 * total.log())
            if frozen and ctx.needs_input_grad[0]:
                # d log p / d hidden, so that the backward pass needs no logits.
                expected = (odds.div_(total.unsqueeze(1)).to(projection.dtype) @ projection).float()
                parts["gradient"].append(projection[targets].float() - expected)
        found = {name: torch.cat(values) for name, values in parts.items() if values}
        if "gradient" in found:
            ctx.save_for_backward(found["gradient"])
        else:
            ctx.save_for_backward(hidden, weight, bias, labels, found["log_z"])
        ctx.frozen, ctx.size, ctx.dtype, ctx.hidden_dtype = frozen, size, projection.dtype, hidden.dtype
        statistics = tuple(found.get(name) for name in STATISTICS)
        ctx.mark_non_differentiable(*(value for value in statistics if value is not None))
        return (found["log_probs"], *statistics)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        if ctx.frozen:
            (per_token,) = ctx.saved_tensors
            return (gradient.unsqueeze(1) * per_token).to(ctx.hidden_dtype), None, None, None, None
        hidden, weight, bias, labels, log_z = ctx.saved_tensors
        with maybe_gather_lm_head_ctx(weight, bias):
            projection = weight.to(ctx.dtype)
            to_hidden = torch.empty_like(hidden)
            to_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            to_bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if bias is not None else None
            pieces = (tensor.split(ctx.size) for tensor in (hidden, labels, log_z, gradient, to_hidden))
            for states, targets, normaliser, upstream, target in zip(*pieces, strict=True):
                change = _logits(states, projection, bias).sub_(normaliser.unsqueeze(1)).exp_()
                change.mul_(-upstream.unsqueeze(1)).scatter_add_(1, targets.unsqueeze(1), upstream.unsqueeze(1))
                if to_bias is not None:
                    to_bias += change.sum(dim=0)
                change = change.to(ctx.dtype)
                target.copy_(change @ projection)
                _add_product(to_weight, change.t(), states.to(ctx.dtype))
        bias_gradient = to_bias.to(bias.dtype) if to_bias is not None else None
        return to_hidden, to_weight.to(weight.dtype), bias_gradient, None, None


STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def _dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _logits(states: Tensor, projection: Tensor, bias: Tensor | None) -> Tensor:
    logits = (states.to(projection.dtype) @ projection.t()).float()
    return logits if bias is None else logits.add_(bias.float())


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where total is float32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
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
        wanted: statistics beside the log-probabilities, fields of `TokenOutputs`; they carry no gradient.
    """
    values = _TokenLogps.apply(hidden, weight, bias, labels, wanted)
    return TokenOutputs(values[0], **dict(zip(STATISTICS, values[1:], strict=True)))


def scores_tokens(model: Any) -> bool:
    """Whether `add_token_scores` has been here."""
    return "_scores_tokens" in model.__dict__


def add_token_scores(model: Any) -> None:
    """Let `model(..., scored_positions=positions, labels=labels)` return `TokenOutputs` of a row; idempotent.

    Everything else about the model stays as it is. The scoring goes through the model's own `forward`, for wrappers such as
    DDP hook into it.

    Args:
        model: a causal language model of transformers; under PEFT the base model.
    """
    if scores_tokens(model):
        return
    inner = model.forward
    scale = _logit_scale(model.config.get_text_config())

    def forward(
        self: Any, *args: Any, scored_positions: Tensor | None = None, wanted: tuple[str, ...] = (), **kwargs: Any
    ) -> Any:
        if scored_positions is None:
            return inner(*args, **kwargs)
        labels = kwargs.pop("labels")
        states = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state[0]
        head = self.get_output_embeddings()
        if hasattr(head, "unshard"):
            head.unshard()  # FSDP2 does so before a module's own forward, which isn't called here
        with maybe_gather_lm_head_ctx(head.weight, head.bias):
            return token_outputs(states[scored_positions] * scale, _whole(head.weight), _whole(head.bias), labels, wanted)

    # `generate` validates its arguments against the signature.
    forward.__wrapped__ = type(model).forward  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
    model._scores_tokens = True


def _whole(tensor: Any) -> Any:
    """A sharded parameter (FSDP2's DTensor) in full."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _logit_scale(config: Any) -> float:
    """What the model multiplies its logits by; the names are those of the model families."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)
    return 1.0 if divisor is None else 1 / float(divisor)
