"""`deepspeed:` and `fsdp_config:` as dicts, and what is said about wrong ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterKeys
from cluster.sharding import STAGES, find_problems, sharding_arguments, sharding_of

TWO = {"ray": {"num_workers": 2}}


def keys(**given: Any) -> ClusterKeys:
    return ClusterKeys.model_validate({**TWO, **given})


def problems(**given: Any) -> str:
    return "\n".join(f"{path}: {message}" for path, message in find_problems(keys(**given)))


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_a_config_of_deepspeed(name: str) -> None:
    assert not problems(deepspeed=name)
    config = sharding_arguments(keys(deepspeed=name))["deepspeed"]
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[4]) and sharding_of(keys(deepspeed=name)) == name[:5]
    moved = {part for part in ("offload_optimizer", "offload_param") if part in zero}
    expected = {"offload_optimizer", *(["offload_param"] if name[4] == "3" else [])} if "offload" in name else set()
    assert moved == expected
    assert config["gradient_clipping"] == config["train_batch_size"] == config["bf16"]["enabled"] == "auto"
    assert config["zero_allow_untested_optimizer"] and not config["zero_force_ds_cpu_optimizer"]


def test_a_file_and_a_mapping_are_taken_as_they_are(tmp_path: Path) -> None:
    mapping = {
        "zero_optimization": {"stage": 1, "overlap_comm": True},
        "bf16": {"enabled": True},
        "wall_clock_breakdown": False,
    }
    file = tmp_path / "zero1.json"
    file.write_text(json.dumps(mapping))
    found, same = (sharding_arguments(keys(deepspeed=given))["deepspeed"] for given in (mapping, str(file)))
    assert found == same
    assert mapping.items() <= found.items() and found["gradient_accumulation_steps"] == "auto"
    found["zero_optimization"]["stage"] = 3
    assert mapping["zero_optimization"]["stage"] == 1  # type: ignore[index]


def test_fsdp_by_axolotls_keys_becomes_that_of_transformers() -> None:
    config = {
        "fsdp_version": 2,
        "offload_params": True,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "reshard_after_forward": True,
        "state_dict_type": "SHARDED_STATE_DICT",
    }
    assert not problems(fsdp_config=config)
    assert sharding_arguments(keys(fsdp_config=config)) == {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "cpu_offload": True,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
            "reshard_after_forward": True,
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    }
    assert sharding_of(keys(fsdp_config={})) == "fsdp2"


def test_neither_key_is_ddp() -> None:
    assert (sharding_of(keys()), sharding_arguments(keys()), problems()) == (None, {}, "")


ZERO = {"zero_optimization": {"stage": 2}}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"deepspeed": "zero2", "fsdp_config": {}}, "fsdp_config: contradicts deepspeed; keep one of them"),
    "one worker": (
        {"deepspeed": "zero2", "ray": {"num_workers": 1}},
        "deepspeed: divides a model among workers, and this run has one; set ray.num_workers, or remove it",
    ),
    "stage": ({"deepspeed": "zero4"}, "deepspeed: unknown stage 'zero4'; available: zero1, zero2, zero3, zero1_offload, "),
    "Axolotl's file": (
        {"deepspeed": "deepspeed_configs/zero1.json"},
        "deepspeed: there is no file 'deepspeed_configs/zero1.json'; write `deepspeed: zero1` for the stage of that name",
    ),
    "Axolotl's file of bf16": ({"deepspeed": "deepspeed_configs/zero3_bf16.json"}, "write `deepspeed: zero3` for the stage"),
    "no file": ({"deepspeed": "my/ds.json"}, "deepspeed: there is no file 'my/ds.json'; built in: zero1, zero2"),
    "stage 5": (
        {"deepspeed": {"zero_optimization": {"stage": 5}}},
        "deepspeed.zero_optimization.stage: must be 1, 2 or 3, got 5",
    ),
    "stage 0": ({"deepspeed": {"zero_optimization": {"stage": 0}}}, "stage: must be 1, 2 or 3, got 0; remove deepspeed"),
    "full checkpoints": (
        {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}},
        "fsdp_config.state_dict_type: checkpoints hold each worker's part, as SHARDED_STATE_DICT; remove it",
    ),
    "one worker at least": (
        {"deepspeed": "zero2", "ray": {"num_workers": {"min": 1, "max": 2}}},
        "ray.num_workers: deepspeed divides a model among workers; set min to 2 or more",
    ),
    "no stage": ({"deepspeed": {"bf16": {"enabled": "auto"}}}, "stage: must be 1, 2 or 3, got None"),
    "batch": (
        {"deepspeed": {**ZERO, "train_batch_size": 8}},
        "deepspeed.train_batch_size: follows from micro_batch_size and gradient_accumulation_steps; write auto, or remove it",
    ),
    "clipping": ({"deepspeed": {**ZERO, "gradient_clipping": 1.0}}, "deepspeed.gradient_clipping: follows from max_grad_norm;"),
    "optimizer": (
        {"deepspeed": {**ZERO, "optimizer": {"type": "AdamW"}}},
        "deepspeed.optimizer: the recipe's own key `optimizer` decides; remove the section",
    ),
    "scheduler": (
        {"deepspeed": {**ZERO, "scheduler": {"type": "WarmupLR"}}},
        "deepspeed.scheduler: the recipe's own key `lr_scheduler` decides",
    ),
    "a key that is none": (
        {"deepspeed": {**ZERO, "zero_optimisation": {}}},
        "deepspeed.zero_optimisation: no key of DeepSpeed's that means something here; did you mean 'zero_optimization'?",
    ),
    "FSDP1": ({"fsdp_config": {"fsdp_version": 1}}, "fsdp_config.fsdp_version: only FSDP2 is supported; write 2, got 1"),
    "precision": (
        {"fsdp_config": {"mixed_precision_policy": "bf16"}},
        "fsdp_config.mixed_precision_policy: follows from bf16 and fp16; remove it",
    ),
    "final": (
        {"fsdp_config": {"final_state_dict_type": "SHARDED_STATE_DICT"}},
        "fsdp_config.final_state_dict_type: the trained model is always written whole, as FULL_STATE_DICT; remove it",
    ),
    "loading": (
        {"fsdp_config": {"cpu_ram_efficient_loading": True}},
        "fsdp_config.cpu_ram_efficient_loading: is not supported: every worker loads the weights; remove it",
    ),
    "pinning": ({"fsdp_config": {"cpu_offload_pin_memory": False}}, "fsdp_config.cpu_offload_pin_memory: is not supported:"),
    "size": (
        {"fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP"}},
        "fsdp_config.auto_wrap_policy: SIZE_BASED_WRAP isn't supported: models are wrapped by layer; write ",
    ),
    "no size": (
        {"fsdp_config": {"min_num_params": 100}},
        "fsdp_config.min_num_params: belongs to SIZE_BASED_WRAP, which isn't supported; remove it",
    ),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_wrong_is_said(name: str) -> None:
    given, message = WRONG[name]
    assert re.search(re.escape(message), problems(**given))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is no JSON file: "), ("[1]", "holds no mapping of DeepSpeed's keys, but a list")]
)
def test_a_file_that_holds_no_config(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "zero.json"
    file.write_text(text)
    assert re.match(f"deepspeed: '{file}' {message}", problems(deepspeed=str(file)))
