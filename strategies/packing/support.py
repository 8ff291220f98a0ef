"""Support of packed rows: check a model, prepare it, run a row."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from strategies.compat import attention_of, supports_sdpa
from strategies.packing.attention import PACKED_ATTENTION, Blocks, register
from strategies.packing.head import TokenOutputs, add_token_scores
from strategies.packing.layout import RowTokens, pack, pair_tokens
from strategies.vision.processing import VisionProcessing

__all__ = [
    "RowScorer",
    "completion_logps",
    "drops_attention",
    "is_divided",
    "is_exact",
    "prepare_packing",
    "score_row",
    "try_packing",
    "why_not_packed",
]

PROBES = (([5, 7, 2], [3, 4, 6, 8], [9, 1]), ([2, 8], [1, 7], [6, 5, 3]))
"""Prompt, chosen and rejected of the pairs that a model is tested with."""
TOLERANCE = {True: 3e-5, False: 2e-2}
"""Tolerance of log-probabilities, relative to the largest, by whether products are exact to float32. Measured: models that
support packing differ by 3e-7 (tiny ones) to 3e-6 (30 layers); one that ignores positions by 1.5e-4 with fresh weights, the
hardest case."""


def why_not_packed(model: Any, longest: int, vision: VisionProcessing | None = None) -> str | None:
    """Return why a model can't take packed rows, as a phrase; None if it can.

    First by its config. Then two tiny pairs are scored packed and separately, so that no model is trained on rows that it
    computes wrongly; for a model with partitioned weights `try_packing` does this later.

    Args:
        model: isn't run where its base has `is_known_to_pack`: another adapter on the same weights has been tested.
        longest: tokens of the longest sequence; a wider sliding window has no effect.
        vision: where rows have pictures; the tiny pairs then have one each.

    Raises:
        ValueError: for a model whose log-probabilities aren't finite.
    """
    base = _base_model(model)
    config = base.config.get_text_config()
    if not supports_sdpa(base):
        return f"{config.model_type} has an attention of its own"
    attention = attention_of(config)
    if attention not in ("sdpa", "flex_attention", PACKED_ATTENTION):
        return f"attn_implementation: {attention} doesn't take the mask"
    # Recurrent and convolutional layers carry states from pair to pair, whatever the mask is.
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if others := layers - {"full_attention", "sliding_attention"}:
        return f"{config.model_type} has layers of {', '.join(sorted(others))}"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and longest > window:
        return f"its attention window of {window} tokens is shorter than sequences of {longest}"
    if vision is not None and "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        return f"pictures have positions of three dimensions in {config.model_type}"
    if (kind := _moving_rope(config, longest)) is not None:
        return f"its rotary embedding ({kind}) changes for all pairs of a row where one is longer than it was trained for"
    # `token_outputs` has no cap.
    if getattr(config, "final_logit_softcapping", None) is not None:
        return f"{config.model_type} caps its logits"
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "virtual prompt tokens stand before a whole row"
    if isinstance(base.get_output_embeddings(), BaseTunerLayer | TrainableTokensWrapper):
        return "its output head has an adapter"
    # Its rejected completions would continue the chosen ones' positions.
    if "position_ids" not in inspect.signature(base.base_model.forward).parameters:
        return f"{config.model_type} takes no positions"
    if any(drops_attention(module) for module in base.modules()) and base.device.type == "cuda":
        return f"{config.model_type} drops attention out, and FlexAttention doesn't (disable_dropout)"
    if is_divided(model) or (vision is None and getattr(base, "is_known_to_pack", False)):
        return None
    training = model.training
    # Dropout would make two forwards differ.
    model.eval()
    try:
        reason = _find_difference(model, one_by_one=lambda pair: completion_logps(model, *pair, vision), vision=vision)
    finally:
        model.train(training)
    # Padded batches run with the attention that the config asks for.
    if reason is not None:
        _set_attention(base, attention)
    return reason


def is_divided(model: Any) -> bool:
    """Return whether this process holds only a part of the weights: ZeRO-3 partitions them while they are loaded."""
    parameters = _base_model(model).parameters()
    return any(parameter.is_meta or (hasattr(parameter, "ds_id") and parameter.numel() == 0) for parameter in parameters)


def is_exact(model: Any) -> bool:
    """Return whether the model's products are exact to float32."""
    if model.dtype != torch.float32 or getattr(model, "is_quantized", False):
        return False
    # `torch.get_float32_matmul_precision` raises if the precision was set per backend.
    return model.device.type == "cpu" or not torch.backends.cuda.matmul.allow_tf32


