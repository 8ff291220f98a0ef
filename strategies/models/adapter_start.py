"""Effects of a new adapter's initialisation on its base model, measured on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["added_as_it_is", "check_new", "check_repeatable", "keeps_base"]

Init = bool | str
SIZE = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 16}


NEED_DATA = ("corda", "eva")
"""Initialisations that PEFT computes from activations on some data, which are not available here."""


def check_new(init: Init) -> None:
    """Check that the policy with a new adapter starts at its reference.

    Args:
        init: `init_lora_weights` of the adapter's config.

    Raises:
        ValueError: if it doesn't, if PEFT doesn't know the initialisation, or if it needs data.
    """
    # By name: without its data PEFT creates an eva adapter all the same, and leaves A as torch initialises a Linear.
    if init in NEED_DATA:
        raise ValueError(f"peft_init_lora_weights: {init!r} can't be used: it needs data first, and is given none here")
    if isinstance(init, str) and init.lower() != "true" and _weights(init) == _weights(True):
        raise ValueError(f"peft_init_lora_weights: {init!r} does no more than true here: what it needs besides isn't given")
    base, _, on = _outputs(init)
    # Not exactly: PiSSA, for example, subtracts the adapter's product from the weights and adds it in a forward, with rounding.
    if not torch.allclose(base, on, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"peft_init_lora_weights: {init!r} draws weights that change the policy before its first step, and a reference is "
            "the policy as it was then; write true, or gaussian"
        )


def keeps_base(init: Init) -> bool:
    """Return whether the base weights stay unchanged: PiSSA and OLoRA, for example, subtract a product from them.

    Raises:
        ValueError: if PEFT can't create the adapter.
    """
    base, off, _ = _outputs(init)
    # Exactly: with its adapter disabled, a PEFT layer computes its base layer alone.
    return torch.equal(base, off)


def check_repeatable(init: Init) -> None:
    """Check that an adapter changes its base's weights reproducibly, so that it can be loaded onto the base again.

    Raises:
        ValueError: a phrase; the caller adds which adapter.
    """
    if not torch.equal(_outputs(init)[1], _outputs(init, seed=1)[1]):
        raise ValueError(f"init_lora_weights: {init} changes the base's weights by chance, so that it can't be put there again")


@contextmanager
def added_as_it_is(model: Any) -> Iterator[None]:
    """Context in which adapters that are added with a PEFT model's own configs leave the base unchanged.

    TRL adds a copy of a trained adapter as the reference; PEFT would subtract another product from the base for it.
    """
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    inits = {name: config.init_lora_weights for name, config in configs.items() if hasattr(config, "init_lora_weights")}
    for name in inits:
        # True leaves the base alone; the new adapter's own weights don't matter, since TRL copies the trained one's into it.
        configs[name].init_lora_weights = True
    try:
        yield
    finally:
        for name, init in inits.items():
            configs[name].init_lora_weights = init


@cache
def _weights(init: Init) -> tuple[bytes, ...]:
    """Return the weights of a new adapter and of its tiny base model. Raises ValueError as `_adapted`."""
    # devices=[]: the tiny model is on the CPU, and by default `fork_rng` would initialise every GPU.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return tuple(parameter.numpy().tobytes() for parameter in _adapted(_tiny(), init, 0).parameters())


@cache
def _outputs(init: Init, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of a tiny model: before an adapter is added, with the adapter disabled, and enabled."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = _tiny()
        tokens = torch.arange(8).unsqueeze(0)
        base = model(input_ids=tokens).logits
        adapted = _adapted(model, init, seed)
        with adapted.disable_adapter():
            off = adapted(input_ids=tokens).logits
        return base, off, adapted(input_ids=tokens).logits


def _tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, initializer_range=0.3, **SIZE)).eval()


def _adapted(model: LlamaForCausalLM, init: Init, seed: int) -> Any:
    """Add a new adapter to the model. Raises ValueError for an initialisation that PEFT can't do."""
    torch.manual_seed(seed)
    try:
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init)
        return get_peft_model(model, config).eval()
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError) as error:
        raise ValueError(f"peft_init_lora_weights: {init!r} can't be used: {error}") from error
