"""Laws 1, 2, 4 and 11 for rows with pictures, among rows without any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws.runs import CONFIG, LORA, losses, same_history
from tests.laws.vision import prepared_pictures, scored_pictures, trained_on
from tests.tiny_vision import FAMILIES

SMALL: dict[str, Any] = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 3e-3}
PACKED = ("llava", "idefics3")


@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_give_the_run_of_padded_ones(tmp_path: Path, family: str) -> None:
    rows = prepared_pictures(FAMILIES[family](), 8)
    packed = trained_on(tmp_path / "packed", family, rows, tokens_per_forward=450, **SMALL)
    padded = trained_on(tmp_path / "padded", family, rows, sample_packing=False, **SMALL)
    assert packed.packed and not padded.packed
    same_history(packed, padded)


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_cached_reference_gives_the_run_of_a_live_one(tmp_path: Path, family: str, adapter: dict[str, Any]) -> None:
    vision = FAMILIES[family]()
    rows = prepared_pictures(vision, 8)
    live = trained_on(tmp_path / "live", family, rows, **SMALL, **adapter, reference="live")
    cached = trained_on(tmp_path / "cached", family, scored_pictures(rows, vision), **SMALL, **adapter, reference="cached")
    assert losses(live)[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    same_history(live, cached)


@pytest.mark.parametrize("rl", ["dpo", "kto"])
def test_resumed_equals_never_stopped_whoever_makes_the_pixels(tmp_path: Path, rl: str) -> None:
    rows = prepared_pictures(FAMILIES["llava"](), 12, rl)
    keys = {**SMALL, "rl": rl, "save_strategy": "steps", "save_steps": 2}
    whole = trained_on(tmp_path / "whole", "llava", rows, **keys)
    beside = trained_on(tmp_path / "beside", "llava", rows, **keys, dataloader_num_workers=2)
    same_history(whole, beside, rel=1e-6)
    fresh = trained_on(tmp_path / "resumed", "llava", rows, **{**SMALL, "rl": rl, "max_steps": 1})
    for trainer in (whole, beside):
        weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        fresh.args.max_steps, fresh.args.dataloader_num_workers = 4, trainer.args.dataloader_num_workers
        fresh.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
        assert all(torch.equal(weights[name], weight) for name, weight in fresh.model.named_parameters())


def test_pictures_of_the_same_text_have_other_scores(tmp_path: Path) -> None:
    """What the hashes of rows rely on: equal ids don't mean equal scores."""
    vision = FAMILIES["llava"]()
    first, second = prepared_pictures(vision, 2)
    one, other = scored_pictures([first, {**first, "images": second["images"]}], vision)
    assert one["ref_chosen_logps"].tolist() != other["ref_chosen_logps"].tolist()


def test_a_prompt_that_ends_in_a_picture_is_scored_alone() -> None:
    vision = FAMILIES["llava"]()
    rows = prepared_pictures(vision, 3)
    end = rows[0]["prompt_ids"].index(vision.processor.image_token_id) + 16
    cut = {**rows[0], "prompt_ids": rows[0]["prompt_ids"][:end]}
    assert CONFIG["bf16"] is False and cut["prompt_ids"][-1] == vision.processor.image_token_id
    together, alone = scored_pictures([rows[1], cut, rows[2]], vision)[1], scored_pictures([cut], vision)[0]
    assert together["ref_chosen_logps"].tolist() == pytest.approx(alone["ref_chosen_logps"].tolist(), rel=1e-5)
