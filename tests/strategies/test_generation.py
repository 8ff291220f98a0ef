"""Answers that are drawn from the policy itself, whatever its own settings say."""

from __future__ import annotations

import torch
from transformers import GenerationConfig

from strategies.inference.generation import Sampling, generate
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = [[5, 6, 7, 8], [9, 10]]


def test_greedy_answers_are_the_likeliest_tokens() -> None:
    """Alone and padded, also of a model whose own settings would penalise and forbid tokens."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer).eval()
    model.generation_config = GenerationConfig(repetition_penalty=5.0, suppress_tokens=[3, 4], do_sample=True, num_beams=2)
    own = model.generation_config
    answers = generate(model, tokenizer, PROMPTS, Sampling(max_new_tokens=6, temperature=0))
    assert model.generation_config is own
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = list(prompt)
        for token in answer.ids:
            with torch.no_grad():
                assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
        assert len(answer.ids) == 6 or answer.ids[-1] == tokenizer.eos_token_id


def test_an_end_that_only_the_model_names_ends_an_answer() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer).eval()
    [first] = generate(model, tokenizer, PROMPTS[:1], Sampling(max_new_tokens=6, temperature=0))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, first.ids[2]]
    [answer] = generate(model, tokenizer, PROMPTS[:1], Sampling(max_new_tokens=6, temperature=0))
    end = first.ids.index(first.ids[2])
    assert (answer.ids, answer.length, answer.is_cut) == (first.ids[: end + 1], end, False)


def test_the_same_seed_draws_the_same_and_leaves_the_random_state_alone() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer).eval()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    once = generate(model, tokenizer, PROMPTS, Sampling(max_new_tokens=8), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert generate(model, tokenizer, PROMPTS, Sampling(max_new_tokens=8), seed=3) == once
    assert generate(model, tokenizer, PROMPTS, Sampling(max_new_tokens=8), seed=4) != once
