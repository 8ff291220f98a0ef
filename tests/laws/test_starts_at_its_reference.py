"""Law 11: before its first step a policy equals its reference: loss, rewards and KL say so; what breaks it is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import HyperCLOVAXConfig, HyperCLOVAXForCausalLM, LlamaModel

from benchmarks.processes import free_port, spawn
from strategies.config import as_config
from strategies.inference.generation import Answerer, Sampling
from strategies.inference.reference import load_reference_alone
from strategies.models.loading import check_adapter, load_model
from tests.laws.runs import LORA, built, join, losses, opinionated, prepared, scored, trained
from tests.laws.sharded import run
from tests.strategies.packing.test_support import SIZE, Careless
from tests.tiny import adapter_folder, seeded, tiny_tokenizer

PISSA = {**LORA, "peft_init_lora_weights": "pissa"}
OLORA = {**LORA, "peft_init_lora_weights": "olora"}
ACCEPTED: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": LORA,
    "gaussian": {**LORA, "peft_init_lora_weights": "gaussian"},
    "dora": {**LORA, "peft_use_dora": True},
    "rslora": {**LORA, "peft_use_rslora": True},
    "saved modules": {**LORA, "lora_modules_to_save": ["lm_head", "embed_tokens"]},
    "pissa": PISSA,
    "olora": OLORA,
    "padded": {**LORA, "sample_packing": False},
    "dropout": {**LORA, "lora_dropout": 0.5},
}
STARTS = {"dpo": math.log(2), "ipo": None, "kto": 0.5}
ONE_STEP = {"max_steps": 1, "num_epochs": 1.0, "micro_batch_size": 4}


@pytest.mark.parametrize("kind", list(ACCEPTED))
@pytest.mark.parametrize(
    ("rl", "reference"), [("dpo", "live"), ("dpo", "cached"), ("ipo", "live"), ("ipo", "cached"), ("kto", None)]
)
def test_the_first_step_shows_no_difference(rl: str, reference: str | None, kind: str, tmp_path: Path) -> None:
    keys = {**ACCEPTED[kind], **ONE_STEP, "rl": rl, **({"reference": reference} if reference else {})}
    model, rows = opinionated(), prepared(16, keys)
    if reference == "cached":
        rows = scored(rows, model)
    trainer = trained(tmp_path, model=model, rows=rows, **keys)
    assert trainer.starts_at_reference
    entry = trainer.state.log_history[0]
    if kind != "dropout":
        for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert entry.get(name, 0.0) == pytest.approx(0.0, abs=2e-4), name
        if STARTS[rl] is not None:
            assert losses(trainer)[0] == pytest.approx(STARTS[rl], abs=2e-4)


def test_a_continued_adapter_starts_at_itself(tmp_path: Path) -> None:
    keys = {"adapter": "lora", "lora_model_dir": adapter_folder(tmp_path / "adapter"), **ONE_STEP}
    assert losses(trained(tmp_path / "run", reference="live", **keys))[0] == pytest.approx(math.log(2), abs=1e-5)


ASKED = [{"prompt": f"What is {row} plus one? "} for row in range(4)]
ANSWERED = {"reward_funcs": ["tests.reward_functions.low_tokens"], "num_generations": 2, "max_completion_length": 4}
GRPO = {**ONE_STEP, "rl": "grpo", "micro_batch_size": 2, "trl": {**ANSWERED, "beta": 0.1}}


@pytest.mark.parametrize("kind", [kind for kind in ACCEPTED if kind not in ("padded", "dropout")])
def test_the_first_answers_are_at_no_distance(kind: str, tmp_path: Path) -> None:
    """Of grpo, whose reference is TRL's own."""
    trainer = trained(tmp_path, model=opinionated(), rows=ASKED, **ACCEPTED[kind], **GRPO)
    assert losses(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-4)


def test_scores_of_another_model_are_refused(tmp_path: Path) -> None:
    rows = scored(prepared(16, {}), opinionated(seed=1))
    with pytest.raises(ValueError, match="reference: at its first step the policy isn't its reference: they differ by .* nats"):
        trained(tmp_path, model=opinionated(), rows=rows, reference="cached")


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_a_continued_adapter_that_has_a_part_of_its_base_stays_what_it_is(reference: str, tmp_path: Path) -> None:
    """TRL adds it once more, as the reference: by its config PEFT would take another part out of the base."""
    base, tokens = opinionated(), torch.tensor([[3, 4, 5]])
    base.save_pretrained(tmp_path / "base")
    expected = base(input_ids=tokens).logits
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights="pissa", target_modules="all-linear")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    keys = {"base_model": str(tmp_path / "base"), "adapter": "lora", "lora_model_dir": str(tmp_path / "adapter")}
    model = load_model(as_config(keys))
    rows = scored(prepared(16, {}), load_reference_alone(as_config(keys))) if reference == "cached" else None
    trainer = built(tmp_path / "run", rows=rows, model=model, reference=reference, **keys)
    torch.testing.assert_close(trainer.model.eval()(input_ids=tokens).logits, expected, rtol=1e-3, atol=1e-3)
    assert trainer.model.peft_config["default"].init_lora_weights == "pissa"
    trainer.args.max_steps = 1
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=2e-4)


