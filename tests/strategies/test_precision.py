"""`bf16: auto` on a CPU: decided by its instructions and the model's width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from strategies.config import as_config
from strategies.models import precision
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("given", "has", "width", "expected"),
    [
        ({}, True, 512, True),
        ({}, True, 511, False),
        ({}, True, None, False),
        ({}, False, 4096, False),
        ({"bf16": False}, True, 4096, False),
        ({"bf16": True}, False, 64, True),
        ({"bf16": "full"}, False, 64, "full"),
        ({"fp16": True}, True, 4096, "auto"),
    ],
)
def test_auto_is_decided(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], has: bool, width: int | None, expected: Any
) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: has)
    cfg = as_config({"base_model": "x", "rl": "dpo", **given})
    assert precision.resolve_bf16(cfg, lambda: width).bf16 == expected


def test_the_width_is_not_asked_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: False)
    assert precision.resolve_bf16(as_config({"base_model": "x", "rl": "dpo"}), lambda: pytest.fail("asked")).bf16 is False


@pytest.mark.parametrize("width", [64, 512])
def test_a_wide_model_trains_in_bfloat16(monkeypatch: pytest.MonkeyPatch, build: Callable[..., Any], width: int) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: True)
    model = tiny_model(tiny_tokenizer(), hidden_size=width, num_hidden_layers=1)
    trainer = build(1, model=model, bf16="auto")
    assert trainer.args.bf16 is (width == 512)
    trainer.train()
