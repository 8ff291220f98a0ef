"""Which models can be trained on packed rows, and making them ready."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from strategies.packing.attention import PACKED_ATTENTION, Blocks, register
from strategies.packing.head import TokenOutputs, add_token_scores
from strategies.packing.layout import PackedRow, pack, pair_tokens

__all__ = ["completion_logps", "prepare_packing", "score_row", "why_not_packed"]

PROBES = (([5, 7, 2], [3, 4, 6, 8], [9, 1]), ([2, 8], [1, 7], [6, 5, 3]))
"""Prompt, chosen and rejected of the pairs by which a model is tried out."""
TOLERANCE = {True: 3e-5, False: 2e-2}
"""Of a log-probability, relative to the largest, by whether products are exact to float32. Measured: models that pack are off
by 3e-7 (tiny ones) to 3e-6 (30 layers); one that ignores positions by 1.5e-4 with fresh weights, the hardest case."""


def why_not_packed(model: Any, longest: int) -> str | None:
    """The reason why a model can't take packed rows, as a phrase; None where it can.

    What its config says comes first; then two tiny pairs are scored packed and apart, so that no model is ever trained on
    rows that it misunderstands.

    Args:
        longest: tokens of the longest sequence; a sliding window that is wider never closes.

    Raises:
        ValueError: for a model whose log-probabilities aren't finite.
    """
    base = _base_model(model)
    config = base.config.get_text_config()
    if not base._supports_sdpa:
        return f"{config.model_type} has an attention of its own"
    asked = config._attn_implementation
    if asked not in ("sdpa", "flex_attention", PACKED_ATTENTION):
        return f"attn_implementation: {asked} doesn't take the mask"
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if others := layers - {"full_attention", "sliding_attention"}:
        return f"{config.model_type} has layers of {', '.join(sorted(others))}"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and longest > window:
        return f"its attention window of {window} tokens is shorter than sequences of {longest}"
    if (kind := _moving_rope(config, longest)) is not None:
        return f"its rotary embedding ({kind}) changes for all pairs of a row where one is longer than it was trained for"
    if getattr(config, "final_logit_softcapping", None) is not None:
        return f"{config.model_type} caps its logits"
    if getattr(config, "output_router_logits", False):
        return f"the router loss of {config.model_type} is computed of padded batches"
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "virtual prompt tokens stand before a whole row"
    if isinstance(base.get_output_embeddings(), BaseTunerLayer):
        return "its output head has an adapter"
    if "position_ids" not in inspect.signature(base.base_model.forward).parameters:
        return f"{config.model_type} takes no positions"
    return _probe(model)


def prepare_packing(model: Any) -> None:
    """Make a model ready for packed rows; what else it does stays the same. Idempotent."""
    register()
    base = _base_model(model)
    base.set_attn_implementation(PACKED_ATTENTION)
    add_token_scores(base)


def score_row(model: Any, row: PackedRow, wanted: tuple[str, ...] = ()) -> TokenOutputs:
    """Run a packed row through a model that `prepare_packing` made ready, wrapped (DDP, PEFT) or not.

    Args:
        wanted: statistics beside the log-probabilities, fields of `TokenOutputs`.
    """
    blocks = Blocks(row.segments, row.input_ids.device)
    return model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        # FlexAttention takes its own; on a CPU a model that doesn't pass `packed` on still gets the whole mask.
        attention_mask=blocks.block_mask if row.input_ids.is_cuda else blocks.dense_mask,
        packed=blocks,
        scored_positions=row.scored_positions,
        labels=row.labels,
        wanted=wanted,
    )


def _moving_rope(config: Any, longest: int) -> str | None:
    """The kind of a rotary embedding whose frequencies depend on the longest position of a forward, if there can be such."""
    given = getattr(config, "rope_parameters", None) or {}
    each = [given] if "rope_type" in given else [part for part in given.values() if isinstance(part, dict)]
    for rope in each:
        trained = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None) or longest
        if rope.get("rope_type") in ("dynamic", "longrope") and longest > trained:
            return rope["rope_type"]
    return None


def _base_model(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _probe(model: Any) -> str | None:
    base = _base_model(model)
    if any(parameter.numel() == 0 or parameter.is_meta for parameter in base.parameters()):
        return None  # sharded while it was loaded: what the config says must do
    was, training = base.config._attn_implementation, model.training
    vocabulary = base.config.get_text_config().vocab_size
    pairs = [[[token % vocabulary for token in ids] for ids in probe] for probe in PROBES]
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in pairs]
    row = pack([pair_tokens(row) for row in rows]).to(base.device)
    model.eval()
    try:
        with torch.no_grad():
            apart = [completion_logps(model, pair[0], pair[side]) for side in (1, 2) for pair in pairs]
            prepare_packing(model)
            packed = score_row(model, row).log_probs
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        base.set_attn_implementation(was)
        return f"{base.config.model_type} can't run a packed row ({type(error).__name__}: {str(error).splitlines()[0]})"
    finally:
        model.train(training)
    expected = torch.cat(apart)
    if not expected.isfinite().all():
        raise ValueError(
            f"{base.name_or_path or base.config.model_type}: the model gives log-probabilities that aren't finite; "
            "its weights are damaged, or don't suit its precision"
        )
    difference = ((expected - packed).abs().max() / expected.abs().max()).item()
    exact = base.dtype == torch.float32 and (row.input_ids.is_cpu or torch.get_float32_matmul_precision() == "highest")
    if not difference <= TOLERANCE[exact]:
        base.set_attn_implementation(was)
        return f"{base.config.model_type} scores packed rows otherwise than single ones (by {difference:.1%})"
    return None


def completion_logps(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """Log-probabilities of one completion alone, as any model gives them, shape (tokens that something predicts,)."""
    ids = torch.tensor([prompt + completion], device=model.device)
    first = max(len(prompt), 1)
    base = _base_model(model)
    # The model's own forward: a trainer may have put one on it that computes in another precision.
    logps = type(base).forward(base, input_ids=ids, use_cache=False).logits[0, first - 1 : -1].float().log_softmax(dim=-1)
    return logps.gather(1, ids[0, first:].unsqueeze(1)).squeeze(1)
