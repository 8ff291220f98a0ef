"""Law 6 for rows with pictures: on the same rows our trainers and TRL's have the same losses and metrics."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from tests.laws.test_ours_equals_trl import COMMON, PAIR_METRICS, arguments, in_our_order, pairs_in_our_order, same
from tests.tiny_vision import FAMILIES, labelled_pictures, picture_pairs, vision_trained


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_dpo(tmp_path: Path, family: str, packing: bool) -> None:
    vision = FAMILIES[family]()
    theirs = DPOTrainer(
        copy.deepcopy(vision.model),
        copy.deepcopy(vision.model),
        DPOConfig(**arguments(tmp_path / "trl", max_length=None)),
        train_dataset=Dataset.from_list(pairs_in_our_order(picture_pairs(16))),
        processing_class=vision.processor,
    )
    theirs.train()
    ours = vision_trained(tmp_path / "ours", vision, micro_batch_size=2, warmup_steps=0, max_steps=5, sample_packing=packing)
    # TRL pads prompts on the left and completions on the right, and counts the padding between them as tokens.
    same(ours, theirs, [name for name in PAIR_METRICS if name != "num_tokens"])


@pytest.mark.parametrize("family", list(FAMILIES))
def test_kto(tmp_path: Path, family: str) -> None:
    vision = FAMILIES[family]()
    # TRL has no KL term for pictures; in the first step it is 0.
    theirs = KTOTrainer(
        copy.deepcopy(vision.model),
        copy.deepcopy(vision.model),
        KTOConfig(**arguments(tmp_path / "trl", max_length=None, steps=1, loss_type="apo_zero_unpaired")),
        train_dataset=Dataset.from_list(in_our_order(labelled_pictures(16), 2)),
        processing_class=vision.processor,
    )
    theirs.train()
    ours = vision_trained(tmp_path / "ours", vision, rl="kto", micro_batch_size=2, warmup_steps=0, max_steps=1)
    same(ours, theirs, COMMON, steps=1)
