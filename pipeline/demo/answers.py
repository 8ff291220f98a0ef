"""Answers of the demonstration's model, with and without the trained adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.demo.preferences import follows_preference

__all__ = ["Answers", "answer"]


@dataclass(frozen=True)
class Answers:
    """The same prompts, answered before and after training."""

    prompts: Sequence[str]
    before: Sequence[str]
    after: Sequence[str]

    @property
    def fraction_before(self) -> float:
        """Part of the answers before training that follow the preference."""
        return _fraction(self.before)

    @property
    def fraction_after(self) -> float:
        """Part of the answers after training that follow the preference."""
        return _fraction(self.after)


def _fraction(answers: Sequence[str]) -> float:
    return sum(map(follows_preference, answers)) / len(answers)


def answer(cfg: RunConfig, prompts: Sequence[str], adapter: Path | None, new_tokens: int) -> list[str]:
    """Answer each prompt greedily with at most `new_tokens` tokens, with the adapter in `adapter` where one is given."""
    import torch
    from peft import PeftModel

    from strategies.models import load_model
    from strategies.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(cfg)
    tokenizer.padding_side = "left"
    model = load_model(cfg, tokenizer)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        outputs = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
