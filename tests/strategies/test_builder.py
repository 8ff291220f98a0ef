"""What the builder decides: the reference, the adapter, the observers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from strategies import HFRLTrainerBuilder
from strategies.models.saving import save_final
from tests.tiny import (
    adapter_folder,
    prepared_labelled,
    prepared_pairs,
    save_tiny,
    tiny_gpt2,
    tiny_model,
    tiny_qwen,
    tiny_tokenizer,
)

Build = Callable[..., Any]


def history(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def test_full_training_keeps_a_frozen_copy(build: Build) -> None:
    trainer = build(4)
    before = state(trainer.model)
    trainer.train()
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    assert not any(param.requires_grad for param in reference.parameters())
    assert not reference.training
    for name, param in reference.named_parameters():
        assert torch.equal(param, before[name]), name
        assert not torch.equal(param, dict(trainer.model.named_parameters())[name]), name


def test_a_model_that_was_trained_before_is_copied_with_its_own_weights(build: Build) -> None:
    first = build(3)
    first.train()
    second = build(2, model=first.model)
    reference = second.accelerator.unwrap_model(second.ref_model)
    ids = torch.tensor([[1, 2, 3]])
    before = reference(ids).logits.detach().clone()
    second.train()
    assert torch.equal(reference(ids).logits, before)
    assert history(second)[0] == pytest.approx(0.693147, abs=1e-5)


def test_a_new_adapter_is_compared_with_the_base_model(build: Build) -> None:
    trainer = build(4, adapter="lora", lora_r=4)
    before = state(trainer.model)
    trainer.train()
    assert trainer.ref_model is None
    changed = {name for name, param in trainer.model.named_parameters() if not torch.equal(param, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert history(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    assert history(trainer)[-1] < 0.68


def test_the_adapter_starts_the_same_each_time(build: Build) -> None:
    first = build(1, adapter="lora")
    torch.rand(5)
    assert all(
        torch.equal(one, two)
        for one, two in zip(first.model.parameters(), build(1, adapter="lora").model.parameters(), strict=True)
    )


def test_lora_keys_arrive(build: Build) -> None:
    keys = {"lora_r": 3, "lora_alpha": 7, "lora_dropout": 0.2, "lora_target_modules": ["q_proj", "k_proj"]}
    config = build(1, adapter="lora", **keys, lora_rank_pattern={"k_proj": 5}, peft_use_rslora=True).model.peft_config[
        "default"
    ]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 7, 0.2, True)
    assert set(config.target_modules) == {"q_proj", "k_proj"}
    assert config.rank_pattern == {"k_proj": 5}


def test_lora_dropout_survives_disable_dropout(build: Build) -> None:
    trainer = build(1, adapter="lora", lora_dropout=0.2)
    rates = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.2}


@pytest.mark.parametrize("adapter", [None, "lora"])
@pytest.mark.parametrize("sample_packing", [True, False])
def test_attention_has_no_dropout_either(build: Build, adapter: str | None, sample_packing: bool) -> None:
    """Policy and reference are the same model at first, so the first loss is ln 2."""
    model = tiny_model(tiny_tokenizer(), attention_dropout=0.5)
    trainer = build(1, model=model, adapter=adapter, sample_packing=sample_packing)
    trainer.train()
    assert history(trainer) == pytest.approx([math.log(2)], abs=1e-6)


def test_a_continued_adapter_is_compared_with_itself_before(build: Build, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter")
    trainer = build(4, adapter="lora", lora_model_dir=folder)
    before = state(trainer.model)
    trainer.train()
    # Compared with the base model instead, the first loss would be off ln 2.
    assert history(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    assert history(trainer)[-1] < 0.69
    for name, param in trainer.model.named_parameters():
        assert torch.equal(param, before[name]) == ("default" not in name), name


def test_a_folder_without_an_adapter_is_an_error(build: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora_model_dir: no adapter could be loaded from"):
        build(1, adapter="lora", lora_model_dir=str(tmp_path))


@pytest.mark.parametrize("adapter", [{}, {"adapter": "lora"}], ids=["full", "lora"])
def test_an_explicit_reference_is_used(build: Build, tmp_path: Path, adapter: dict[str, Any]) -> None:
    trainer = build(1, reference_model=save_tiny(tmp_path / "reference", seed=5), **adapter)
    trainer.train()
    assert abs(history(trainer, "rewards/chosen")[0]) > 1e-3
    expected = tiny_model(tiny_tokenizer(), seed=5)
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    assert torch.equal(reference.lm_head.weight, expected.lm_head.weight)


def test_a_reference_may_be_set_on_the_builder(config: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer()
    builder = HFRLTrainerBuilder(config, tiny_model(tokenizer), tokenizer)
    builder.model_ref = tiny_model(tokenizer, seed=5)
    assert builder.build(1).ref_model is builder.model_ref


def test_a_peft_config_may_be_set_on_the_builder(config: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer()
    builder = HFRLTrainerBuilder({**config, "adapter": "lora"}, tiny_model(tokenizer), tokenizer)
    builder.peft_config = LoraConfig(r=2, target_modules=["o_proj"])
    assert set(builder.build(1).model.peft_config["default"].target_modules) == {"o_proj"}


def test_max_steps_wins_over_the_given_number(build: Build) -> None:
    assert build(7, max_steps=3).args.max_steps == 3
    assert build(7).args.max_steps == 7
    assert build(None).args.max_steps == -1


def test_early_stopping_stops(build: Build) -> None:
    """With a learning rate of next to nothing no evaluation is better than the first."""
    trainer = build(
        20,
        num_epochs=9,
        learning_rate=1e-12,
        early_stopping_patience=2,
        eval_steps=1,
        evaluate=prepared_pairs(2),
        metric_for_best_model="eval_rewards/accuracies",
    )
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("adapter", [{}, {"adapter": "lora"}], ids=["full", "lora"])
def test_recomputing_activations_changes_nothing(build: Build, adapter: dict[str, Any]) -> None:
    plain, recomputed = build(3, **adapter), build(3, gradient_checkpointing=True, **adapter)
    plain.train()
    recomputed.train()
    assert recomputed.model.is_gradient_checkpointing
    assert history(recomputed) == pytest.approx(history(plain), rel=1e-5)
    assert history(recomputed, "grad_norm") == pytest.approx(history(plain, "grad_norm"), rel=1e-4)


def test_bfloat16_autocast_keeps_float32_weights(build: Build) -> None:
    trainer = build(3, bf16=True)
    trainer.train()
    assert trainer.model.dtype == torch.float32
    assert history(trainer)[0] == pytest.approx(0.693147, abs=1e-3)
    assert history(trainer)[-1] < 0.65


@pytest.mark.parametrize("adapter", [{}, {"adapter": "lora"}], ids=["full", "lora"])
def test_the_best_checkpoint_comes_back(build: Build, adapter: dict[str, Any]) -> None:
    """eval_loss as a thing to maximise is best at the first evaluation."""
    trainer = build(
        4,
        load_best_model_at_end=True,
        eval_steps=1,
        save_steps=1,
        save_strategy=None,
        evaluate=prepared_pairs(4),
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        **adapter,
    )
    trainer.train()
    values = history(trainer, "eval_loss")
    assert values[0] > values[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(values[0], rel=1e-5)


def test_adapter_on_a_peft_model_of_the_caller(config: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer()
    policy = get_peft_model(tiny_model(tokenizer), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = HFRLTrainerBuilder({**config, "adapter": "lora"}, policy, tokenizer).build(2)
    trainer.train_dataset = prepared_pairs(4)
    trainer.train()
    assert trainer.model is policy
    assert trainer.ref_model is None


def test_sharding_arguments_pass_through(config: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer()
    builder = HFRLTrainerBuilder(config, tiny_model(tokenizer), tokenizer)
    builder.extra_arguments = {"data_seed": 7}
    assert builder.build(1).args.data_seed == 7


@pytest.mark.parametrize("adapter", [{}, {"adapter": "lora"}], ids=["full", "lora"])
def test_a_saved_model_says_what_the_trained_one_says(build: Build, tmp_path: Path, base: str, adapter: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = build(3, **adapter)
    trainer.train()
    folder = save_final(trainer, tiny_tokenizer(), tmp_path / "final")
    if adapter:
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
        assert loaded.peft_config["default"].base_model_name_or_path == base
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.allclose(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny_tokenizer().chat_template


def test_a_saved_adapter_leaves_its_reference_behind(build: Build, tmp_path: Path) -> None:
    trainer = build(2, adapter="lora", lora_model_dir=adapter_folder(tmp_path / "adapter"))
    trainer.train()
    folder = save_final(trainer, tiny_tokenizer(), tmp_path / "final")
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= names
    assert not names & {"ref", "training_args.bin", "model.safetensors"}


def test_the_model_card_says_how_it_was_made(build: Build, tmp_path: Path, base: str) -> None:
    trainer = build(2, rl_beta=0.3)
    trainer.train()
    card = (save_final(trainer, tiny_tokenizer(), tmp_path / "final") / "README.md").read_text()
    for fact in (
        f"| Base model | {base} |",
        "loss sigmoid, beta 0.3",
        "| Global batch | 2 pairs |",
        "| Steps | 2 (0.50 epochs) |",
        "| Learning rate | 0.001, cosine |",
        "- dpo",
    ):
        assert fact in card


def test_rows_beyond_learned_positions_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for rl in ("dpo", "kto"):
        rows = prepared_labelled(8) if rl == "kto" else prepared_pairs(8)
        config = {"base_model": "tiny", "rl": rl, "output_dir": str(tmp_path), "micro_batch_size": 2, "max_steps": 1}
        builder = HFRLTrainerBuilder(config, tiny_gpt2(tokenizer, n_positions=16), tokenizer)
        builder.train_dataset = rows
        with pytest.raises(ValueError, match="sequence_len: row 0 of .* tokens, and the model has .* positions for 16; set"):
            builder.build().train()


def test_single_tokens_of_an_embedding_that_is_the_head_too_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    keys = {"adapter": "lora", "peft_trainable_token_indices": [5, 6], "lora_target_modules": ["q_proj"]}
    builder = HFRLTrainerBuilder({"base_model": "tiny", "output_dir": str(tmp_path), **keys}, tiny_qwen(tokenizer), tokenizer)
    builder.train_dataset = prepared_pairs(8)
    with pytest.raises(ValueError, match="peft_trainable_token_indices: the embeddings of this model are its output head too"):
        builder.build()


MEDIA: dict[str, tuple[dict[str, Any], str]] = {
    "a picture": ({"images": [{"bytes": b"x", "path": None}]}, "the column 'images' is no text"),
    "one picture": ({"image": "a.png"}, "the column 'image' is no text"),
    "a part": (
        {"prompt": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}]},
        "a part of type 'image' in 'prompt' is no text",
    ),
}


@pytest.mark.parametrize("name", list(MEDIA))
@pytest.mark.parametrize("where", ["builder", "setter", "evaluation", "stream"])
def test_pictures_are_refused(where: str, name: str, tmp_path: Path) -> None:
    """In every way that rows come in; the vision tower would never see them."""
    added, message = MEDIA[name]
    answers: dict[str, Any] = {"chosen": "A", "rejected": "B"}
    if name == "a part":
        answers = {key: [{"role": "assistant", "content": [{"type": "text", "text": text}]}] for key, text in answers.items()}
    rows = [{"prompt": "What?", **answers, **added}] * 2
    tokenizer = tiny_tokenizer()
    config = {"base_model": "tiny", "output_dir": str(tmp_path), "max_steps": 1}
    builder = HFRLTrainerBuilder(config, tiny_model(tokenizer), tokenizer)

    def give() -> None:
        if where in ("builder", "stream"):
            builder.train_dataset = Dataset.from_list(rows).to_iterable_dataset() if where == "stream" else rows
            builder.build().train()
        elif where == "setter":
            builder.build().train_dataset = rows
        else:
            builder.build().eval_dataset = {"one": rows}

    with pytest.raises(ValueError, match=message):
        give()
