"""All private names of accelerate, DeepSpeed, torch, transformers and TRL that this package uses, each with the reason.

Written for accelerate 1.15, DeepSpeed 0.19.8, torch 2.13, transformers 5 and TRL 1.16. Each entry has a test in
`tests/strategies/test_compat.py` that fails when it is no longer needed. What our trainers
override or use of their own base classes is listed in `strategies/trainers/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

__all__ = [
    "SHARED_MEMORY",
    "accelerate_states",
    "attention_of",
    "clear_logged_loss",
    "collectives_begun",
    "converts_weights",
    "exposed_exchange_s",
    "fsdp_on_any_device",
    "keep_float32_weights_once",
    "leave_out_of_ddp",
    "local_part",
    "mark_states_linked",
    "set_exchange",
    "set_last_rates",
    "state_fragment",
    "store_of_processes",
    "supports_sdpa",
    "tags_of",
    "talk_through_gloo",
    "tokenizer_of",
    "unsaved_weights",
    "unsplit_layers",
]

SHARED_MEMORY = "deepspeed_shm_comm"


def keep_float32_weights_once() -> None:
    """Make ZeRO-3 store float32 weights once instead of twice; idempotent.

    Its optimizer shares them with the model if `tensor.device == self.device` (`_create_fp32_partitions` of
    `runtime/zero/stage3.py`). But `self.device` is a string there ("cpu", "cuda:0"), which equals no device: they are copied.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    original = DeepSpeedZeroOptimizer_Stage3._create_fp32_partitions
    # `wraps` has set it: replaced already.
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def create(self: Any) -> None:
        name = self.device
        self.device = torch.device(name)
        try:
            original(self)
        finally:
            self.device = name

    DeepSpeedZeroOptimizer_Stage3._create_fp32_partitions = create


def talk_through_gloo() -> None:
    """Disable DeepSpeed's shared-memory collectives for CPUs, and their compilation.

    A worker killed while it compiles or loads them leaves a lock file in the user's cache, for which later runs wait forever;
    and the peers of a worker killed in such a collective wait forever for its flags in memory.
    """
    from deepspeed import ops

    ops.__compatible_ops__[SHARED_MEMORY] = False


def state_fragment(parameter: Any) -> Any:
    """Return the mapping of DeepSpeed's stages 1 and 2 from a parameter to its states on this rank; None if it has none.

    `deepspeed.utils.safe_get_full_*` gathers whole tensors; no public function returns the local part and its range.
    """
    return parameter._hp_mapping


def mark_states_linked(optimizer: Any) -> None:
    """Mark all parameter groups of DeepSpeed's optimizer as linked to their states; it links only the first one itself."""
    optimizer._hp_optimizer_states_linked = True


@contextmanager
def fsdp_on_any_device() -> Iterator[None]:
    """Context in which a new `Accelerator` shards by FSDP2 on CPUs too, with float32 outputs and gradient reduction.

    accelerate 1.15.0 uses an `fsdp_plugin` only with GPUs or similar devices, and otherwise falls back to DDP silently
    (`AcceleratorState.__init__`). The rest of it works on any device, so the two values that it doesn't set are set here.
    With bfloat16 it would also round the model's outputs, such as log-probabilities, and reduce gradients in bfloat16.
    """
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is None:
            return
        # A single process has the type NO, and nothing to shard.
        if self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
            self.distributed_type = DistributedType.FSDP
            # As the original does at its end, with the type that it has found.
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if plugin.mixed_precision_policy is not None:
            policy = plugin.mixed_precision_policy
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = original


def set_exchange(state: Any, now: bool) -> None:
    """Set whether gradients are exchanged in the next backward pass, in accelerate's `GradientState`.

    DeepSpeed's optimizer steps in such a pass. `Accelerator.accumulate` sets it only by a count of forwards.
    """
    state._set_sync_gradients(now)


def attention_of(config: Any) -> str | None:
    """Return a model's attention implementation; the public `attn_implementation` is only an argument."""
    return config._attn_implementation


def supports_sdpa(model: Any) -> bool:
    """Return whether a model supports transformers' attention interface; no public name has this."""
    return bool(model._supports_sdpa)


def unsplit_layers(model: Any) -> set[str]:
    """Return the class names of layers that are not split; transformers passes them to accelerate itself."""
    return set(model._no_split_modules or ())


def tags_of(trainer: Any) -> list[str]:
    """Return a TRL trainer's tags for model cards; `create_model_card` writes them only into TRL's own card."""
    return list(trainer._tag_names)


def tokenizer_of(trainer: Any) -> Any:
    """Return a TRL trainer's tokenizer; the public `processing_class` may be a processor, which holds one."""
    return trainer._tokenizer


def unsaved_weights(model: Any) -> set[str]:
    """Return the names of weights that transformers doesn't save; `save_pretrained` leaves them out itself."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def converts_weights(model: Any) -> bool:
    """Return whether names or shapes of weights on disk differ from the model's; only `save_pretrained` converts them."""
    return bool(getattr(model, "_weight_conversions", None))


def clear_logged_loss(trainer: Any) -> None:
    """Set transformers' running loss to 0 if it has just been logged.

    It subtracts the loss from itself (`_maybe_log_save_evaluate`), which is nan from then on if a skipped step's is infinite.
    """
    if trainer._globalstep_last_logged == trainer.state.global_step:
        trainer._tr_loss.zero_()


def set_last_rates(scheduler: Any, rates: list[Any]) -> None:
    """Set what `get_last_lr` of a torch schedule returns; otherwise only its `step` does."""
    scheduler._last_lr = rates


def local_part(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and offset of this rank's part of a DTensor; `to_local` returns its values alone."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def exposed_exchange_s(model: Any) -> float | None:
    """Return the seconds that DDP's last measured backward waited for gradients of other workers; None without DDP.

    DDP measures its first ten steps and then every hundredth one, whether this is read or not.
    """
    if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return None
    measured = model._get_ddp_logging_data()
    names = ("backward_comm_time", "backward_compute_comm_overlap_time")
    exchanged, overlapped = (int(measured.get(name, 0)) for name in names)
    return max(0, exchanged - overlapped) / 1e9


def accelerate_states() -> tuple[dict[str, Any], ...]:
    """Return the dicts that are the attributes of accelerate's singletons: the process's, the accelerators', the gradients'."""
    return PartialState._shared_state, AcceleratorState._shared_state, GradientState._shared_state


def collectives_begun(group: Any) -> int:
    """Return how many collectives this process has begun in a group; torch compares these numbers in its own debugging."""
    return int(group._get_sequence_number_for_group())


def leave_out_of_ddp(model: torch.nn.Module, names: list[str]) -> None:
    """Let DDP neither compare nor send these parameters and buffers: it sends all of a model, also what isn't trained."""
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def writes_counted(tensor: torch.Tensor) -> int:
    """Return how often autograd has counted that a tensor was written to; it compares these numbers in a backward."""
    return int(tensor._version)


def store_of_processes() -> Any:
    """Return the store by which the processes of torch's default group have found each other; no public name has it."""
    return torch.distributed.distributed_c10d._get_default_store()
