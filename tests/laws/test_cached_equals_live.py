"""Law 2: a run whose rows bring the reference's log-probabilities is the run with the reference in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from strategies import HFRLTrainerBuilder
from strategies.config import as_config
from strategies.inference.reference import load_reference_alone
from tests.laws.runs import CONFIG, FAMILIES, LORA, losses, opinionated, same_history, scored, trained
from tests.tiny import adapter_folder, prepared_pairs, save_tiny, tiny_tokenizer

ADAPTERS: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA}
WITHOUT_PROMPT = {"prompt_ids": [], "chosen_ids": [5, 6, 7], "rejected_ids": [8, 9]}
ROWS = [*prepared_pairs(15), WITHOUT_PROMPT]
STEPS = {"micro_batch_size": 4, "eval_steps": 2, "eval_rows": 5, "eval_on_start": True}


def both(folder: Path, family: str = "llama", reference: Any = None, rows: Any = ROWS, **keys: Any) -> tuple[Any, Any]:
    """The same run with scored rows, and with the reference in memory.

    Args:
        reference: the reference model; the starting model when not given.
    """
    model = opinionated(family)
    with_scores = scored(rows, reference if reference is not None else model)
    keys = {**STEPS, **keys}
    evaluated = keys.pop("eval_rows")
    runs = {
        "cached": (with_scores, with_scores[:evaluated]),
        "live": (list(rows), list(rows[:evaluated])),
    }
    cached, live = (
        trained(folder / name, model=copy.deepcopy(model), rows=train, eval_rows=evaluation, reference=name, **keys)
        for name, (train, evaluation) in runs.items()
    )
    assert cached.cached_reference and not live.cached_reference
    assert cached.ref_model is None
    return cached, live


@pytest.mark.parametrize("loss", [{}, {"rl": "ipo"}], ids=["sigmoid", "ipo"])
@pytest.mark.parametrize("adapter", list(ADAPTERS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_scored_rows_train_as_the_reference_beside_the_policy(
    tmp_path: Path, family: str, adapter: str, loss: dict[str, Any]
) -> None:
    cached, live = both(tmp_path, family, **ADAPTERS[adapter], **loss)
    same_history(cached, live, absolute=2e-5)
    assert abs(losses(cached)[-1] - losses(cached)[0]) > 1e-2


OPTIONS: dict[str, dict[str, Any]] = {
    "padded": {"sample_packing": False},
    "small_forwards": {"tokens_per_forward": 50, "gradient_accumulation_steps": 2, "micro_batch_size": 2},
    "shorter": {"sequence_len": 22},
    "shorter_padded": {"sequence_len": 22, "sample_packing": False},
    "aot": {"dpo_loss_type": ["aot"], "tokens_per_forward": 50},
    "ld_alpha": {"dpo_ld_alpha": 0.4},
    "norm_loss": {"dpo_norm_loss": True},
    "rpo_alpha": {"rpo_alpha": 0.5},
    "checkpointing": {"gradient_checkpointing": True, **LORA},
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_one_cache_serves_every_loss_and_length(tmp_path: Path, name: str) -> None:
    same_history(*both(tmp_path, **OPTIONS[name]), absolute=2e-5)


def test_another_model_may_be_the_reference(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "reference", seed=5, initializer_range=0.15)
    keys = {"reference_model": folder}
    reference = load_reference_alone(as_config({**CONFIG, **keys}), tiny_tokenizer())
    assert not any(parameter.requires_grad for parameter in reference.parameters()) and not reference.training
    cached, live = both(tmp_path, reference=reference, **keys)
    same_history(cached, live, absolute=2e-5)
    # The policy doesn't start at its reference.
    assert abs(losses(cached, "rewards/margins")[0]) > 1e-2


def test_an_adapter_that_is_continued_is_its_own_reference(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", initializer_range=0.15)
    keys = {"adapter": "lora", "lora_model_dir": adapter_folder(tmp_path / "adapter"), "base_model": base}
    reference = load_reference_alone(as_config({**CONFIG, **keys}), tiny_tokenizer())
    cached, live = both(tmp_path, reference=reference, **keys)
    assert list(cached.model.peft_config) == ["default"]
    same_history(cached, live, absolute=2e-5)
    assert losses(cached)[0] == pytest.approx(0.693147, abs=1e-4)


def test_scores_are_used_where_rows_bring_them_and_nothing_is_said(tmp_path: Path) -> None:
    rows = scored(prepared_pairs(4), opinionated())
    keys = {"max_steps": 1, "eval_steps": 1}
    assert trained(tmp_path, model=opinionated(), rows=rows, eval_rows=rows, **keys).ref_model is None
    assert trained(tmp_path, model=opinionated(), rows=rows, eval_rows=4, **keys).ref_model is not None
    assert trained(tmp_path, model=opinionated(), rows=rows, eval_rows=rows, reference="live", **keys).ref_model is not None


def test_scored_rows_alone_are_enough(tmp_path: Path) -> None:
    """A run without rows to evaluate on uses the scores as well, asked or unasked."""
    rows = scored(prepared_pairs(4), opinionated())
    for keys in ({"reference": "cached"}, {}):
        assert trained(tmp_path, model=opinionated(), rows=rows, max_steps=1, **keys).ref_model is None


def test_scored_rows_may_come_after_the_trainer_is_built(tmp_path: Path) -> None:
    rows = scored(prepared_pairs(4), opinionated())
    keys = {**CONFIG, "output_dir": str(tmp_path), "reference": "cached"}
    trainer = HFRLTrainerBuilder(keys, opinionated(), tiny_tokenizer()).build(total_num_steps=1)
    trainer.train_dataset = rows
    trainer.train()
    assert trainer.ref_model is None and len(losses(trainer)) == 1


def test_the_scores_are_what_the_loss_reads(tmp_path: Path) -> None:
    """The law would hold, too, of a run that had a reference all the same."""
    rows = scored(prepared_pairs(4), opinionated())
    worse = [{**row, "ref_chosen_logps": row["ref_chosen_logps"] - 1.0} for row in rows]
    keys = {"max_steps": 1, "micro_batch_size": 4, "reference": "cached", "eval_steps": 1, "eval_rows": rows}
    keys["reference_model"] = "another"
    margins = [losses(trained(tmp_path, model=opinionated(), rows=one, **keys), "rewards/margins")[0] for one in (rows, worse)]
    tokens = sum(len(row["chosen_ids"]) for row in rows) / len(rows)
    assert margins[1] - margins[0] == pytest.approx(0.1 * tokens, rel=1e-3)


def test_rows_without_scores_are_refused_where_they_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="reference: cached, but the rows of train_dataset have no ref_chosen_logps and ref_rej"
    ):
        trained(tmp_path, rows=prepared_pairs(4), reference="cached", eval_steps=1)
