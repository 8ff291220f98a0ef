"""Evaluations equal what training reported; answers and rewards are those of the models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import evaluate
from pipeline.errors import UserError
from pipeline.evaluation.generate_on_ray import SamplingOptions
from tests.tiny import tiny_model, tiny_tokenizer

LOGGED = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
SHORT = SamplingOptions(max_new_tokens=12)


@pytest.fixture(scope="module")
def found(adapter_run: Any) -> Any:
    """Of the adapter against its base, with answers that a function judges."""
    return evaluate(str(adapter_run.run_dir), rewards=["tests.reward_functions.length"], answers=11, options=SHORT)


def test_the_last_evaluation_of_the_run_is_reproduced(found: Any, adapter_run: Any) -> None:
    for name in LOGGED:
        assert found.metrics[name].value == pytest.approx(adapter_run.metrics[f"eval_{name}"], rel=1e-4, abs=1e-6), name
    mean = (found.metrics["logratios/chosen"].value + found.metrics["logratios/rejected"].value) / 2
    assert mean == pytest.approx(adapter_run.metrics["eval_kl"], rel=1e-4, abs=1e-6)


def test_simpo_is_rewarded_by_its_own_likelihood(full_run: Any) -> None:
    found = evaluate(str(full_run.run_dir), answers=0)
    for name in LOGGED:
        assert found.metrics[name].value == pytest.approx(full_run.metrics[f"eval_{name}"], rel=1e-4, abs=1e-6), name
    assert found.metrics["rewards/accuracies"] == found.metrics["average_logps/accuracies"]
    assert found.metrics["logratios/chosen"].value != 0
    assert found.answers is None


def test_every_source_has_its_own_metrics(found: Any) -> None:
    assert [Path(source).name for source in found.by_source] == ["a.jsonl", "b.jsonl"]
    rows = [metrics["rewards/margins"].n for metrics in found.by_source.values()]
    assert sum(rows) == 16 and all(rows)
    weighted = sum(metrics["rewards/margins"].value * metrics["rewards/margins"].n for metrics in found.by_source.values())
    assert weighted / 16 == pytest.approx(found.metrics["rewards/margins"].value)


def test_answers_are_judged(found: Any) -> None:
    from tests.reward_functions import length

    answers = found.answers
    assert len(answers) == 11 and answers["prompt"].is_unique
    assert {Path(source).name for source in answers["source"]} == {"a.jsonl", "b.jsonl"}
    assert (answers["policy_length"] <= 12).all() and answers["policy_cut"].any()
    own, other = length(answers["policy"].tolist()), length(answers["reference"].tolist())
    assert found.metrics["answers/reward/length"].value == pytest.approx(np.mean(own))
    wins = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(own, other, strict=True)])
    assert found.metrics["answers/win_rate/length"].value == pytest.approx(wins)
    assert found.metrics["answers/length"].value == pytest.approx(answers["policy_length"].mean())


def test_kl_is_the_mean_log_ratio_of_the_policys_own_answers(found: Any, adapter_run: Any, tiny_base: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(adapter_run.model_dir))
    ratios = []
    for row in found.answers.to_dict("records"):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + list(row["policy_ids"])])
        sums = []
        for model in (policy, base):
            with torch.no_grad():
                logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            sums.append(float(logps.gather(1, ids[0, len(prompt) :, None]).sum()))
        ratios.append(sums[0] - sums[1])
    assert found.answers["logratio"].tolist() == pytest.approx(ratios, abs=1e-3)
    assert found.metrics["answers/kl"].value == pytest.approx(np.mean(ratios), abs=1e-3)


def test_a_second_time_scores_nothing_and_draws_the_same(found: Any, adapter_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.reference.scoring.run_pool", None)
    again = evaluate(
        str(adapter_run.run_dir),
        rewards=["tests.reward_functions.length"],
        answers=11,
        options=SHORT,
        overrides=["ray.score.num_actors=2", "ray.score.resources_per_actor={CPU: 1}"],
    )
    assert again.answers["policy"].tolist() == found.answers["policy"].tolist()
    assert again.answers["reference"].tolist() == found.answers["reference"].tolist()
    assert {name: one.value for name, one in again.metrics.items()} == pytest.approx(
        {name: one.value for name, one in found.metrics.items()}, rel=1e-4, abs=1e-6
    )


def test_an_adapter_by_itself_is_compared_with_its_base(found: Any, adapter_run: Any, evaluation_root: Path) -> None:
    data = [str(evaluation_root / "b.jsonl")]
    alone = evaluate(str(adapter_run.model_dir), data=data, answers=0, overrides=["sequence_len=256", "bf16=false"])
    as_run = evaluate(str(adapter_run.run_dir), data=data, answers=0)
    assert alone.metrics["logratios/chosen"].value == pytest.approx(as_run.metrics["logratios/chosen"].value, rel=1e-5)
    assert alone.metrics["rewards/accuracies"] == as_run.metrics["rewards/accuracies"]
    assert alone.metrics["rewards/margins"].value == pytest.approx(as_run.metrics["rewards/margins"].value / 2, rel=1e-4)
    assert as_run.metrics["rewards/accuracies"].n == 10


@pytest.mark.usefixtures("ray_session")
def test_an_untrained_adapter_is_at_no_distance(tiny_base: str, evaluation_root: Path, tmp_path: Path) -> None:
    """Law 11, of one that has taken a part of its base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights="pissa", target_modules="all-linear")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config).save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    data, keys = [str(evaluation_root / "b.jsonl")], ["sequence_len=256", "bf16=false"]
    found = evaluate(str(tmp_path / "adapter"), data=data, answers=2, options=SHORT, overrides=keys)
    for name in ("logratios/chosen", "logratios/rejected", "rewards/margins", "answers/kl"):
        assert found.metrics[name].value == pytest.approx(0, abs=5e-3), name