def try_packing(model: Any) -> str | None:
    """Test packed rows as `why_not_packed`, on a model with partitioned weights after `prepare_packing`.

    Every rank must call it.

    Args:
        model: wrapped by DeepSpeed.
    """
    training = model.training
    model.eval()
    try:
        return _find_difference(model.module, wrapped=model)
    finally:
        model.empty_partition_cache()  # releases weights prefetched for a backward pass
        model.train(training)


def prepare_packing(model: Any) -> None:
    """Prepare a model for packed rows, without an effect on other inputs; idempotent."""
    register()
    base = _base_model(model)
    _set_attention(base, PACKED_ATTENTION)
    add_token_scores(base)


def _set_attention(base: Any, attention: str) -> None:
    """Set the attention of the text model; a tower of pictures keeps its own."""
    text = base.config.get_text_config()
    keys = [key for key in base.config.sub_configs if getattr(base.config, key) is text]
    base.set_attn_implementation({keys[0]: attention} if keys else attention)


class RowScorer(ABC):
    """Runs packed rows in place of a model, each forward followed by its backward."""

    @abstractmethod
    def score(self, row: RowTokens, wanted: tuple[str, ...]) -> TokenOutputs:
        """Return what `score_row` does; gradients end at the log-probabilities, which are a leaf."""

    @abstractmethod
    def backward(self, is_last: bool) -> None:
        """Continue the backward pass from the leaf's gradient to the model's weights.

        Args:
            is_last: of the step: then gradients are exchanged between workers.
        """


def score_row(
    model: Any, row: RowTokens, wanted: tuple[str, ...] = (), pictures: dict[str, Tensor] | None = None
) -> TokenOutputs:
    """Run a packed row through a prepared model (`prepare_packing`), wrapped (DDP, PEFT) or not, or a `RowScorer`.

    Args:
        wanted: statistics beside the log-probabilities, fields of `TokenOutputs`.
        pictures: the model's inputs for the pictures of the row, in the order of their tokens.
    """
    if isinstance(model, RowScorer):
        return model.score(row, wanted)
    blocks = Blocks(row.segments, row.input_ids.device)
    return model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        # FlexAttention has its own format; on a CPU a model that doesn't pass `packed` on still gets the full mask.
        attention_mask=blocks.block_mask if row.input_ids.is_cuda else blocks.dense_mask,
        packed=blocks,
        scored_positions=row.scored_positions,
        labels=row.labels,
        wanted=wanted,
        **(pictures or {}),
    )


def _moving_rope(config: Any, longest: int) -> str | None:
    """Return the type of a rotary embedding whose frequencies depend on the longest position of a forward, or None."""
    parameters = getattr(config, "rope_parameters", None) or {}
    ropes = [parameters] if "rope_type" in parameters else [part for part in parameters.values() if isinstance(part, dict)]
    for rope in ropes:
        trained = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None) or longest
        if rope.get("rope_type") in ("dynamic", "longrope") and longest > trained:
            return rope["rope_type"]
    return None


