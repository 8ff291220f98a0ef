"""An adapter on its base model, and the model that PEFT makes of both."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from transformers.trainer_utils import align_special_tokens

from strategies.merging.base import float_tensors, load_base
from strategies.models.config import load_config
from strategies.models.location import ADAPTER_CONFIG

__all__ = ["Merged", "Policy", "read_adapter_config"]

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules."""
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "pissa", "olora")
"""Those that leave the base as it is, or take out of it what follows from the base alone, so that PEFT can do it again."""


def read_adapter_config(folder: Path) -> LoraConfig:
    """Read the config of the adapter in a folder.

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
    if not isinstance(config, LoraConfig):
        return f"an adapter of the kind {getattr(config.peft_type, 'value', config.peft_type)}"
    # PEFT marks the fields of LoRA's variants, so that those of later versions are refused too.
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    for name in [*variants, "layer_replication", "megatron_config"]:
        if name != "use_dora" and getattr(config, name, None):
            return f"LoRA with {name}"
    if config.init_lora_weights not in INITIALISATIONS:
        return f"LoRA with init_lora_weights: {config.init_lora_weights}"
    return None


@dataclasses.dataclass(frozen=True)
class Merged:
    """A base model with an adapter in it, each tensor in the dtype that it is written in."""

    model: Any
    tensors: int
    changed: int
    """Tensors that the adapter has changed."""
    nbytes: int
    dtype: torch.dtype
    """Of the tensors, or of most of their bytes."""
    config_dtype: torch.dtype
    """What the model's config says of them."""
    rounded: dict[str, torch.dtype]
    """Names of the tensors whose values had to be rounded, and to what."""
    is_untied: bool
    """Whether embedding and head were one in the base, and the adapter has changed them differently."""

    def save(self, folder: Path, tokenizer: Any, shard_size: int | str, processor: Any = None) -> None:
        """Write weights, config, generation config and tokenizer, special tokens the same in all three, as training sets them.

        Args:
            processor: of a model that takes pictures; written with its tokenizer.
            shard_size: of a file at most, in bytes or as "5GB".

        Raises:
            OSError: when the disk fails, or is full.
        """
        align_special_tokens(self.model, tokenizer)
        try:
            self.model.save_pretrained(folder, max_shard_size=shard_size)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        self.model.config.dtype = self.config_dtype  # transformers writes the first tensor's
        self.model.config.save_pretrained(folder)
        (processor if processor is not None else tokenizer).save_pretrained(folder)


class Policy:
    """The base model that `cfg` names, in float32, with the adapter of a folder on it.

    Raises:
        ValueError: when the base can't be loaded, the adapter doesn't fit it, lacks weights, or brings unknown ones.
    """

    def __init__(self, cfg: Any, adapter: Path) -> None:
        self._adapter = str(adapter)
        lora = read_adapter_config(adapter)
        weights = load_peft_weights(self._adapter, device="cpu")
        base, self._stored = load_base(cfg)
        self._config_dtype = getattr(load_config(cfg), "dtype", None)
        # Before the embeddings grow, so that grown ones count as changed.
        self._before = {name: _fingerprint(tensor) for name, tensor in float_tensors(base)}
        self._tied = _tied(base)
        first_new = base.get_input_embeddings().num_embeddings
        _grow(base, weights)
        chosen = lora.trainable_token_indices or []
        singly = set().union(*chosen.values()) if isinstance(chosen, dict) else set(chosen)
        self.own_tokens = sorted(singly | set(range(first_new, base.get_input_embeddings().num_embeddings)))
        """Tokens that the adapter has embeddings for: new ones, and those that were trained singly."""
        self._sizes = {name: tensor.numel() for name, tensor in _once(base)}
        self.model = self._attach(base, lora, weights)

    def nbytes(self, dtype: torch.dtype | None) -> int:
        """Return the size that the merged model will have, less that of a head which the adapter unties."""
        return sum(number * (dtype or self._stored[name]).itemsize for name, number in self._sizes.items())

    def merge(self, dtype: torch.dtype | None = None) -> Merged:
        """Merge base and adapter, which takes their place in memory: in float32, each sum rounded once.

        Args:
            dtype: of all floating-point tensors; that of each of the base's when None.

        Raises:
            ValueError: when PEFT can't merge them, or a sum is no number, in float32 or in its dtype.
        """
        base: Any = self.model.get_base_model()
        ties = getattr(base.config, "tie_word_embeddings", False)
        _untie(base)
        try:
            model: Any = self.model.merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"the adapter in {self._adapter!r} can't be merged: {error}") from error
        is_untied = not _tie_again(model, self._tied)
        # PEFT has set it to False, since the two were apart when it merged (`_unload_and_optionally_merge`).
        model.config.tie_word_embeddings = ties and not is_untied
        if is_untied:
            model.config.get_text_config().tie_word_embeddings = False
        changed, rounded, sizes = 0, {}, Counter[torch.dtype]()
        for name, tensor in _once(model):
            wanted = dtype or self._stored[name]
            is_changed = _fingerprint(tensor) != self._before[name]
            # The data alone, so that tied parameters stay one.
            tensor.data = tensor.data.to(wanted)
            # Not of the base's own tensors: infinities belong to some, such as masks.
            if is_changed and not torch.isfinite(tensor).all():
                shown = str(wanted).removeprefix("torch.")
                raise ValueError(f"{name} has values that {shown} can't hold; merge it into another dtype, such as float32")
            # Unchanged values are rounded where the dtype doesn't hold all of theirs, as bfloat16 of float16.
            if is_changed or torch.promote_types(self._stored[name], wanted) != wanted:
                rounded[name] = wanted
            changed += is_changed
            sizes[wanted] += tensor.nbytes
        main = sizes.most_common(1)[0][0]
        in_config = dtype or self._config_dtype or main
        return Merged(model, len(_once(model)), changed, sizes.total(), main, in_config, rounded, is_untied)

    def _attach(self, base: Any, lora: LoraConfig, weights: dict[str, torch.Tensor]) -> PeftModel:
        lora.inference_mode = True
        try:
            # Not `PeftModel.from_pretrained`, which only warns of missing weights.
            policy = get_peft_model(base, lora)
            report = set_peft_model_state_dict(policy, weights)
        except KeyError as error:
            raise ValueError(f"the adapter in {self._adapter!r} lacks weights, such as {error.args[0]}") from error
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"the adapter in {self._adapter!r} doesn't fit the base model: {error}") from error
        except RuntimeError as error:  # torch's words for shapes that don't fit, one line each
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(
                f"the adapter in {self._adapter!r} was trained on another model than its base model is now: {reason}"
            ) from error
        # All of the base's weights are missing as well, as they should be.
        if missing := [name for name in report.missing_keys if "lora_" in name]:
            name = missing[0].removeprefix(PREFIX).replace(".default", "")
            raise ValueError(f"the adapter in {self._adapter!r} lacks weights, such as {name}")
        # PEFT writes some weights twice, under a name of its own wrappers too, and skips those names when it loads.
        wrapped = tuple(f"{path}." for path, each in policy.named_modules() if isinstance(each, AuxiliaryTrainingWrapper))
        if unknown := [name for name in report.unexpected_keys if not name.startswith(wrapped)]:
            raise ValueError(
                f"the adapter in {self._adapter!r} has {len(unknown)} weights that its base model has no place for, such as "
                f"{unknown[0]}: it was trained on another model"
            )
        return policy.eval()


