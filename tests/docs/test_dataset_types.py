"""Every dataset type has an example on its page, and what the page shows is what the type makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from markdown_it import MarkdownIt

from pipeline.config import parse_yaml
from pipeline.data import dataset_types, load_transform
from tests.docs.blocks import ROOT
from tests.tiny import tiny_tokenizer

PAGE = ROOT / "docs" / "dataset-types.md"
METHODS = {"Pairs": "dpo", "Labelled completions": "kto", "Prompts": "grpo"}
"""Heading of a part of the page -> a method that takes such rows."""
KINDS = {"dpo": "pair", "kto": "unpaired", "grpo": "prompt"}
LLAMA3 = {
    "<|im_end|>\n<|im_start|>": "<|eot_id|><|start_header_id|>",
    "<|im_start|>": "<|start_header_id|>",
    "<|im_end|>": "<|eot_id|>",
}
"""Markers of ChatML -> those of Llama 3."""


@dataclass(frozen=True)
class Example:
    """A row, and what becomes of it."""

    types: tuple[str, ...]
    rl: str
    keys: dict[str, Any]
    row: dict[str, Any]
    becomes: dict[str, Any]


def examples() -> Iterator[Example]:
    """The page's examples: of two JSON blocks the first is a row; YAML before them holds the keys of its dataset."""
    rl, types, keys, row = "", (), {}, None
    tokens = MarkdownIt("commonmark").parse(PAGE.read_text())
    for token, following in zip(tokens, [*tokens[1:], tokens[-1]], strict=True):
        if token.type == "heading_open" and token.tag == "h2":
            rl = METHODS[following.content]
        elif token.type == "heading_open" and token.tag == "h3":
            types, keys = tuple(re.findall(r"`([^`]+)`", following.content)), {}
        elif token.type == "fence" and token.info == "yaml":
            keys = {key: value for key, value in parse_yaml(token.content, "")["datasets"][0].items() if key != "path"}
        elif token.type == "fence" and token.info == "json":
            value = json.loads(token.content)
            if row is None:
                row = value
            else:
                yield Example(types, rl, keys, row, value)
                row = None


EXAMPLES = list(examples())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.rl}-{example.types[0]}")
def test_the_page_shows_what_becomes_of_a_row(example: Example) -> None:
    tokenizer, becomes = tiny_tokenizer(), json.dumps(example.becomes)
    for name in example.types:
        expected = becomes
        if name.startswith("llama3"):
            # After a role Llama 3 has an empty line, where ChatML has a line end.
            expected = re.sub(r"(<\|im_start\|>\w+)\\n", r"\1<|end_header_id|>\\n\\n", expected)
            for chatml, llama3 in LLAMA3.items():
                expected = expected.replace(json.dumps(chatml)[1:-1], llama3)
        keys = {"type": None if name == "passthrough" else name, **example.keys}
        assert load_transform(rl=example.rl, tokenizer=tokenizer, **keys)(example.row) == json.loads(expected)


@pytest.mark.parametrize("rl", KINDS)
def test_every_type_has_an_example(rl: str) -> None:
    shown = {name for example in EXAMPLES if example.rl == rl for name in example.types}
    assert shown >= set(dataset_types(KINDS[rl]))  # type: ignore[arg-type]
