"""Config keys become training arguments."""

from __future__ import annotations

from typing import Any

import pytest

from strategies.config import StrategyConfig, as_config
from strategies.config.arguments import SAME, common_arguments
from strategies.config.schedule import RunLength
from strategies.config.trackers import tracker_environment
from strategies.trainers.arguments import AxolotlDPOConfig


def arguments(**keys: Any) -> dict[str, Any]:
    config = as_config({"base_model": "tiny", "rl": "dpo", **keys})
    return common_arguments(config, RunLength(10, 10, None))


def test_every_key_and_every_argument_exists() -> None:
    assert set(SAME) <= set(StrategyConfig.model_fields)
    assert set(SAME.values()) <= set(AxolotlDPOConfig.__dataclass_fields__)


def test_values_arrive() -> None:
    keys = {
        "micro_batch_size": 3,
        "gradient_accumulation_steps": 5,
        "adam_beta2": 0.95,
        "max_grad_norm": 0.5,
        "optimizer": "ademamix",
        "optim_args": {"alpha": 4, "beta3": 0.999},
        "save_total_limit": 2,
        "dataloader_drop_last": True,
    }
    found = AxolotlDPOConfig(**arguments(**keys))
    assert found.per_device_train_batch_size == found.per_device_eval_batch_size == 3
    assert (found.gradient_accumulation_steps, found.adam_beta2) == (5, 0.95)
    assert (found.max_grad_norm, found.optim_args, found.save_total_limit) == (0.5, "alpha=4,beta3=0.999", 2)
    assert found.dataloader_drop_last is True
    assert found.max_steps == 10


def test_defaults_are_the_schemas_and_not_trls() -> None:
    found = AxolotlDPOConfig(**arguments())
    assert (found.learning_rate, found.gradient_checkpointing, found.bf16, found.report_to) == (5e-6, False, False, [])
    assert (found.pad_to_multiple_of, found.save_total_limit, found.lr_scheduler_type.value) == (None, 4, "cosine")


def test_checkpointing_is_turned_on_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    found = AxolotlDPOConfig(**arguments(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}))
    assert found.gradient_checkpointing is True
    assert found.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]


@pytest.mark.parametrize(
    ("given", "autocast", "full"),
    [("auto", False, False), (True, True, False), ("full", True, True), (False, False, False)],
)
def test_bf16_on_cpu(given: Any, autocast: bool, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = arguments(bf16=given)
    assert (found["bf16"], found["bf16_full_eval"]) == (autocast, full)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fp16": True}, "fp16: float16 needs a GPU"),
        ({"optimizer": "adamv"}, "optimizer: unknown optimizer 'adamv'; available: adafactor, adagrad"),
        ({"lr_scheduler": "cosinus"}, "lr_scheduler: unknown lr_scheduler 'cosinus'; available: rex, one_cycle, constant"),
    ],
)
def test_what_does_not_exist_is_an_error(keys: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        arguments(**keys)


def test_own_schedules_go_by_another_argument() -> None:
    found = arguments(lr_scheduler="rex")
    assert (found["lr_scheduler_type"], found["alternate_lr_scheduler_type"]) == ("cosine", "rex")


def test_trackers() -> None:
    keys = {"use_wandb": True, "wandb_project": "p", "wandb_name": "n", "wandb_run_id": "7", "use_tensorboard": True}
    found = arguments(**keys)
    assert (found["report_to"], found["run_name"]) == (["tensorboard", "wandb"], "n")
    environment = tracker_environment(as_config({"base_model": "tiny", "rl": "dpo", "output_dir": "/runs/1", **keys}))
    assert environment == {
        "WANDB_PROJECT": "p",
        "WANDB_RUN_ID": "7",
        "WANDB_RESUME": "allow",
        "TENSORBOARD_LOGGING_DIR": "/runs/1/tensorboard",
    }


def test_the_hub_is_left_alone_unless_named() -> None:
    assert "push_to_hub" not in arguments()
    found = arguments(hub_model_id="me/model", hub_strategy="end")
    assert (found["push_to_hub"], found["hub_private_repo"], found["hub_strategy"]) == (True, True, "end")
