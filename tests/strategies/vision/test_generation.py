"""Answers to prompts with pictures are those that the model's forward gives, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from strategies import HFRLTrainerBuilder
from strategies.inference.generation import Sampling, generate
from strategies.vision.processing import VisionProcessing
from tests.laws.runs import CONFIG
from tests.laws.vision import prepared_pictures
from tests.tiny_vision import FAMILIES, llava, picture_pairs

NEW = 5


@pytest.mark.parametrize("family", list(FAMILIES))
def test_answers_are_those_of_the_forward(family: str) -> None:
    vision = FAMILIES[family]()
    processing, model = VisionProcessing(vision.processor), vision.model.eval()
    for weight in model.parameters():
        weight.data.mul_(3 if weight.ndim > 1 else 1)  # a fresh model hardly looks at its input
    rows = prepared_pictures(vision, 4)  # the last one is text alone
    prompts = [row["prompt_ids"] for row in rows]
    answers = generate(model, vision.processor.tokenizer, prompts, Sampling(NEW, 0), pictures=rows, vision=processing)
    for row, answer in zip(rows, answers, strict=True):
        ids: list[int] = list(row["prompt_ids"])
        while len(ids) < len(row["prompt_ids"]) + len(answer.ids):
            ids.append(_next(model, processing, ids, row))
        assert ids[len(row["prompt_ids"]) :] == answer.ids
    blind = generate(model, vision.processor.tokenizer, prompts[:1], Sampling(NEW, 0))
    assert blind[0].ids != answers[0].ids


@torch.no_grad()
def _next(model: Any, processing: VisionProcessing, ids: list[int], row: dict[str, Any]) -> int:
    tokens = torch.tensor([ids])
    marks = dict.fromkeys(processing.token_types, (tokens == processing.image_token).long())
    inputs = {**processing.pixels(row["images"]), **marks} if row["images"] else {}
    logits = model(input_ids=tokens, use_cache=False, **inputs).logits[0, -1]
    logits[processing.image_token] = float("-inf")
    return int(logits.argmax())


def test_answers_at_evaluations(tmp_path: Path) -> None:
    vision = llava()
    keys = {**CONFIG, "output_dir": str(tmp_path), "sequence_len": 512, "max_steps": 1, "eval_steps": 1}
    builder = HFRLTrainerBuilder(
        {**keys, "dpo_generate_during_eval": True}, vision.model, vision.processor.tokenizer, vision.processor
    )
    builder.train_dataset = builder.eval_dataset = picture_pairs(2)
    trainer = builder.build()
    trainer.eval_generations.max_new_tokens = 3
    trainer.train()
    assert len(trainer.generations) == 2 and {"policy", "reference"} <= trainer.generations[0].keys()
    # However many tokens stand for a picture.
    assert trainer.generations[0]["prompt"].count("<image>") == 1


def test_a_processor_of_another_model_is_refused(tmp_path: Path) -> None:
    vision, other = llava(), FAMILIES["idefics3"]()
    keys = {**CONFIG, "output_dir": str(tmp_path)}
    builder = HFRLTrainerBuilder(keys, vision.model, other.processor.tokenizer, other.processor)
    other.processor.image_token_id = 3
    with pytest.raises(ValueError, match="Idefics3Processor writes the tokens .3. .* the processor belongs to another"):
        builder.build()