def _base_model(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def drops_attention(module: Any) -> bool:
    """Return whether a module is an attention that drops weights out in training."""
    if "Attention" not in type(module).__name__:
        return False
    rates = [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
    rates += [child.p for name, child in module.named_children() if "attn" in name and isinstance(child, torch.nn.Dropout)]
    return any(rate > 0 for rate in rates)


Sequence = tuple[list[int], list[int]]
"""A prompt and a completion."""


def _find_difference(
    model: Any,
    one_by_one: Callable[[Sequence], Tensor] | None = None,
    wrapped: Any = None,
    vision: VisionProcessing | None = None,
) -> str | None:
    """Score tiny pairs packed and separately; return a phrase on the difference, None if there is none."""
    base = _base_model(model)
    vocabulary = base.config.get_text_config().vocab_size
    pairs = [[[token % vocabulary for token in ids] for ids in probe] for probe in PROBES]
    pixels: dict[str, Tensor] = {}
    if vision is not None:
        blank, image = vision.blank()
        pairs = [[[*blank, *prompt], *completions] for prompt, *completions in pairs]
        pixels = {name: tensor.to(base.device) for name, tensor in vision.pixels([image] * len(pairs)).items()}
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in pairs]
    row = pack([pair_tokens(row) for row in rows]).to(base.device)
    sequences = [(pair[0], pair[side]) for side in (1, 2) for pair in pairs]
    try:
        with torch.no_grad():
            if one_by_one is not None:
                expected = torch.cat([one_by_one(sequence) for sequence in sequences])
                prepare_packing(model)
                packed = score_row(model, row, pictures=pixels).log_probs
            else:
                # In this order, once each: DeepSpeed prefetches weights in the order of the last forward if that equals the
                # one before it, and a packed row doesn't call the head as a module.
                packed = score_row(wrapped, row).log_probs
                expected = torch.cat(_together(wrapped, sequences, base.device))
    except Exception as error:  # noqa: BLE001 - a model's code may raise anything on a row that it doesn't know
        reason = next(iter(str(error).splitlines()), "")
        return f"{base.config.model_type} can't run a packed row ({type(error).__name__}: {reason})"
    if not expected.isfinite().all():
        raise ValueError(
            f"{base.name_or_path or base.config.model_type}: the model gives log-probabilities that aren't finite; "
            "its weights are damaged, or don't suit its precision"
        )
    difference = ((expected - packed).abs().max() / expected.abs().max()).item()
    # Written so that NaN fails too.
    if not difference <= TOLERANCE[is_exact(base)]:
        return f"{base.config.model_type} scores packed rows otherwise than single ones (by {difference:.1%})"
    return None


def _together(model: Any, sequences: list[Sequence], device: torch.device) -> list[Tensor]:
    """Return `completion_logps` of each sequence, by one padded forward."""
    ids = pad_sequence([torch.tensor(prompt + completion) for prompt, completion in sequences], batch_first=True).to(device)
    lengths = torch.tensor([len(prompt) + len(completion) for prompt, completion in sequences], device=device)
    attended = torch.arange(ids.shape[1], device=device) < lengths.unsqueeze(1)
    logits = model(input_ids=ids, attention_mask=attended.long(), use_cache=False).logits
    parts = zip(logits, ids, lengths.tolist(), sequences, strict=True)
    return [_logps(row[None, :end], tokens[None, :end], max(len(prompt), 1)) for row, tokens, end, (prompt, _) in parts]


def completion_logps(model: Any, prompt: list[int], completion: list[int], vision: VisionProcessing | None = None) -> Tensor:
    """Return log-probabilities of one completion by a plain forward, shape (predicted tokens,).

    Args:
        vision: where the prompt begins with a blank picture.
    """
    ids = torch.tensor([prompt + completion], device=model.device)
    first = max(len(prompt), 1)
    base = _base_model(model)
    pictures = {}
    if vision is not None:
        pictures = {name: tensor.to(model.device) for name, tensor in vision.pixels([vision.blank()[1]]).items()}
        pictures |= dict.fromkeys(vision.token_types, (ids == vision.image_token).long())
    # The class's forward: a trainer may have replaced the instance's by one of another precision.
    return _logps(type(base).forward(base, input_ids=ids, use_cache=False, **pictures).logits, ids, first)


def _logps(logits: Tensor, ids: Tensor, first: int) -> Tensor:
    """Return log-probabilities of a sequence's tokens from index `first`: logits of shape (1, T, V), ids of (1, T)."""
    return logits[0, first - 1 : -1].float().log_softmax(dim=-1).gather(1, ids[0, first:].unsqueeze(1)).squeeze(1)
