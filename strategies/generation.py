"""Answers of a policy and of its reference to the same prompts, and how far the one has moved from the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig

from strategies.packing.scoring import PairScorer
from strategies.reference import load_reference_alone

__all__ = ["Answer", "Answerer", "Sampling", "generate", "learned_positions"]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    """0 takes the most likely token; 1 draws from the policy itself, as an estimate of its divergence needs."""
    top_p: float = 1.0

    @property
    def is_the_policy(self) -> bool:
        """Whether answers are drawn from the policy's own distribution."""
        return self.temperature == 1.0 and self.top_p == 1.0


@dataclass(frozen=True)
class Answer:
    """To one prompt, by one model."""

    text: str
    ids: list[int]
    """Tokens, the one that ends the answer among them."""
    length: int
    """Tokens, the one that ends the answer not counted."""
    is_cut: bool
    """Whether it had not ended after the tokens that it was given."""


class Answerer:
    """A policy, and the reference beside it: the policy without its adapter where that is what it was trained from.

    Args:
        policy: a config whose reference policy is the model that answers, as `load_reference_alone` loads it.
        reference: another, or None.
        tokenizer: of both.
        device: that they compute on; quantized models stay where they are.
        autocast: dtype of the products, or None.

    Raises:
        ValueError: when a model can't be loaded.
    """

    def __init__(
        self, policy: Any, reference: Any, tokenizer: Any, device: str = "cpu", autocast: torch.dtype | None = None
    ) -> None:
        self.tokenizer, self._device, self._autocast = tokenizer, device, autocast
        self.policy = self._load(policy)
        self._is_base = reference is not None and _is_base_of(reference, policy)
        self.reference = self.policy if self._is_base else None if reference is None else self._load(reference)
        self._scorers: dict[int, PairScorer] = {}

    def answer(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int = 0) -> list[tuple[Answer, Answer | None]]:
        """Answers of policy and reference to each prompt (token ids), one batch; the same for the same batch and seed."""
        with self._computing():
            first = generate(self.policy, self.tokenizer, prompts, sampling, seed)
        if self.reference is None:
            return [(answer, None) for answer in first]
        with self._computing(), self._as_reference():
            second = generate(self.reference, self.tokenizer, prompts, sampling, seed)
        return list(zip(first, second, strict=True))

    def logratios(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[tuple[Answer, Answer]], longest: int
    ) -> list[float]:
        """log(policy / reference) of each answer of the policy, in nats, summed over its tokens.

        Their mean over answers that were drawn from the policy estimates KL(policy || reference), up to the length that
        answers may have.

        Args:
            longest: tokens of the longest prompt with both of its answers, of all batches.
        """
        rows = [
            {"prompt_ids": list(prompt), "chosen_ids": own.ids, "rejected_ids": other.ids}
            for prompt, (own, other) in zip(prompts, answers, strict=True)
        ]
        policy = self._scorer(self.policy, longest).score(rows)
        with self._as_reference():
            reference = self._scorer(self.reference, longest).score(rows)
        return [float((a[0] - b[0]).sum()) for a, b in zip(policy, reference, strict=True)]

    def _scorer(self, model: Any, longest: int) -> PairScorer:
        if id(model) not in self._scorers:
            self._scorers[id(model)] = PairScorer(model, longest, self._autocast)
        return self._scorers[id(model)]

    def _load(self, cfg: Any) -> Any:
        model = load_reference_alone(cfg, self.tokenizer)
        return model if cfg.load_in_4bit or cfg.load_in_8bit else model.to(self._device)

    def _as_reference(self) -> AbstractContextManager[Any]:
        return self.policy.disable_adapter() if self._is_base else nullcontext()

    def _computing(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast(self.policy.device.type, dtype=self._autocast)


def _is_base_of(reference: Any, policy: Any) -> bool:
    """Whether the reference is the policy's base model, and an adapter all that is between them."""
    same = reference.model_copy(update={"lora_model_dir": policy.lora_model_dir, "adapter": policy.adapter})
    return policy.lora_model_dir is not None and reference.lora_model_dir is None and same == policy


def learned_positions(config: Any) -> int | None:
    """Positions that a model has embeddings for; None where positions are computed, as with RoPE or ALiBi."""
    own = config.get_text_config()
    if getattr(own, "rope_parameters", None) or getattr(own, "alibi", False):
        return None
    return getattr(own, "max_position_embeddings", None)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int = 0,
    device: torch.device | None = None,
) -> list[Answer]:
    """Answers to prompts of token ids, as one batch padded on the left; the global random state is left as it was.

    Args:
        model: in evaluation mode.
        device: of the prompts, where the model's own doesn't say it.
    """
    device = device or model.device
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    attended = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    ends = _end_tokens(model, tokenizer)
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=pad,
        eos_token_id=ends,
        use_cache=True,
        **(drawn if sampling.temperature > 0 else {"do_sample": False}),
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), _without_own_settings(model):
        torch.manual_seed(seed)
        generated = model.generate(input_ids=ids, attention_mask=attended, generation_config=config)
    return [_answer(row, set(ends), tokenizer) for row in generated[:, longest:].tolist()]


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """The model without its `generation_config`: transformers takes from it all that a call doesn't say, such as a
    repetition penalty, and answers would neither be the likeliest ones nor the policy's own."""
    holders = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    kept = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        yield
    finally:
        for holder, own in zip(holders, kept, strict=True):
            holder.generation_config = own


def _answer(ids: list[int], ends: set[int], tokenizer: Any) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    kept = ids if end is None else ids[: end + 1]
    length = len(kept) - (end is not None)
    return Answer(tokenizer.decode(kept[:length], skip_special_tokens=True), kept, length, end is None)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """What ends an answer: the tokenizer's end of a turn, and what the model's own settings name beside it."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = [named] if isinstance(named, int) else list(named or [])
    return sorted({tokenizer.eos_token_id, *named})
