"""A vision-language model of the usual proportions, and pairs about pictures.

The model is Idefics3, as SmolVLM is: the language model of `--model` with its weights, and a random SigLIP tower. With the
defaults the tower has three tenths of the parameters, and a picture of 384 x 384 pixels is 64 tokens after the connector.
"""

from __future__ import annotations

import argparse
import io
import json
from typing import Any

import numpy as np
import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil, Idefics3Processor

from benchmarks import common
from pipeline.demo.pictures import picture_pairs
from strategies.vision.modules import tower
from strategies.vision.processing import VisionProcessing
from strategies.vision.rows import tokenise

__all__ = ["add_options", "described", "load", "load_rows", "saved_bytes_of_a_picture"]

PATCH = 16
PHOTO = 640
"""Width and height of the files, which the processor shrinks."""
QUALITY = 90
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
TOKENS = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def add_options(options: argparse.ArgumentParser) -> None:
    """What `--vision` has besides."""
    options.add_argument("--vision", action="store_true", help="pairs about generated pictures, and a tower of pictures")
    options.add_argument("--tower-width", type=int, default=768)
    options.add_argument("--tower-layers", type=int, default=8)
    options.add_argument("--picture-side", type=int, default=384, help="pixels that the tower sees, a multiple of 128")


def load(options: argparse.Namespace) -> tuple[Any, Idefics3Processor]:
    """The model, in float32, and its processor."""
    text, tokenizer = common.load(options)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    side, scale = options.picture_side, max(1, options.picture_side // 128)
    edge = {"longest_edge": side}
    pixels = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    length = (side // PATCH // scale) ** 2
    processor = Idefics3Processor(pixels, tokenizer, image_seq_len=length, chat_template=TEMPLATE)
    sizes = {"hidden_size": options.tower_width, "intermediate_size": 4 * options.tower_width}
    layers = {"num_hidden_layers": options.tower_layers, "num_attention_heads": max(1, options.tower_width // 64)}
    config = Idefics3Config(
        vision_config={**sizes, **layers, "image_size": side, "patch_size": PATCH, "model_type": "idefics3_vision"},
        text_config=text.config.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=scale,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(config)
    model.model.text_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    return model, processor


def load_rows(options: argparse.Namespace, processor: Idefics3Processor, number: int) -> list[common.Row]:
    """`number` pairs of `--data` that fit into `--sequence-len`, each about another picture: raw, and their ids besides.

    In the order of the file, or with `--rows-near` those whose two sequences are nearest to so many tokens on average.

    Raises:
        SystemExit: where the file has fewer.
    """
    raw = json.loads(options.data.read_text())
    vision = VisionProcessing(processor)
    kept, lengths = [], []
    for pair, shown in zip(raw, picture_pairs(held_out=False, number=len(raw), side=PHOTO), strict=True):
        row = _about(pair, shown["images"][0])
        row |= tokenise(row, vision)
        answers = [len(row["prompt_ids"]) + len(row[name]) for name in ("chosen_ids", "rejected_ids")]
        if max(answers) <= options.sequence_len:
            kept.append(row)
            lengths.append(np.mean(answers))
        if len(kept) == number and not options.rows_near:
            break
    if len(kept) < number:
        raise SystemExit(f"{options.data} has {len(kept)} pairs that fit; {number} are asked for (--steps x --batch)")
    order = np.argsort(np.abs(np.array(lengths) - options.rows_near), kind="stable") if options.rows_near else range(number)
    return [kept[index] for index in order[:number]]


def _about(pair: dict[str, Any], picture: Any) -> common.Row:
    """A pair of TRL's shape: the first turn of the user shows the picture, as encoded bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
    prompt = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in pair["conversations"]]
    first = next(turn for turn in prompt if turn["role"] == "user")
    first["content"] = [{"type": "image"}, {"type": "text", "text": first["content"]}]
    # Parts everywhere: a column has one type.
    turns = [{**turn, "content": _parts(turn["content"])} for turn in prompt]
    answers = {name: [{"role": "assistant", "content": _parts(pair[name]["value"])}] for name in ("chosen", "rejected")}
    return {"images": [{"bytes": buffer.getvalue(), "path": None}], "prompt": turns, **answers}


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def described(model: Any, processor: Idefics3Processor) -> str:
    """How large the parts are, as text."""
    parts = sum(weight.numel() for module in tower(model).values() for weight in module.parameters())
    total = sum(weight.numel() for weight in model.parameters())
    return (
        f"tower and connector {parts / total:.0%} of {total / 1e6:,.0f}M parameters, {processor.image_seq_len} tokens a picture"
    )


def saved_bytes_of_a_picture(model: Any) -> float:
    """Bytes that the tower keeps of a picture for its backward pass."""
    side = model.config.vision_config.image_size
    pixels = torch.zeros(1, 1, 3, side, side)
    pixels[..., 0, 0] = 1.0  # a picture of zeros alone is taken for padding
    return common.saved_bytes(model, lambda: model.base_model.get_image_features(pixels))
