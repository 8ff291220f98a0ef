"""Generation by a policy and its reference from the same prompts, and log-ratios of the policy's answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig

from strategies.inference.reference import load_reference_alone
from strategies.inference.scoring import PairScorer
from strategies.models.adapter_start import keeps_base
from strategies.vision.features import given_pictures
from strategies.vision.processing import VisionProcessing

__all__ = ["Answer", "Answerer", "Sampling", "generate"]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    """0 is greedy; 1 samples from the policy itself, which an estimate of its divergence needs."""
    top_p: float = 1.0

    @property
    def is_the_policy(self) -> bool:
        """Whether answers are samples from the policy's own distribution."""
        return self.temperature == 1.0 and self.top_p == 1.0


@dataclass(frozen=True)
class Answer:
    """One model's answer to one prompt."""

    text: str
    ids: list[int]
    """Tokens, including the end token."""
    length: int
    """Number of tokens, without the end token."""
    is_cut: bool
    """Whether it was cut at `max_new_tokens`."""


class Answerer:
    """Generates with a policy and a reference, which is the policy without its adapter if that is what it was trained from.

    Args:
        policy: a config whose *reference* policy is the model to generate with, loaded by `load_reference_alone`.
        reference: another such config, or None.
        tokenizer: of both.
        device: of both; quantized models stay on theirs.
        autocast: dtype of the products, or None.
        vision: of both, where prompts have pictures.

    Raises:
        ValueError: if a model can't be loaded.
    """

    def __init__(
        self,
        policy: Any,
        reference: Any,
        tokenizer: Any,
        device: str = "cpu",
        autocast: torch.dtype | None = None,
        vision: VisionProcessing | None = None,
    ) -> None:
        self.tokenizer, self._device, self._autocast, self._vision = tokenizer, device, autocast, vision
        self.policy = self._load(policy)
        self._is_base = reference is not None and _is_base_of(reference, policy) and _has_base(self.policy)
        self.reference = self.policy if self._is_base else None if reference is None else self._load(reference)
        self._scorers: dict[int, PairScorer] = {}

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int = 0,
        pictures: Sequence[Mapping[str, Any]] = (),
    ) -> list[tuple[Answer, Answer | None]]:
        """Return answers of policy and reference to each prompt (token ids), as one batch; deterministic per batch and seed.

        Args:
            pictures: the columns of pictures of each prompt's row; empty where there are none.
        """
        shown: dict[str, Any] = {"pictures": pictures, "vision": self._vision}
        with self._computing():
            first = generate(self.policy, self.tokenizer, prompts, sampling, seed, **shown)
        if self.reference is None:
            return [(answer, None) for answer in first]
        with self._computing(), self._as_reference():
            second = generate(self.reference, self.tokenizer, prompts, sampling, seed, **shown)
        return list(zip(first, second, strict=True))

    def logratios(
        self,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[tuple[Answer, Answer]],
        longest: int,
        pictures: Sequence[Mapping[str, Any]] = (),
    ) -> list[float]:
        """Return log(policy / reference) of each answer of the policy, in nats, summed over its tokens.

        Their mean over answers sampled from the policy estimates KL(policy || reference), up to the maximum length.

        Args:
            longest: tokens of the longest prompt with both of its answers, over all batches.
            pictures: as of `answer`.
        """
        # Pairs, as `PairScorer` takes them; of the reference's answers the scores aren't used.
        rows = [
            {"prompt_ids": list(prompt), "chosen_ids": answer.ids, "rejected_ids": other.ids, **columns}
            for prompt, (answer, other), columns in zip(prompts, answers, pictures or [{}] * len(prompts), strict=True)
        ]
        policy = self._scorer(self.policy, longest).score(rows)
        with self._as_reference():
            reference = self._scorer(self.reference, longest).score(rows)
        return [float((a[0] - b[0]).sum()) for a, b in zip(policy, reference, strict=True)]

    def _scorer(self, model: Any, longest: int) -> PairScorer:
        # By id, since models live as long as this object; a reference that is the policy without its adapter shares its scorer.
        if id(model) not in self._scorers:
            self._scorers[id(model)] = PairScorer(model, longest, self._autocast, vision=self._vision)
        return self._scorers[id(model)]

    def _load(self, cfg: Any) -> Any:
        model = load_reference_alone(cfg, self.tokenizer)
        return model if cfg.load_in_4bit or cfg.load_in_8bit else model.to(self._device)

    def _as_reference(self) -> AbstractContextManager[Any]:
        return self.policy.disable_adapter() if self._is_base else nullcontext()

    def _computing(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast(self.policy.device.type, dtype=self._autocast)


def _is_base_of(reference: Any, policy: Any) -> bool:
    """Return whether the reference is the policy's base model, so that they differ only by an adapter."""
    same = reference.model_copy(update={"lora_model_dir": policy.lora_model_dir, "adapter": policy.adapter})
    return policy.lora_model_dir is not None and reference.lora_model_dir is None and same == policy


def _has_base(policy: Any) -> bool:
    """Return whether the policy with its adapter disabled is its base model."""
    config = policy.peft_config[policy.active_adapter]
    return keeps_base(getattr(config, "init_lora_weights", True))


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int = 0,
    device: torch.device | None = None,
    pictures: Sequence[Mapping[str, Any]] = (),
    vision: VisionProcessing | None = None,
) -> list[Answer]:
    """Generate answers to prompts of token ids, as one left-padded batch; the global random state is not changed.

    Args:
        model: in evaluation mode.
        device: of the prompts; `model.device` when None.
        pictures: the columns of pictures of each prompt's row; empty where there are none.
        vision: where prompts may have pictures; answers then never have the token of a picture, which no model could read.
    """
    device = device or model.device
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    # Padded on the left, so that the last position of each row predicts its first new token.
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    attended = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    given = given_pictures(pictures, vision)
    inputs = given.to(device).inputs(ids) if given is not None else {}
    # Before the context below, which hides the model's generation config.
    ends = _end_tokens(model, tokenizer)
    # top_k 0 is off; left out, it would be 50, transformers' default.
    sampled = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=pad,
        eos_token_id=ends,
        use_cache=True,
        suppress_tokens=[vision.image_token] if vision is not None else None,
        **(sampled if sampling.temperature > 0 else {"do_sample": False}),
    )
    # Only the one in use: by default `fork_rng` saves the state of every GPU, and warns of their number.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), _default_generation_config(model):
        torch.manual_seed(seed)
        generated = model.generate(input_ids=ids, attention_mask=attended, generation_config=config, **inputs)
    return [_answer(row, set(ends), tokenizer) for row in generated[:, longest:].tolist()]


@contextmanager
def _default_generation_config(model: Any) -> Iterator[None]:
    """Context without the model's `generation_config`, from which transformers takes all that a call doesn't set, such as a
    repetition penalty: answers would be neither greedy nor samples from the policy."""
    # Both: PeftModel's `generate` sets the base's config to its own (PEFT 0.21), and leaves it there.
    owners = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    configs = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in zip(owners, configs, strict=True):
            owner.generation_config = config


def _answer(ids: list[int], ends: set[int], tokenizer: Any) -> Answer:
    end = next((index for index, token in enumerate(ids) if token in ends), None)
    # With the end token, which was sampled as well, so that log-ratios count it.
    kept = ids if end is None else ids[: end + 1]
    length = len(kept) - (end is not None)
    return Answer(tokenizer.decode(kept[:length], skip_special_tokens=True), kept, length, end is None)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the end tokens: the tokenizer's, and those of the model's `generation_config`."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = [configured] if isinstance(configured, int) else list(configured or [])
    return sorted({tokenizer.eos_token_id, *configured})
