"""Log-probabilities of completions about pictures are those of the model's own forward on its processor's own inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from strategies.inference.scoring import PairScorer
from strategies.vision.processing import VisionProcessing
from tests.tiny_vision import FAMILIES, Vision, gemma3, picture

TURNS = [{"type": "image"}, {"type": "text", "text": "Which colour?"}, {"type": "image"}, {"type": "text", "text": " and?"}]
ANSWERS = {"chosen_ids": "It is red<|im_end|>", "rejected_ids": "blue!<|im_end|>"}


@pytest.mark.parametrize("family", [*FAMILIES.values(), gemma3], ids=[*FAMILIES, "gemma3"])
def test_scores_are_those_of_the_models_own_forward(family: Callable[[], Vision]) -> None:
    vision = family()
    processing, pictures = VisionProcessing(vision.processor), [picture("red", "circle"), picture("blue", "square", (64, 32))]
    prompt = vision.processor.apply_chat_template([{"role": "user", "content": TURNS}], add_generation_prompt=True)
    given: list[tuple[str, list[Any]]] = [(prompt, pictures), (prompt, pictures[::-1]), ("No picture: ", [])]
    ids = {name: processing.completion_ids(answer) for name, answer in ANSWERS.items()}
    rows = [{"prompt_ids": processing.prompt_ids(text, images), "images": images, **ids} for text, images in given]
    scores = PairScorer(vision.model.eval(), 4096, longest=512, vision=processing).score(rows)
    for (text, images), pair in zip(given, scores, strict=True):
        for answer, found in zip(ANSWERS.values(), pair, strict=True):
            assert list(found) == pytest.approx(_logps(vision, text, answer, images), abs=1e-5)


@torch.no_grad()
def _logps(vision: Vision, prompt: str, answer: str, images: list[Any]) -> list[float]:
    pictures = {"images": [images]} if images else {}
    inputs = vision.processor(text=[prompt + answer], return_tensors="pt", add_special_tokens=False, **pictures)
    tokens = inputs["input_ids"][0, -len(VisionProcessing(vision.processor).completion_ids(answer)) :]
    logps = vision.model(**inputs, use_cache=False).logits[0, -len(tokens) - 1 : -1].log_softmax(-1)
    return logps.gather(1, tokens[:, None])[:, 0].tolist()
