"""What `docs/extending.md` shows is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config import parse_config
from pipeline.data import load_transform
from strategies.callbacks import registered_callbacks
from strategies.losses import PAIR_LOSSES, LossOptions, PairLogps
from tests.plugins.conftest import Write

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
MODULES = [code for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if code.startswith("# my_plugins.py")]
LOSS, STRATEGY, TYPE, CALLBACK = MODULES


@pytest.fixture
def recipe(write: Write) -> Any:
    """`recipe(code, keys)`: a config with one of the page's modules."""

    def parse(code: str, **keys: Any) -> Any:
        write("my_plugins", code)
        return parse_config({"base_model": "m", "datasets": [{"path": "p.jsonl"}], "plugins": ["my_plugins"], **keys})

    return parse


def test_the_loss(recipe: Any) -> None:
    recipe(LOSS, dpo_loss_type="squared_hinge")
    numbers = torch.tensor([-10.0, -14.0, -12.0, -13.0])  # 1 - 0.1 * 3, squared
    policy, reference = (PairLogps(*pair.split(1), torch.ones(1), torch.ones(1)) for pair in numbers.split(2))
    assert PAIR_LOSSES["squared_hinge"](policy, reference, LossOptions()).tolist() == pytest.approx([0.49])


def test_the_strategy(recipe: Any) -> None:
    shown = next(keys for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "rl" in (keys := yaml.safe_load(text)))
    assert recipe(STRATEGY, **shown).dpo_offset == 0.25


def test_the_dataset_type(recipe: Any) -> None:
    recipe(TYPE, datasets=[{"path": "p.jsonl", "type": "ranked", "field_prompt": "ask"}])
    row = {"question": "Q", "answers": [{"text": "no", "score": 0}, {"text": "yes", "score": 1}]}
    assert load_transform("ranked")(row) == {"prompt": "Q\n", "chosen": "yes", "rejected": "no"}


def test_the_callback(recipe: Any) -> None:
    assert [type(callback).__name__ for callback in registered_callbacks(recipe(CALLBACK))] == ["Loud"]
