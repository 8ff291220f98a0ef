"""The models of a config without their weights: tensors with a shape, a dtype and a device that hold nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.trainer.utils import disable_dropout_in_model

from strategies.models import build_peft_config, load_config, match_adapter_dtype
from strategies.packing.support import why_not_packed
from strategies.precision import settle_bf16
from strategies.registry import get_strategy
from strategies.tokenizer import load_tokenizer

__all__ = ["Shadow"]

QUANTIZED = {"load_in_4bit": 0.5, "load_in_8bit": 1.0}
"""Bytes per weight of a quantized linear layer, scales (a few percent) left out."""


class Shadow:
    """Policy and reference as a worker would hold them.

    Args:
        cfg: a validated config.
        gpu: whether workers have a GPU, which `bf16: auto` asks for.

    Attributes:
        mode: the mode in which the tensors are to be computed with.
        policy: the model, with its adapter; as on a CPU, whose kernels it is simulated with.
        autocast: dtype of the products, None for the weights' own.
        padded_because: why the models can't take packed rows, by what their configs say; None where they can.
        notes: what is not as the config says.

    Raises:
        ValueError: when there is no model, or no usable config of one, at the given place.
    """

    def __init__(self, cfg: Any, gpu: bool = False) -> None:
        self.cfg = cfg
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        config = load_config(cfg)
        if not gpu:
            cfg = settle_bf16(cfg, lambda: getattr(config.get_text_config(), "hidden_size", None))
        bf16 = cfg.bf16 in (True, "full") or (cfg.bf16 == "auto" and not cfg.fp16)
        self.autocast = torch.bfloat16 if bf16 else torch.float16 if cfg.fp16 else None
        self.notes: list[str] = []
        with torch.device("meta"):
            self.policy = self._adapted(self._base(config))
            self.reference = self._live_reference()
        models = [model for model in (self.policy, self.reference) if model is not None]
        reasons = (why_not_packed(model, cfg.sequence_len) for model in models)
        self.padded_because = next((reason for reason in reasons if reason is not None), None)
        for model in models:
            _move(model, self.mode)
        if cfg.gradient_checkpointing:
            self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs=cfg.gradient_checkpointing_kwargs or None)
            if isinstance(self.policy, PeftModel):
                self.policy.enable_input_require_grads()
        if cfg.torch_compile:
            self.notes.append("torch_compile: compiled models hold less than was counted here, and compiling takes host memory")

    def trainable(self) -> list[torch.Tensor]:
        """Parameters that get gradients."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def weight_bytes(self) -> int:
        """Of the policy: parameters, each once, and buffers."""
        return _bytes(self.policy) - self._saved_by_quantization()

    def reference_bytes(self) -> int:
        """Of a reference model, or of the frozen copy of a continued adapter; 0 where the policy is the reference."""
        if self.reference is None and self._live() and self.cfg.lora_model_dir is not None:
            return sum(parameter.numel() * parameter.element_size() for parameter in self.trainable())
        return 0 if self.reference is None else _bytes(self.reference)

    def _live(self) -> bool:
        return get_strategy(self.cfg.rl).reference_mode(self.cfg) == "live"

    def _live_reference(self) -> Any:
        if not self._live():
            return None
        if self.cfg.reference_model is not None:
            return self._base(load_config(self.cfg, "reference_model")).requires_grad_(False).eval()
        return None if self.cfg.adapter is not None else copy.deepcopy(self.policy).requires_grad_(False).eval()

    def _base(self, config: Any) -> PreTrainedModel:
        cfg = self.cfg
        kwargs = {"attn_implementation": cfg.attn_implementation} if cfg.attn_implementation else {}
        half = cfg.bf16 == "full" or cfg.load_in_4bit or cfg.load_in_8bit
        dtype = torch.bfloat16 if half else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=cfg.trust_remote_code, **kwargs)
        size = len(load_tokenizer(cfg))
        if size > model.get_input_embeddings().num_embeddings:
            multiple = 32 if cfg.resize_token_embeddings_to_32x else None
            model.resize_token_embeddings(size, pad_to_multiple_of=multiple, mean_resizing=False)
        if cfg.disable_dropout:
            disable_dropout_in_model(model)
        return model.train()

    def _adapted(self, model: PreTrainedModel) -> Any:
        cfg = self.cfg
        if cfg.adapter is None:
            return model
        if cfg.lora_model_dir is not None:
            adapter = PeftConfig.from_pretrained(cfg.lora_model_dir)
            adapter.inference_mode = False
        else:
            adapter = build_peft_config(cfg, model)
        # Some initialisations compute with the weights; shapes are the same with all of them.
        adapter.init_lora_weights = True
        policy = get_peft_model(model, adapter)
        if cfg.peft_autocast_adapter_dtype is False:
            match_adapter_dtype(policy)
        return policy

    def _saved_by_quantization(self) -> int:
        factor = next((bytes_ for name, bytes_ in QUANTIZED.items() if getattr(self.cfg, name)), None)
        if factor is None:
            return 0
        base = self.policy.get_base_model()
        linear = [layer for layer in base.modules() if isinstance(layer, torch.nn.Linear)]
        frozen = [
            layer.weight for layer in linear if not layer.weight.requires_grad and layer is not base.get_output_embeddings()
        ]
        self.notes.append("quantized weights are counted without their scales and without the buffers that unpack them")
        return int(sum(weight.numel() * (weight.element_size() - factor) for weight in frozen))


def _move(model: Any, mode: FakeTensorMode) -> None:
    """Take a model from the meta device, where nothing knows which kernels would run, to a CPU that `mode` feigns."""
    moved: dict[int, torch.Tensor] = {}  # tied weights stay one tensor

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in moved:
            with mode:
                twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            weight = isinstance(tensor, torch.nn.Parameter)
            moved[id(tensor)] = torch.nn.Parameter(twin, tensor.requires_grad) if weight else twin
        return moved[id(tensor)]

    for module in model.modules():
        for place in (module._parameters, module._buffers, module.__dict__):
            for name, value in list(place.items()):
                if isinstance(value, torch.Tensor):
                    place[name] = move(value)


def _bytes(model: Any) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
