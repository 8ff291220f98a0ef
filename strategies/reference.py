"""The reference policy: what it is, and its forward pass beside the policy's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from strategies.models import continue_adapter, load_model

__all__ = [
    "as_reference",
    "load_reference",
    "load_reference_alone",
    "placeholder_reference",
    "reference_forward",
    "reference_model",
]


def load_reference(cfg: Any, model: Any, tokenizer: Any = None) -> PreTrainedModel | None:
    """Return the reference model, frozen and in evaluation mode, or None where the policy holds it itself.

    * `reference_model` set: that model.
    * a new adapter: None, the reference is the policy with its adapter switched off.
    * a continued adapter: None, the trainer keeps a frozen copy of the adapter as it was.
    * full fine-tuning: a copy of the policy as it is now.
    """
    if cfg.reference_model is not None:
        return _freeze(load_model(cfg, tokenizer, key="reference_model"))
    if cfg.adapter is not None or isinstance(model, PeftModel):
        return None
    reference = copy.deepcopy(model)
    # A trainer that had this model before left its own forward on it, which is bound to the original's weights.
    for name in ("forward", "_scores_tokens"):
        reference.__dict__.pop(name, None)
    return _freeze(reference)


def load_reference_alone(cfg: Any, tokenizer: Any = None) -> PreTrainedModel:
    """Return the reference without a policy beside it, frozen and in evaluation mode.

    `reference_model` where it is set; else the policy as it is before its first step: the base model, with the adapter of
    `lora_model_dir` where one is continued (unmerged: merging would round).

    Raises:
        ValueError: as `load_model` and `continue_adapter`.
    """
    if cfg.reference_model is not None:
        return _freeze(load_model(cfg, tokenizer, key="reference_model"))
    model = load_model(cfg, tokenizer)
    if cfg.lora_model_dir is not None:
        model = continue_adapter(cfg, model)
    return _freeze(model)


def _freeze(model: PreTrainedModel) -> PreTrainedModel:
    return model.requires_grad_(False).eval()


def placeholder_reference() -> PreTrainedModel:
    """A model of a few hundred weights, for constructors that want a reference where none is used."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        return _freeze(LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=1, pad_token_id=0, **size)))


def as_reference(trainer: Any) -> tuple[Any, AbstractContextManager[Any]]:
    """Return the unwrapped model that answers as the reference, and the context in which it does."""
    if trainer.ref_model is not None:
        return trainer.accelerator.unwrap_model(trainer.ref_model), nullcontext()
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(policy, PeftModel):
        raise ValueError("reference_model: this trainer has no reference policy")
    return policy, use_adapter(policy, "ref" if "ref" in policy.peft_config else None)


@contextmanager
def reference_model(trainer: Any) -> Iterator[Any]:
    """The model to call for the reference's answers, within the context in which it gives them."""
    # Like TRL, call the prepared reference, not the unwrapped one: a sharded model needs its wrapper.
    _, context = as_reference(trainer)
    args = trainer.args
    checkpointing: AbstractContextManager[Any] = nullcontext()
    if args.gradient_checkpointing:
        checkpointing = disable_gradient_checkpointing(trainer.model, args.gradient_checkpointing_kwargs)
    with checkpointing, context:
        yield trainer.ref_model if trainer.ref_model is not None else trainer.model


def reference_forward(trainer: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """Token log-probabilities of the reference, shape (sequences, tokens), without gradient.

    Args:
        arguments: of the model, with `use_cache` False and `labels` that are -100 outside the completions.
    """
    with torch.no_grad(), reference_model(trainer) as model:
        return model(**arguments, fused_lm_head=True).log_probs