@pytest.mark.parametrize("rl", ["dpo", "kto", "grpo"])
def test_a_policy_without_its_reference_is_refused(rl: str, tmp_path: Path) -> None:
    """By what it gives, whatever the adapter is called."""
    keys = {"dpo": {"reference": "live"}, "kto": {"rl": "kto", "micro_batch_size": 4}, "grpo": {**GRPO, "rows": ASKED}}[rl]
    trainer = built(tmp_path, model=opinionated(), **LORA, **keys)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight += 0.3
    with pytest.raises(ValueError, match="at its first step the policy isn't its reference"):
        trainer.train()


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (False, "peft_init_lora_weights: False draws weights that change the policy before its first step"),
        ("nope", "peft_init_lora_weights: 'nope' can't be used: Unknown initialization"),
        ("corda", "peft_init_lora_weights: 'corda' can't be used: it needs data first"),
        ("lora_ga", "peft_init_lora_weights: 'lora_ga' does no more than true here"),
        ("eva", "peft_init_lora_weights: 'eva' can't be used: it needs data first"),
        ("pissa_niter_4", "peft_init_lora_weights: .*changes the base's weights by chance.*: nobody could load the model"),
    ],
)
def test_an_initialisation_that_starts_elsewhere_is_refused(init: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, **LORA, peft_init_lora_weights=init)


def test_an_adapter_that_changes_its_base_by_chance_is_not_continued(tmp_path: Path) -> None:
    model = get_peft_model(opinionated(), LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights="pissa_niter_4"))
    model.save_pretrained(tmp_path)
    cfg = as_config({"base_model": "tiny", "adapter": "lora", "lora_model_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="lora_model_dir: .*pissa_niter_4 changes the base's weights by chance"):
        check_adapter(cfg)


def test_the_reference_of_answers_is_the_base(tmp_path: Path) -> None:
    """Also beside an adapter that has taken a part of it."""
    base = opinionated()
    base.save_pretrained(tmp_path / "base")
    tokens = torch.tensor([[3, 4, 5]])
    expected = base(input_ids=tokens).logits
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights="pissa", target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    reference = as_config({"base_model": str(tmp_path / "base")})
    policy = reference.model_copy(update={"adapter": "lora", "lora_model_dir": str(tmp_path / "adapter")})
    answerer = Answerer(policy, reference, tiny_tokenizer())
    torch.testing.assert_close(answerer.reference(input_ids=tokens).logits, expected)
    torch.testing.assert_close(answerer.policy(input_ids=tokens).logits, expected, rtol=1e-3, atol=1e-3)
    ((own, other),) = answerer.answer([[3, 4, 5]], Sampling(max_new_tokens=4, temperature=0.0))
    assert other is not None and own.ids == other.ids


def divided(rank: int, world_size: int, port: int, folder: str) -> None:
    """One process of a group: two models under ZeRO-3 that take packed rows, and one that misunderstands them."""
    join(rank, world_size, port)
    found: dict[str, Any] = {}
    made = LlamaModel.__init__

    def careless(self: Any, config: Any) -> None:
        made(self, config)
        self.__class__ = Careless

    for name in ("llama", "hyperclovax", "careless"):
        keys = {"base_model": f"{folder}/{name}", "rows": 4, "max_steps": 1, "eval_steps": 1, "eval_rows": 2}
        with pytest.MonkeyPatch.context() as patch:
            if name == "careless":
                patch.setattr(LlamaModel, "__init__", careless)
            try:
                found[name] = run(Path(folder) / f"{name}-run", "zero3", keys, micro_batch_size=1)["loss"]
            except ValueError as error:
                found[name] = str(error)
    (Path(folder) / f"found-{rank}").write_text(json.dumps(found))


@pytest.mark.processes
def test_packed_rows_are_tried_out_also_where_weights_are_divided(tmp_path: Path) -> None:
    scaled = HyperCLOVAXConfig(**{**SIZE, "vocab_size": len(tiny_tokenizer()), "num_key_value_heads": 2, "logits_scaling": 3.0})
    models = {"llama": opinionated(), "careless": opinionated(), "hyperclovax": seeded(HyperCLOVAXForCausalLM, scaled)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    spawn(divided, 2, 2, free_port(), str(tmp_path))
    for rank in range(2):
        found = json.loads((tmp_path / f"found-{rank}").read_text())
        for name in ("llama", "hyperclovax"):
            assert found[name][0] == pytest.approx(math.log(2), abs=1e-4), found
        assert found["careless"].startswith("sample_packing: llama scores packed rows otherwise than single ones"), found