def test_a_model_without_a_reference(tiny_base: str, adapter_run: Any, evaluation_root: Path) -> None:
    data = [str(evaluation_root / "b.jsonl")]
    found = evaluate(tiny_base, data=data, answers=0, overrides=["sequence_len=256"])
    assert "average_logps/accuracies" in found.metrics and "rewards/margins" not in found.metrics
    assert found.notes == ("no reference: log-ratios, KL and win rates need one (--reference)",)
    against = evaluate(tiny_base, data=data, reference=str(adapter_run.model_dir), answers=0, overrides=["sequence_len=256"])
    as_run = evaluate(str(adapter_run.run_dir), data=data, answers=0)
    assert against.metrics["logratios/chosen"].value == pytest.approx(-as_run.metrics["logratios/chosen"].value, rel=1e-4)


def test_the_chat_template_beside_an_adapter_is_used(recipe: Any, adapter_run: Any, tmp_path: Path) -> None:
    from pipeline import generate

    saved = Path(shutil.copytree(adapter_run.model_dir, tmp_path / "adapter"))
    (saved / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    options = SamplingOptions(max_new_tokens=6, temperature=0)
    [alone] = generate(str(saved), ["Why?"], options=options).rows
    [raw] = generate(str(adapter_run.run_dir), ["Why?!"], options=options, raw=True).rows
    assert (alone["policy"], alone["reference"]) == (raw["policy"], raw["reference"])


def test_rows_that_are_left_out_are_told(adapter_run: Any, evaluation_root: Path, tmp_path: Path) -> None:
    long = json.dumps({"prompt": "Why?", "chosen": "a" * 400, "rejected": "b"})
    (tmp_path / "more.jsonl").write_text((evaluation_root / "b.jsonl").read_text() + long + "\n")
    found = evaluate(str(adapter_run.run_dir), data=[str(tmp_path / "more.jsonl")], split="train[:11]", answers=0)
    assert found.notes == ("of 11 rows, 1 are too long",)
    assert found.metrics["rewards/margins"].n == 10


@pytest.mark.main_job
def test_a_reference_with_another_tokenizer_is_refused(finished_adapter: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    model.save_pretrained(tmp_path)
    tokens = list(tokenizer.get_vocab())
    swapped = {tokens[0]: tokens[1], tokens[1]: tokens[0]}
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    known = json.loads(file.read_text())
    vocabulary = known["model"]["vocab"]
    known["model"]["vocab"] = {swapped.get(token, token): number for token, number in vocabulary.items()}
    file.write_text(json.dumps(known))
    with pytest.raises(UserError, match=r"--reference: .* has another tokenizer \(2 tokens differ"):
        evaluate(str(finished_adapter.run_dir), reference=str(tmp_path), answers=0)


def test_everything_as_json_and_as_html(found: Any) -> None:
    written = json.loads(json.dumps(found.as_json()))
    assert written["metrics"]["rewards/accuracies"]["n"] == 16
    assert written["metrics"]["rewards/margins"]["low"] <= written["metrics"]["rewards/margins"]["value"]
    assert "rewards/margins" in found._repr_html_() and "<script" not in found._repr_html_()
