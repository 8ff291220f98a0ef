"""Each entry of the compat module has a test that fails when it is no longer needed."""

from __future__ import annotations

import importlib
import inspect

import deepspeed.utils
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from deepspeed import ops
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import builder as builders
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, Trainer, core_model_loading
from trl import DPOTrainer

from strategies.compat import (
    SHARED_MEMORY,
    accelerate_states,
    attention_of,
    fsdp_on_any_device,
    keep_float32_weights_once,
    set_last_rates,
    supports_sdpa,
    talk_through_gloo,
    unsplit_layers,
)


def test_deepspeed_still_compares_a_device_with_text() -> None:
    """When this fails, delete `keep_float32_weights_once`."""
    keep_float32_weights_once()
    source = inspect.getsource(inspect.unwrap(DeepSpeedZeroOptimizer_Stage3._create_fp32_partitions))
    name = get_accelerator().current_device_name()
    assert ".device == self.device" in source
    assert isinstance(name, str) and torch.device(name) != name


def test_the_patch_is_put_on_once() -> None:
    keep_float32_weights_once()
    patched = DeepSpeedZeroOptimizer_Stage3._create_fp32_partitions
    keep_float32_weights_once()
    assert DeepSpeedZeroOptimizer_Stage3._create_fp32_partitions is patched


def test_deepspeed_still_builds_collectives_behind_a_lock_that_a_kill_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """When this fails, look whether `talk_through_gloo` can go."""
    backend = importlib.import_module("deepspeed.comm.torch")

    monkeypatch.setitem(ops.__compatible_ops__, SHARED_MEMORY, True)
    monkeypatch.setattr(builders.OpBuilder, "load", lambda self, verbose=True: pytest.fail(f"built {self.name}"))
    with pytest.raises(pytest.fail.Exception, match=f"built {SHARED_MEMORY}"):
        backend.build_shm_op()
    talk_through_gloo()
    assert backend.build_shm_op() is None


def test_deepspeed_still_hides_the_part_of_a_state() -> None:
    """When this fails, delete `state_fragment`: stages 1 and 2 tell which part of a parameter a rank has."""
    source = inspect.getsource(deepspeed.utils.safe_get_local_fp32_param)
    assert "only defined for ZeRO-3" in source


def test_deepspeed_still_links_states_once() -> None:
    """When this fails, delete `mark_states_linked`."""
    source = inspect.getsource(stage_1_and_2)
    assert "if not self._hp_optimizer_states_linked:" in source


def test_accelerate_still_shards_by_fsdp_on_devices_alone() -> None:
    """When this fails, delete `fsdp_on_any_device`."""
    devices = inspect.getsource(AcceleratorState).partition("elif self.distributed_type in [")[2].partition("]")[0]
    assert "MULTI_GPU" in devices and "MULTI_CPU" not in devices
    before = AcceleratorState.__init__
    with fsdp_on_any_device():
        assert AcceleratorState.__init__ is not before
    assert AcceleratorState.__init__ is before


def test_accelerate_still_counts_forwards_by_itself() -> None:
    """When this fails, delete `set_exchange`."""
    assert "set_sync_gradients" not in dir(GradientState)


def test_transformers_still_hides_what_a_model_can() -> None:
    """When one of these fails, read it by its public name."""
    assert not isinstance(vars(PreTrainedConfig).get("attn_implementation"), property)
    assert not {"supports_sdpa", "no_split_modules"} & set(dir(PreTrainedModel))
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    model = LlamaForCausalLM(config)
    assert supports_sdpa(model) and attention_of(model.config) == "sdpa" and unsplit_layers(model) == {"LlamaDecoderLayer"}


def test_trl_still_hides_its_tags() -> None:
    """When this fails, delete `tags_of`, or `tokenizer_of`."""
    assert not {"tag_names", "tokenizer"} & set(dir(DPOTrainer))
    assert "self._tokenizer = processing_class.tokenizer" in inspect.getsource(DPOTrainer)


def test_transformers_still_hides_how_a_model_is_saved() -> None:
    """When this fails, delete `unsaved_weights` or `converts_weights`."""
    assert not {"keys_to_ignore_on_save", "weight_conversions"} & set(dir(PreTrainedModel))
    source = inspect.getsource(PreTrainedModel.save_pretrained)
    assert "._keys_to_ignore_on_save" in source and "_weight_conversions" in inspect.getsource(core_model_loading)


def test_transformers_still_subtracts_the_loss_from_itself() -> None:
    """When this fails, delete `clear_logged_loss`."""
    source = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert "tr_loss -= tr_loss" in source and "self._globalstep_last_logged = self.state.global_step" in source


def test_a_schedules_last_rates_are_still_only_read() -> None:
    """When this fails, delete `set_last_rates`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    optimizer.param_groups[0]["lr"] = 0.25
    assert schedule.get_last_lr() == [0.5] and not [name for name in dir(schedule) if name.startswith("set_")]
    set_last_rates(schedule, [0.25])
    assert schedule.get_last_lr() == [0.25]


def test_torch_still_hides_where_a_part_begins() -> None:
    """When this fails, delete `local_part`."""
    public = {name for name in (*dir(torch.distributed.tensor), *dir(DTensor)) if not name.startswith("_")}
    assert not [name for name in public if "offset" in name and "storage" not in name and "bag" not in name]


def test_accelerate_still_keeps_its_state_per_process() -> None:
    """When this fails, look what `accelerate_states` must return: attributes of all objects of these classes."""
    for cls, shared in zip((PartialState, AcceleratorState, GradientState), accelerate_states(), strict=True):
        assert type(shared) is dict and "self.__dict__ = self._shared_state" in inspect.getsource(cls.__init__)
    # Copies of these dicts are enough as long as no value is changed in place.
    assert "self.dataloader_references += [dataloader]" in inspect.getsource(GradientState)
    assert "self._dataloader_references_ref = [" in inspect.getsource(GradientState)


def test_torch_still_hides_what_slots_ask_it() -> None:
    """When this fails, delete `collectives_begun`, `leave_out_of_ddp`, `store_of_processes` or `writes_counted`."""
    public = {name for name in (*dir(torch.distributed), *dir(torch.distributed.ProcessGroup)) if not name.startswith("_")}
    public |= {name for name in dir(torch.nn.parallel.DistributedDataParallel) if not name.startswith("_")}
    public |= {name for name in dir(torch.Tensor) if not name.startswith("_")}
    assert not [
        name for name in public if "sequence" in name or "default_store" in name or "to_ignore" in name or "version" in name
    ]