def _grow(base: Any, weights: dict[str, torch.Tensor]) -> None:
    """Give the base as many tokens as the adapter's folder has embeddings for. Raises ValueError where only one part has."""
    paths = {module: path for path, module in base.named_modules()}
    parts = {f"{paths[part]}.weight": part for part in (base.get_input_embeddings(), base.get_output_embeddings()) if part}
    found: dict[str, int] = {}
    # PEFT's names of embeddings that are stored whole, targeted by LoRA, and trained in single tokens.
    for name, leaf in product(parts, ("weight", "base_layer.weight", "token_adapter.base_layer.weight")):
        if (stored := weights.get(f"{PREFIX}{name.removesuffix('weight')}{leaf}")) is not None:
            found[name] = len(stored)
    tokens, before = max(found.values(), default=0), base.get_input_embeddings().num_embeddings
    if tokens <= before:
        return
    # By identity: where embedding and head are tied, one stored tensor is enough for both.
    known = [parts[name].weight for name in found]
    if lacking := [name for name, part in parts.items() if not any(part.weight is weight for weight in known)]:
        raise ValueError(
            f"the adapter has embeddings for {tokens} tokens, and none for {lacking[0]}, which the base model has for "
            f"{before}; save it with save_embedding_layers=True"
        )
    base.resize_token_embeddings(tokens, mean_resizing=False)


def _tied(model: Any) -> list[list[str]]:
    """Groups of names of parameters that are one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _untie(model: torch.nn.Module) -> None:
    """Give each module parameters of its own: PEFT would add to all what an adapter does to one of them."""
    known: set[int] = set()
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in known:
                setattr(module, leaf, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
            known.add(id(parameter))


def _tie_again(model: Any, groups: list[list[str]]) -> bool:
    """Make parameters one again that are still equal; returns whether all are."""
    is_tied = True
    for first, *others in groups:
        parameter = model.get_parameter(first)
        if all(torch.equal(parameter, model.get_parameter(name)) for name in others):
            for path, _, leaf in (name.rpartition(".") for name in others):
                setattr(model.get_submodule(path), leaf, parameter)
        else:
            is_tied = False
    return is_tied


def _once(model: Any) -> list[tuple[str, torch.Tensor]]:
    """The floating-point tensors that are written, by the first of their names."""
    # Reversed twice: the first of several names stays, in the model's order.
    first = {id(tensor): (name, tensor) for name, tensor in reversed(float_tensors(model))}
    return list(reversed(first.values()))


def _fingerprint(tensor: torch.Tensor) -> tuple[torch.Size, int]:
    # An XOR of all values: a copy of the base to compare with would double the memory.
    return tensor.shape, int(torch.hash_tensor(tensor.detach()).view(torch.int64))
