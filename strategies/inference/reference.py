"""The reference policy: loading it, and its forward pass beside the policy's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from strategies.models.adapter_start import keeps_base
from strategies.models.loading import continue_adapter, load_model
from strategies.models.tokenizer import check_reads_tokens
from strategies.packing.support import is_divided

__all__ = [
    "as_reference",
    "load_reference",
    "load_reference_alone",
    "placeholder_reference",
    "reference_forward",
    "reference_model",
]


def load_reference(cfg: Any, model: Any, tokenizer: Any = None) -> PreTrainedModel | None:
    """Return the reference model, frozen and in evaluation mode, or None if the policy contains it.

    * `reference_model` set: that model.
    * a new adapter: None, the reference is the policy with its adapter disabled; a copy of the model if the adapter changes
      the base's own weights, as PiSSA does.
    * a continued adapter: None, the trainer keeps a frozen copy of the initial adapter.
    * full fine-tuning: a copy of the current policy; loaded again if its weights are already partitioned.
    """
    if cfg.reference_model is not None:
        return _other_model(cfg, tokenizer)
    # PiSSA and OLoRA subtract a product from the base as the adapter is made: without it, less than the base is left.
    is_new = cfg.lora_model_dir is None and not isinstance(model, PeftModel)
    changes_base = is_new and cfg.peft_init_lora_weights is not None and not keeps_base(cfg.peft_init_lora_weights)
    if (cfg.adapter is not None and not changes_base) or isinstance(model, PeftModel):
        return None
    if is_divided(model):
        return _freeze(load_model(cfg, tokenizer))
    reference = copy.deepcopy(model)
    # An earlier trainer may have replaced the instance's forward by one that is bound to the original's weights.
    for name in ("forward", "has_token_scores"):
        reference.__dict__.pop(name, None)
    return _freeze(reference)


def load_reference_alone(cfg: Any, tokenizer: Any = None) -> PreTrainedModel:
    """Load the reference on its own, frozen and in evaluation mode.

    `reference_model` if it is set; else the policy before its first step: the base model, with the adapter of
    `lora_model_dir` if one is continued (unmerged: merging would round).

    Raises:
        ValueError: as `load_model`, `check_reads_tokens` and `continue_adapter`.
    """
    if cfg.reference_model is not None:
        return _other_model(cfg, tokenizer)
    model = load_model(cfg, tokenizer)
    if cfg.lora_model_dir is not None:
        model = continue_adapter(cfg, model)
    return _freeze(model)


def _other_model(cfg: Any, tokenizer: Any) -> PreTrainedModel:
    if tokenizer is not None:
        check_reads_tokens(cfg, tokenizer, cfg.reference_model)
    return _freeze(load_model(cfg, tokenizer, key="reference_model"))


def _freeze(model: PreTrainedModel) -> PreTrainedModel:
    return model.requires_grad_(False).eval()


def placeholder_reference() -> PreTrainedModel:
    """Return a model of a few hundred weights, for constructors that require a reference where none is used."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    # The weights are drawn; the run's random state stays as it is without a placeholder.
    with torch.random.fork_rng(devices=[]):
        return _freeze(LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=1, pad_token_id=0, **size)))


def as_reference(trainer: Any) -> tuple[Any, AbstractContextManager[Any]]:
    """Return the unwrapped model that acts as the reference, and the context in which it does."""
    # First: a policy with an adapter may have a reference model beside it, such as `reference_model`.
    if trainer.ref_model is not None:
        return trainer.accelerator.unwrap_model(trainer.ref_model), nullcontext()
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(policy, PeftModel):
        raise ValueError("reference_model: this trainer has no reference policy")
    # TRL names its frozen copy of a continued adapter "ref" (`DPOTrainer.__init__`).
    return policy, use_adapter(policy, "ref" if "ref" in policy.peft_config else None)


@contextmanager
def reference_model(trainer: Any) -> Iterator[Any]:
    """Context that yields the model to call for the reference's outputs."""
    # As TRL: the prepared reference, not the unwrapped one, since a sharded model needs its wrapper.
    _, context = as_reference(trainer)
    args = trainer.args
    checkpointing: AbstractContextManager[Any] = nullcontext()
    # As TRL: under `no_grad`, reentrant checkpointing warns that no input requires a gradient.
    if args.gradient_checkpointing:
        checkpointing = disable_gradient_checkpointing(trainer.model, args.gradient_checkpointing_kwargs)
    with checkpointing, context:
        yield trainer.ref_model if trainer.ref_model is not None else trainer.model


def reference_forward(trainer: Any, run: Callable[[Any], Any]) -> torch.Tensor:
    """Return token log-probabilities of the reference, shape (sequences, tokens), without gradient.

    Args:
        run: runs a forward of the model that it is given; returns outputs with `log_probs`.
    """
    with torch.no_grad(), reference_model(trainer) as model:
        return run(model).log_probs
