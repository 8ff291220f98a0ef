"""Seconds, tokens and operations of steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from strategies.mixins.clock import STEP_PARTS, StepClock
from strategies.models import peak
from strategies.models.work import Tokens, triangle, work_of
from tests.laws.runs import LORA, losses, trained
from tests.tiny import tiny_gpt2, tiny_model, tiny_qwen, tiny_tokenizer


def test_the_clock_splits_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0, 36.0, 45.0])
    monkeypatch.setattr("strategies.mixins.clock.time.perf_counter", lambda: next(ticks))
    clock = StepClock()
    with clock.part("data"):  # 0 to 1
        pass
    clock.enter("forward")  # 3 to 6
    clock.enter("backward")  # 6 to 10
    clock.enter("optimizer")  # 10 to 15
    clock.on_step_end(None, None, None)
    clock.on_log(None, None, None, logs={"loss": 1.0})  # 15 to 21
    clock.on_log(None, None, None, logs={"eval_loss": 1.0})
    clock.on_evaluate(None, None, None)  # 21 to 28
    clock.on_save(None, None, None)  # 28 to 36
    parts = {"data": 1.0, "forward": 3.0, "backward": 4.0, "optimizer": 5.0, "other": 6.0, "evaluation": 7.0, "save": 8.0}
    assert clock.take() == (parts, 1)
    assert clock.take() == ({}, 0)


@pytest.mark.parametrize("make", [tiny_model, tiny_qwen, tiny_gpt2])
@pytest.mark.parametrize("frozen", [False, True])
def test_operations_are_those_of_torch(make: Any, frozen: bool) -> None:
    """torch counts a square of attention, and gradients of attention by a factor of 2.5, so there they are left out."""
    model = make(tiny_tokenizer())
    model.set_attn_implementation("eager")
    if frozen:
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)
    ids = torch.randint(0, 200, (3, 40))
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids).logits.sum().backward()
    work = work_of(model)
    assert work is not None
    tokens = Tokens(ids.numel(), 3 * 40 * 40, ids.numel())  # every token's product with every other one is computed
    assert work.training(tokens) == pytest.approx(counted.get_total_flops(), rel=0.02)


def test_experts_and_pictures_have_no_count() -> None:
    model = tiny_model(tiny_tokenizer())
    model.config.num_local_experts = 4
    assert work_of(model) is None


@pytest.mark.parametrize("keys", [{}, {"sample_packing": False}, {"rl": "kto", **LORA}], ids=["packed", "padded", "kto"])
def test_a_record_has_the_speed_of_its_steps(keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.mixins.speed.peak_of", lambda device, dtype: 1e12)
    trainer = trained(tmp_path, micro_batch_size=4, save_strategy="steps", save_steps=1, **keys)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in entries:
        parts = {name.removeprefix("seconds/"): value for name, value in entry.items() if name.startswith("seconds/")}
        assert parts.pop("step") == pytest.approx(sum(parts.values()))
        # What follows a step counts with the next one.
        assert parts.keys() | {"other"} == set(STEP_PARTS) - {"generation"} and min(parts.values()) >= 0
        rows = "rows" if keys.get("rl") == "kto" else "pairs"
        assert entry[f"{rows}_per_second"] * entry["seconds/step"] == pytest.approx(4)
        assert entry["operations/step"] / entry["seconds/step"] / 1e12 == pytest.approx(entry["mfu"])
        padded = entry["fed_tokens_per_second"] / entry["tokens_per_second"]
        assert padded < 1 if not keys else padded >= 1
    assert len(losses(trainer, "save_seconds")) == len(entries) - 1, "that of the last step has no record of a step after it"


def test_a_live_reference_is_counted() -> None:
    work = work_of(tiny_model(tiny_tokenizer()))
    assert work is not None
    tokens = Tokens(100, triangle(100), 50)
    assert work.training(tokens) == pytest.approx(3 * work.forward(tokens))  # all weights are trained


def test_a_peak_is_measured_once(tmp_path: Path) -> None:
    file, cpu = tmp_path / "cache" / "peaks.json", torch.device("cpu")
    first = peak.peak_of(cpu, torch.float32, file)
    (known,) = json.loads(file.read_text()).values()
    assert first == known > 1e8
    file.write_text(file.read_text().replace(str(known), "5.0"))
    assert peak.peak_of(cpu, torch.float32, file) == 5.0
    file.write_text("half a fi")
    assert peak.peak_of(cpu, torch.float32, file) > 1e8
    (tmp_path / "file").write_text("")
    assert peak.peak_of(cpu, torch.float32, tmp_path / "file" / "peaks.json") > 1e8  # can't be written
