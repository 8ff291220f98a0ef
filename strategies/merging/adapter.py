"""An adapter on a model without weights: what it changes, and PEFT's own sum for one module at a time."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import AutoModelForCausalLM

from strategies.locations import ADAPTER_CONFIG

__all__ = ["EmptyPolicy", "read_adapter_config"]

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER = "default"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules."""
SUBTRACTED = ("pissa", "olora")
"""Initialisations that take the adapter's first product out of the base, which PEFT does again from the base alone."""
HARMLESS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base as it is."""


def read_adapter_config(folder: Path) -> LoraConfig:
    """The config of the adapter in a folder.

    Raises:
        ValueError: where there is none, or one of a kind that can't be merged, which the message names.
    """
    if not any((folder / name).is_file() for name in ADAPTER_FILES):
        raise ValueError(f"{str(folder)!r} holds an adapter's config and no weights ({' or '.join(ADAPTER_FILES)})")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder / ADAPTER_CONFIG)!r} can't be read: {error}") from error
    if (kind := _unsupported(config)) is not None:
        raise ValueError(
            f"{str(folder)!r} holds {kind}, which can't be merged here; LoRA can, with rsLoRA, DoRA, whole modules "
            "(modules_to_save), single tokens and parameters, and with the initialisations pissa and olora"
        )
    return config


def _unsupported(config: PeftConfig) -> str | None:
    """What can't be merged about an adapter, in words."""
    if not isinstance(config, LoraConfig):
        return f"an adapter of the kind {getattr(config.peft_type, 'value', config.peft_type)}"
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    for name in [*variants, "layer_replication", "megatron_config"]:
        if name != "use_dora" and getattr(config, name, None):
            return f"LoRA with {name}"
    if config.init_lora_weights not in (*HARMLESS, *SUBTRACTED):
        return f"LoRA with init_lora_weights: {config.init_lora_weights}"
    return None


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a parameter of the base hangs."""

    module: nn.Module
    leaf: str

    def get(self) -> nn.Parameter:
        """The parameter."""
        return getattr(self.module, self.leaf)

    def put(self, parameter: nn.Parameter) -> None:
        """Hang another one there."""
        setattr(self.module, self.leaf, parameter)


class EmptyPolicy:
    """A base model whose parameters have shapes and no contents, and an adapter's weights on it.

    Args:
        config: the base model's.
        adapter: folder of the adapter.
        arguments: of `AutoModelForCausalLM.from_config`.

    Raises:
        ValueError: when the adapter doesn't fit the base, lacks weights, or brings unknown ones.
    """

    def __init__(self, config: Any, adapter: Path, **arguments: Any) -> None:
        lora = read_adapter_config(adapter)
        lora.inference_mode = True
        self._init, lora.init_lora_weights = lora.init_lora_weights, False
        weights = load_peft_weights(str(adapter), device="cpu")
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, **arguments)
        self.base, self.dtype = base, getattr(config, "dtype", None)
        self._tokens = _chosen_tokens(lora)
        first_new = base.get_input_embeddings().num_embeddings
        self.grown_to = _grow(base, weights)
        self.vocabulary = base.get_input_embeddings().num_embeddings
        self._tokens |= set(range(first_new, self.vocabulary))
        self.slots = _slots(base)
        self.parameters = sum(parameter.numel() for parameter in base.parameters())
        self.tied = _tied(self.slots)
        """Names of parameters that are one: each of them -> all of them."""
        try:
            self._peft = get_peft_model(base, lora, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"the adapter in {str(adapter)!r} doesn't fit the base model: {error}") from error
        for module in self._peft.modules():
            _hollow_out(module)
        self._load(weights, adapter)
        self.wrappers = self._outermost()
        self._check(adapter)

    def own_tokens(self) -> list[int]:
        """Tokens that the adapter has embeddings for: new ones, and those that were trained singly."""
        return sorted(self._tokens)

    def replaced(self, name: str) -> torch.Tensor | None:
        """What the adapter's folder holds in place of a parameter of the base, such as embeddings that have grown."""
        names = [name, *self.tied.get(name, ())]
        return next((value.data for each in names if not _is_hollow(value := self.slots[each].get())), None)

    def changed(self) -> dict[str, str]:
        """Name of every parameter that a module of the adapter changes -> path of the module that it is in."""
        return {name: path for path, wrapper in self.wrappers.items() for name in self._changed_by(path, wrapper)}

    def merge(self, path: str, base_value: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Merge one module, once; returns its changed parameters in float32, by their names.

        Args:
            path: of the module, one of `wrappers`.
            base_value: gives a parameter of the base, in float32.

        Raises:
            ValueError: when the sum isn't finite.
        """
        wrapper = self.wrappers[path]
        before: dict[str, nn.Parameter] = {}
        if not isinstance(wrapper, ModulesToSaveWrapper):  # which brings its parameters whole
            before = {name: slot.get() for name, slot in self.slots.items() if name.startswith(f"{path}.")}
            for name in before:
                self.slots[name].put(nn.Parameter(base_value(name), requires_grad=False))
        wrapper.float()
        if isinstance(wrapper, LoraLayer):
            _subtract_initial(wrapper, self._init)
        try:
            merged = _merge(wrapper)
        except ValueError as error:
            raise ValueError(f"{path} has no finite sum with its adapter: {error}") from error
        result = {name: merged.get_parameter(name.removeprefix(f"{path}.")).data for name in self._changed_by(path, wrapper)}
        for name, parameter in before.items():
            self.slots[name].put(parameter)
        return result

    def _load(self, weights: dict[str, torch.Tensor], adapter: Path) -> None:
        try:
            report = set_peft_model_state_dict(self._peft, weights, low_cpu_mem_usage=True)
        except KeyError as error:
            raise ValueError(f"the adapter in {str(adapter)!r} lacks weights, such as {error.args[0]}") from error
        except RuntimeError as error:  # torch's words for shapes that don't fit, one line each
            if "size mismatch" not in str(error):
                raise
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(
                f"the adapter in {str(adapter)!r} was trained on another model than its base model is now: {reason}"
            ) from error
        # PEFT writes some weights twice, under a name of its own wrappers too, and skips those names when it loads.
        wrapped = tuple(
            f"{PREFIX}{path}." for path, each in self._outermost().items() if isinstance(each, AuxiliaryTrainingWrapper)
        )
        if unknown := [name for name in report.unexpected_keys if not name.startswith(wrapped)]:
            raise ValueError(
                f"the adapter in {str(adapter)!r} has {len(unknown)} weights that its base model has no place for, such as "
                f"{unknown[0]}: it was trained on another model"
            )

    def _outermost(self) -> dict[str, nn.Module]:
        """Path of every module that PEFT has put in the place of one of the base's."""
        found: dict[str, nn.Module] = {}
        for path, module in self._peft.get_base_model().named_modules():
            inner = any(path.startswith(f"{outer}.") for outer in found)
            if not inner and isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                found[path] = module
        return found

    def _check(self, adapter: Path) -> None:
        """Refuse an adapter of which a part is missing, or that can't be merged for what its base is."""
        ours = {id(slot.module) for slot in self.slots.values()}
        for path, wrapper in self.wrappers.items():
            for inner, module in wrapper.named_modules():
                own = module.named_parameters(recurse=False)
                if id(module) not in ours and (missing := [leaf for leaf, value in own if _is_hollow(value)]):
                    name = ".".join(filter(None, (path, inner, missing[0]))).replace(f".{ADAPTER}", "")
                    raise ValueError(f"the adapter in {str(adapter)!r} lacks weights, such as {name}")
            if isinstance(wrapper, LoraLayer) and wrapper.lora_bias.get(ADAPTER) and f"{path}.bias" not in self.slots:
                raise ValueError(f"the adapter in {str(adapter)!r} has a bias for {path}, which has none to add it to")

    def _changed_by(self, path: str, wrapper: nn.Module) -> list[str]:
        if isinstance(wrapper, ModulesToSaveWrapper):
            return [name for name in self.slots if name.startswith(f"{path}.")]
        leaves = ["weight"]
        if isinstance(wrapper, ParamWrapper):
            leaves, layer = [], wrapper
            while isinstance(layer, ParamWrapper):
                leaves.append(layer.parameter_name)
                layer = layer.base_layer
        elif isinstance(wrapper, LoraLayer) and wrapper.lora_bias.get(ADAPTER):
            leaves.append("bias")
        return [f"{path}.{leaf}" for leaf in leaves]


def _merge(wrapper: Any) -> nn.Module:
    """PEFT's own sum: the base's module with the adapter in it."""
    if hasattr(wrapper, "unload_and_optionally_merge_module"):
        return wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    wrapper.merge(safe_merge=True)
    return wrapper.get_base_layer()


def _subtract_initial(layer: Any, init: Any) -> None:
    """Take out of the base what the adapter began with, as PEFT does whenever it loads such an adapter."""
    if init not in SUBTRACTED:
        return
    trained = copy.deepcopy(layer.lora_A[ADAPTER]), copy.deepcopy(layer.lora_B[ADAPTER])
    if init == "pissa":
        layer.pissa_init(ADAPTER, init)
    else:
        layer.olora_init(ADAPTER)
    layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = trained


def _grow(base: Any, weights: dict[str, torch.Tensor]) -> int | None:
    """Give the empty model as many tokens as the adapter's folder has embeddings for; returns the number where it grew."""
    modules = {module: path for path, module in base.named_modules()}
    for module in filter(None, (base.get_input_embeddings(), base.get_output_embeddings())):
        path = f"{PREFIX}{modules.get(module)}"
        for name in ("weight", "base_layer.weight", "token_adapter.base_layer.weight"):
            stored = weights.get(f"{path}.{name}")
            if stored is not None and stored.shape[0] > module.weight.shape[0]:
                base.resize_token_embeddings(stored.shape[0], mean_resizing=False)
                return stored.shape[0]
    return None


def _chosen_tokens(lora: LoraConfig) -> set[int]:
    chosen = lora.trainable_token_indices or []
    return set().union(*chosen.values()) if isinstance(chosen, dict) else set(chosen)


def _slots(base: nn.Module) -> dict[str, Slot]:
    return {
        f"{path}.{leaf}" if path else leaf: Slot(module, leaf)
        for path, module in base.named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
    }


def _tied(slots: dict[str, Slot]) -> dict[str, list[str]]:
    names: dict[int, list[str]] = {}
    for name, slot in slots.items():
        names.setdefault(id(slot.get()), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _hollow_out(module: nn.Module) -> None:
    """Give what a module has on the meta device CPU tensors that take no memory: PEFT moves an adapter's weights to its base's
    device, and would lose them on meta."""
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            hollow: Any = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
            hollow.is_hollow = True
            module.register_parameter(leaf, hollow)
    for leaf, buffer in list(module.named_buffers(recurse=False)):
        if buffer.is_meta:
            setattr(module, leaf, torch.zeros((), dtype=buffer.dtype).expand(buffer.shape))


def _is_hollow(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "is_hollow", False)
