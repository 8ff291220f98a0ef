"""Tiny vision-language models of three families with their processors, built in code, and pairs about pictures.

Each `FAMILIES[name]()` returns a `Vision`: LLaVA (one tower of CLIP, all pictures of one size), Idefics3 (pictures are cut
into tiles), Qwen2.5-VL (any size, three-dimensional positions).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from tests.laws.runs import CONFIG
from tests.tiny import SIZE, seeded, tiny_tokenizer

__all__ = [
    "COLORS",
    "FAMILIES",
    "Vision",
    "gemma3",
    "labelled_pictures",
    "picture",
    "picture_pairs",
    "save_vision",
    "vision_trained",
]

COLORS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}
SHAPES = ("circle", "square", "triangle")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Vision:
    """A model and its processor."""

    model: PreTrainedModel
    processor: ProcessorMixin


def llava(seed: int = 0) -> Vision:
    """LLaVA: a CLIP tower of two layers, 32 pixels a side, 16 tokens a picture."""
    tokenizer = _tokenizer("<image>")
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    image = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "vision_feature_layer": -1}
    config = LlavaConfig(vision_config=tower, text_config=LlamaConfig(**_text(tokenizer)), **image)
    return Vision(seeded(LlavaForConditionalGeneration, config, seed), processor)


def idefics3(seed: int = 0) -> Vision:
    """Idefics3, as SmolVLM's: tiles of 32 pixels, 4 tokens each, and the whole picture as one more tile."""
    names = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    names += [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    tokenizer = _tokenizer(*names)
    pixels = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(pixels, tokenizer, image_seq_len=4, chat_template=TEMPLATE.replace("IMAGE", "<image>"))
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Idefics3Config(
        vision_config={**tower, "image_size": 32, "patch_size": 8, "model_type": "idefics3_vision"},
        text_config={**_text(tokenizer), "model_type": "llama"},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Vision(seeded(Idefics3ForConditionalGeneration, config, seed), processor)


def qwen2_5_vl(seed: int = 0) -> Vision:
    """Qwen2.5-VL: patches of 8 pixels, four of which make a token; positions of time, height and width."""
    tokenizer = _tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    pixels = Qwen2VLImageProcessorPil(
        patch_size=8, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
    )
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = ImagesOfQwen(pixels, tokenizer, chat_template=template)
    tower = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "patch_size": 8, "window_size": 32}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in VISION_TOKENS.items()}
    text = {**_text(tokenizer), "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    config = Qwen2_5_VLConfig(
        vision_config={**tower, "out_hidden_size": SIZE["hidden_size"], "fullatt_block_indexes": [1]}, text_config=text, **ids
    )
    return Vision(seeded(Qwen2_5_VLForConditionalGeneration, config, seed), processor)


def gemma3(seed: int = 0) -> Vision:
    """Gemma 3: a picture's tokens see each other in both directions, and stand between others in the text."""
    begin, end, soft = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
    tokenizer = _tokenizer(begin, end, soft)
    for name, token in {"boi": begin, "eoi": end, "image": soft}.items():
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    pixels = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = Gemma3Processor(pixels, tokenizer, image_seq_length=16, chat_template=TEMPLATE.replace("IMAGE", begin))
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        text_config={**_text(tokenizer), "head_dim": 16, "layer_types": ["full_attention"] * SIZE["num_hidden_layers"]},
        mm_tokens_per_image=16,
        image_token_id=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return Vision(seeded(Gemma3ForConditionalGeneration, config, seed), processor)


class ImagesOfQwen(Qwen2_5_VLProcessor):
    """Qwen's processor without its part for videos, which needs torchvision."""

    video_processor = None

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any) -> None:
        for name, token in VISION_TOKENS.items():
            setattr(self, name, tokenizer.convert_tokens_to_ids(token))
        self.image_token, self.video_token = VISION_TOKENS["image_token_id"], VISION_TOKENS["video_token_id"]
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


VISION_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
FAMILIES: dict[str, Callable[..., Vision]] = {"llava": llava, "idefics3": idefics3, "qwen2_5_vl": qwen2_5_vl}


def _tokenizer(*tokens: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def _text(tokenizer: Any) -> dict[str, Any]:
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return {**SIZE, **tokens, "vocab_size": len(tokenizer)}


def save_vision(folder: Path, family: str, seed: int = 0) -> str:
    """Write a model with its processor as a Hugging Face folder; returns the folder as text."""
    vision = FAMILIES[family](seed)
    vision.model.save_pretrained(folder)
    vision.processor.save_pretrained(folder)
    return str(folder)


def picture(color: str, shape: str, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A shape of one colour in the middle of white."""
    image = Image.new("RGB", size, "white")
    width, height = size
    box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse(box, fill=COLORS[color])
    elif shape == "square":
        draw.rectangle(box, fill=COLORS[color])
    else:
        draw.polygon([(width // 2, box[1]), (box[0], box[3]), (box[2], box[3])], fill=COLORS[color])
    return image


def picture_pairs(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversational pairs of TRL's shape: a picture in `images`, and the chosen answer names its colour."""
    chance = random.Random(seed)
    rows = []
    for row in range(number):
        color, other = chance.sample(sorted(COLORS), 2)
        shape, width = chance.choice(SHAPES), chance.choice((32, 40, 48, 64))
        content = [{"type": "image"}, {"type": "text", "text": f"Which colour has the {shape}?"}]
        rows.append(
            {
                "images": [picture(color, shape, (width, 32))],
                "prompt": [{"role": "user", "content": content}],
                "chosen": [{"role": "assistant", "content": f"It is {color}" + "." * (row % 3)}],
                "rejected": [{"role": "assistant", "content": f"{other}!"}],
            }
        )
    return rows


def labelled_pictures(number: int) -> list[dict[str, Any]]:
    """Labelled completions about pictures, three good ones for every two bad ones."""
    rows = []
    for row, pair in enumerate(picture_pairs(number)):
        good = row % 5 < 3
        completion = pair["chosen" if good else "rejected"]
        rows.append({"images": pair["images"], "prompt": pair["prompt"], "completion": completion, "label": good})
    return rows


def vision_trained(folder: Path, vision: Vision, rows: Any = None, **keys: Any) -> Any:
    """Train on pairs about pictures, or on other raw rows; returns the trainer."""
    from strategies import HFRLTrainerBuilder

    keys = {**CONFIG, "output_dir": str(folder), "sequence_len": 512, **keys}
    builder = HFRLTrainerBuilder(keys, vision.model, vision.processor.tokenizer, vision.processor)
    default = labelled_pictures if keys.get("rl") == "kto" else picture_pairs
    builder.train_dataset = default(16) if rows is None else rows
    trainer = builder.build()
    trainer.train()
    return trainer
