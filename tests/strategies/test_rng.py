"""Random states of checkpoints."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strategies.mixins.rng import find_rng_file


@pytest.mark.parametrize(
    ("files", "rank", "world_size", "expected"),
    [
        (["rng_state.pth"], 0, 1, "rng_state.pth"),
        (["rng_state_0.pth", "rng_state_1.pth"], 1, 2, "rng_state_1.pth"),
        (["rng_state_0.pth", "rng_state_1.pth"], 0, 1, "rng_state_0.pth"),
        (["rng_state.pth"], 0, 2, "rng_state.pth"),
        (["rng_state.pth"], 1, 2, None),
        (["rng_state_0.pth"], 3, 4, None),
    ],
)
def test_the_file_of_a_rank(tmp_path: Path, files: list[str], rank: int, world_size: int, expected: str | None) -> None:
    for name in files:
        (tmp_path / name).touch()
    found = find_rng_file(tmp_path, rank, world_size)
    assert (found and found.name) == expected


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_states_come_back_also_from_another_number_of_workers(build: Callable[..., Any], tmp_path: Path) -> None:
    trainer = build()
    trainer._save_rng_state(str(tmp_path))
    expected = draw()
    assert draw() != expected
    (tmp_path / "rng_state.pth").rename(tmp_path / "rng_state_0.pth")
    trainer._load_rng_state(str(tmp_path))
    assert draw() == expected


def test_a_missing_state_is_said_and_does_not_stop_the_run(
    build: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="strategies"):
        build()._load_rng_state(str(tmp_path))
    assert "no random state for rank 0: it was written by another number of workers" in caplog.text


def test_a_file_that_would_run_code_is_refused(build: Callable[..., Any], tmp_path: Path) -> None:
    torch.save({"python": Path("x"), "numpy": print}, tmp_path / "rng_state.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        build()._load_rng_state(str(tmp_path))
