"""A closed formula of a worker's peak memory.

Weights, gradients and optimizer state are counted on models of the meta device, which have shapes and no contents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from strategies.config import as_config
from strategies.memory.activations import Activations, weights_of
from strategies.memory.worst_case import Forward, largest_forward
from strategies.methods.registry import get_strategy
from strategies.models.config import load_config, model_class
from strategies.models.loading import build_peft_config, match_adapter_dtype
from strategies.models.location import resolve_model_location
from strategies.models.precision import resolve_bf16
from strategies.models.tokenizer import load_tokenizer
from strategies.packing.support import why_not_packed
from strategies.vision.modules import has_tower

__all__ = ["ITEMS", "LAYERS", "MemoryEstimate", "STATES", "estimate", "state_bytes"]

STATES: dict[str, tuple[int, str]] = {
    **dict.fromkeys("adamw_torch adamw_torch_fused adamw_torch_npu_fused adamw_torch_xla stable_adamw".split(), (2, "same")),
    **dict.fromkeys("schedule_free_adamw schedule_free_radam".split(), (2, "same")),
    **dict.fromkeys("adagrad rmsprop schedule_free_sgd".split(), (1, "same")),
    "sgd": (0, "same"),
    "adafactor": (1, "factored"),
    "paged_adamw_32bit": (2, "float32"),
    **dict.fromkeys("ademamix paged_ademamix_32bit".split(), (3, "float32")),
    **dict.fromkeys("lion_32bit paged_lion_32bit rmsprop_bnb rmsprop_bnb_32bit".split(), (1, "float32")),
    **dict.fromkeys("adamw_8bit adamw_bnb_8bit paged_adamw_8bit adamw_torch_8bit".split(), (2, "blocks")),
    **dict.fromkeys("lion_8bit paged_lion_8bit rmsprop_bnb_8bit".split(), (1, "blocks")),
    **dict.fromkeys("ademamix_8bit paged_ademamix_8bit".split(), (3, "blocks")),
}
"""Tensors per parameter and their kind, by the optimizer's name; steps, of 4 bytes each, are left out."""


def state_bytes(optimizer: str, parameters: Iterable[Any]) -> tuple[int, str | None]:
    """Return the bytes of the state, and a note where the optimizer isn't in the table (then AdamW's are counted)."""
    note = None
    if optimizer not in STATES:
        note = f"optimizer: what {optimizer} keeps is not known here; AdamW's state is counted instead"
    number, kind = STATES.get(optimizer, STATES["adamw_torch"])
    return sum(number * _tensor_bytes(kind, parameter) for parameter in parameters), note


