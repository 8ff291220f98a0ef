"""Chat templates of published vision-language models, as far as pictures go."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.data.transforms import Context, RowError, build_transform, find_placeholder
from strategies.vision.processing import VisionProcessing
from strategies.vision.rows import tokenise
from tests.tiny_vision import FAMILIES, picture

LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "llava": (LLAVA, "<image>\n"),
    "idefics3": (SMOLVLM, "<image>"),
    "qwen2_5_vl": (QWEN, "<|vision_start|><|image_pad|><|vision_end|>"),
}
IMAGES = [picture("red", "circle"), picture("blue", "square", (64, 32))]


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


QUESTIONS: dict[str, list[dict[str, str]]] = {
    "first": [{"type": "image"}, {"type": "image"}, text("Which is red?")],
    "last": [text("Which is red?"), {"type": "image"}, {"type": "image"}],
    "between": [text("Is "), {"type": "image"}, text(" like "), {"type": "image"}, text("?")],
    "alone": [{"type": "image"}, {"type": "image"}],
}


@pytest.mark.parametrize("question", list(QUESTIONS))
@pytest.mark.parametrize("family", list(TEMPLATES))
def test_prompts_are_those_of_the_processor(family: str, question: str) -> None:
    """Of TRL's rows, by the text that is tokenised."""
    vision = FAMILIES[family]()
    template, written = TEMPLATES[family]
    vision.processor.chat_template = template
    tokenizer = vision.processor.tokenizer
    placeholder = find_placeholder(Context(tokenizer, template), vision.processor.image_token)
    assert (placeholder.written, placeholder.takes_parts) == (written, True)
    row: dict[str, Any] = {
        "images": IMAGES,
        "prompt": [{"role": "user", "content": QUESTIONS[question]}],
        **{name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")},
    }
    (rendered,) = build_transform("dpo", Context(tokenizer, template, placeholder=placeholder)).rows(row)
    expected = tokenise(row, VisionProcessing(vision.processor))
    assert VisionProcessing(vision.processor).prompt_ids(rendered.prompt, rendered.pictures) == expected["prompt_ids"]
    assert rendered.pictures == tuple(IMAGES)
    is_moved = family == "llava" and question in ("last", "between")
    assert ("picture_moved" in {note.kind for note in rendered.notes}) == is_moved


def test_numbered_pictures() -> None:
    """What is written for the second picture differs, so rows with two are rejected, and never taken for others."""
    vision = FAMILIES["qwen2_5_vl"]()
    template = "{% set add_vision_id = true %}" + QWEN
    placeholder = find_placeholder(Context(vision.processor.tokenizer, template), vision.processor.image_token)
    assert placeholder.written == "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    row = {"images": IMAGES, "prompt": [{"role": "user", "content": QUESTIONS["first"]}], **answers}
    with pytest.raises(RowError, match="has 1 placeholders of pictures .* and the messages have 2"):
        build_transform("dpo", Context(vision.processor.tokenizer, template, placeholder=placeholder)).rows(row)
