"""Each patch of DeepSpeed has a test that fails when it is no longer needed."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from deepspeed import ops
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import builder as builders
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from strategies.deepspeed_patches import SHARED_MEMORY, keep_float32_weights_once, talk_through_gloo


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