def _tensor_bytes(kind: str, parameter: Any) -> int:
    size, shape = parameter.numel(), parameter.shape
    if kind == "same":
        return size * parameter.element_size()
    if kind == "blocks" and size >= 4096:  # a byte per weight and a float32 per block of 256; bitsandbytes leaves small ones
        return size + 4 * -(-size // 256)
    if kind == "factored" and len(shape) > 1:  # a row and a column for a matrix (arXiv 1804.04235)
        return 4 * (size // shape[-1] + size // shape[-2])
    return 4 * size


LIBRARIES = 572 * 2**20
"""Bytes of a CPU worker before there is a model: Python, torch, transformers, TRL, PEFT, DeepSpeed and Ray.

Measured on Linux: 526 MiB without Ray, and 46 for `ray.train` and `ray.data`.
"""
STARTED = 45 * 2**20
"""Bytes that a trainer, its data loader and the kernels of its first step add, whatever the model; measured on Linux."""
GPU_PROCESS = 600 * 2**20
"""Bytes of GPU memory that a process takes before its first tensor (CUDA's context and libraries). Usual; unmeasured."""
QUANTIZED = {"load_in_4bit": 0.5, "load_in_8bit": 1.0}
"""Bytes per weight of a quantized linear layer, scales (a few percent) left out."""

LAYERS = "layers"
"""What divides the frozen layers of a base that trials share, and leaves the rest whole; beside the shardings of a run."""

PICTURES = (
    "pictures: what encoding them holds is not known here, and left out; where rows have none, the tower is not trained, and "
    "takes only its weights"
)
PADDED_PICTURES = "pictures: their positions have three dimensions in this model, and batches are padded where rows have any"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one worker at its peak: on a CPU of the process, on a GPU of that."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    """Without the token head's: what the layers hold at the moment when most is held."""
    token_head: int
    """Tensors of the vocabulary's size at that moment: logits held at once, the gradient of the head's weights."""
    buckets: int
    """DDP's copy of the gradients."""
    process: int
    forward: Forward
    checkpoint: int
    """A checkpoint on disk: the trained weights and the optimizer's state."""
    undivided: int | None = None
    """The total under DDP, where the model is divided."""
    rows: int = 0
    """Lengths and order of the prepared rows, where these are known; the rows themselves are mapped from files."""
    notes: tuple[str, ...] = ()
    """What could not be computed, and what was done instead."""

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return sum(self.items().values())

    def items(self) -> dict[str, int]:
        """Bytes by field."""
        return {name: getattr(self, name) for name in ITEMS}


ITEMS = tuple(
    field.name for field in fields(MemoryEstimate) if field.name not in ("forward", "checkpoint", "undivided", "notes")
)
"""Fields of `MemoryEstimate` that add up."""


def estimate(
    cfg: Any, world_size: int = 1, gpu: bool = False, sharding: str | None = None, joint_tokens: int = 0
) -> MemoryEstimate:
    """Predict the peak memory of one worker.

    The worst case that the config allows: a forward full of the longest sequences, while gradients of an earlier forward
    of the same step are held. What an optimizer's update needs on top is left out, for activations are gone by then; so is
    loading, which holds the weights up to three times, and what a C library keeps of freed tensors for later: under glibc's
    defaults a process on a CPU holds up to twice what is in use; with MALLOC_TRIM_THRESHOLD_ set, hardly more.

    Args:
        cfg: a validated config, or a dict of the same keys.
        world_size: number of workers.
        gpu: whether workers have a GPU; its attention and kernels are taken to hold what the CPU's do, or less.
        sharding: `zero1`, `zero2`, `zero3` or `fsdp2`, or `LAYERS`; None for DDP.
        joint_tokens: of a forward in which packed rows of several such runs stand, if it is larger than one run's.

    Raises:
        ValueError: when there is no model, or no usable config of one, at the given place.
    """
    cfg = as_config(cfg)
    config = load_config(cfg)
    # As the builder resolves it for a CPU; on a GPU `auto` stands for true.
    if not gpu:
        cfg = resolve_bf16(cfg, lambda: getattr(config.get_text_config(), "hidden_size", None))
    is_live = get_strategy(cfg.rl).reference_mode(cfg) == "live"
    with torch.device("meta"):
        policy = _adapted(cfg, _base(cfg, config))
        other = _base(cfg, load_config(cfg, "reference_model")) if is_live and cfg.reference_model else None
    reasons = (why_not_packed(model, cfg.sequence_len) for model in (policy, other) if model is not None)
    forward = largest_forward(cfg, next(filter(None, reasons), None))
    if forward.packed:
        forward = replace(forward, tokens=max(forward.tokens, joint_tokens))
    held = Activations(policy, cfg)
    activations, token_head = held.peak(forward, gpu)
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    weights, saved, gradients = _size(policy), _saved_by_quantization(cfg, policy), _bytes(trainable)
    optimizer, unknown = state_bytes(cfg.optimizer, trainable)
    reference = 0
    if is_live:
        # A continued adapter's reference is a frozen copy of it, as large as its gradients; a new one's is the base itself. The
        # copy of the base that `load_reference` makes for initialisations that change it (PiSSA) is not counted.
        copied = weights if cfg.adapter is None else gradients if cfg.lora_model_dir is not None else 0
        reference = copied if other is None else _size(other)
    text = config.get_text_config()
    notes = {
        held.note: True,
        unknown: True,
        "quantized weights are counted without their scales and without the buffers that unpack them": saved,
        PICTURES: has_tower(policy),
        PADDED_PICTURES: has_tower(policy) and "mrope_section" in (getattr(text, "rope_parameters", None) or {}),
        "torch_compile: compiled models hold less than was counted here, and compiling takes host memory": cfg.torch_compile,
    }
    found = MemoryEstimate(
        weights=weights - saved,
        gradients=gradients,
        optimizer=optimizer,
        reference=reference,
        activations=activations,
        token_head=token_head,
        buckets=gradients if world_size > 1 and sharding in (None, LAYERS) else 0,
        process=GPU_PROCESS if gpu else LIBRARIES + STARTED,
        forward=forward,
        # Gradients are as large as the trained weights.
        checkpoint=gradients + optimizer,
        notes=tuple(note for note, holds in notes.items() if note is not None and holds),
    )
    return found if sharding is None else _divided(found, sharding, world_size, held)


def _divided(whole: MemoryEstimate, sharding: str, workers: int, held: Activations) -> MemoryEstimate:
    """Divide the model's part among workers, as `benchmarks/sharding_memory.py` counts it in float32."""
    weights, gradients, optimizer = whole.weights, whole.gradients, whole.optimizer
    if sharding == LAYERS:
        one = held.frozen // max(1, held.number)  # whole while it is computed
        return replace(whole, weights=weights - held.frozen + held.frozen // workers + one, undivided=whole.total)
    is_zero, is_half = sharding != "fsdp2", held.autocast
    if is_zero and (is_half or sharding != "zero3"):
        optimizer += gradients  # DeepSpeed's float32 copy of the weights; ZeRO-3 makes none of float32 weights
    if is_zero and is_half:
        weights, gradients = weights // 2, gradients // 2
    if sharding in ("zero3", "fsdp2"):
        layer = weights_of(held.layer) * held.size  # whole while it is computed
        weights, gradients = weights // workers + layer, gradients // workers
    optimizer //= workers
    return replace(whole, weights=weights, gradients=gradients, optimizer=optimizer, undivided=whole.total)


def _base(cfg: Any, config: Any) -> PreTrainedModel:
    kwargs = {"attn_implementation": cfg.attn_implementation} if cfg.attn_implementation else {}
    half = cfg.bf16 == "full" or cfg.load_in_4bit or cfg.load_in_8bit
    dtype = torch.bfloat16 if half else torch.float32
    model = model_class(config).from_config(config, dtype=dtype, trust_remote_code=cfg.trust_remote_code, **kwargs)
    size = len(load_tokenizer(cfg))
    if size > model.get_input_embeddings().num_embeddings:
        multiple = 32 if cfg.resize_token_embeddings_to_32x else None
        # `mean_resizing` would compute a mean and a covariance of weights, which the meta device doesn't have.
        model.resize_token_embeddings(size, pad_to_multiple_of=multiple, mean_resizing=False)
    return model


def _adapted(cfg: Any, model: PreTrainedModel) -> Any:
    if cfg.adapter is None:
        return model
    if cfg.lora_model_dir is not None:
        adapter = PeftConfig.from_pretrained(resolve_model_location(cfg.lora_model_dir, "lora_model_dir").path)
        adapter.inference_mode = False
    else:
        adapter = build_peft_config(cfg, model)
    # Some initialisations compute with the weights; shapes are the same with all of them.
    adapter.init_lora_weights = True
    policy = get_peft_model(model, adapter)
    if cfg.peft_autocast_adapter_dtype is False:
        match_adapter_dtype(policy)
    return policy


def _saved_by_quantization(cfg: Any, policy: Any) -> int:
    factor = next((bytes_ for name, bytes_ in QUANTIZED.items() if getattr(cfg, name)), None)
    if factor is None:
        return 0
    base = policy.get_base_model()
    # As bitsandbytes quantizes: linear layers, and not the output head.
    linear = (layer for layer in base.modules() if isinstance(layer, nn.Linear) and layer is not base.get_output_embeddings())
    frozen = (layer.weight for layer in linear if not layer.weight.requires_grad)
    return int(sum(weight.numel() * (weight.element_size() - factor) for weight in frozen))


def _size(model: Any) -> int:
    return _bytes((*model.parameters(), *model.buffers()))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
