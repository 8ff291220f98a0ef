"""Keys of parameter-efficient fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from strategies.keys import Keys, key

__all__ = ["AdapterKeys"]


class AdapterKeys(Keys):
    """LoRA and its variants, by Axolotl's names; everything here needs `adapter`."""

    adapter: Literal["lora", "qlora"] | None = key("Train an adapter instead of the whole model.")
    lora_model_dir: str | None = key("Folder, URI or hub id of an adapter to continue; its frozen copy is the reference.")
    lora_r: int | None = key("Rank of the adapter matrices; 8 when not set.", ge=1)
    lora_alpha: int | None = key("Scale of the adapter (divided by the rank); 16 when not set.", ge=1)
    lora_dropout: float | None = key("Dropout before the adapter; 0 when not set.", ge=0, lt=1)
    lora_target_modules: str | list[str] | None = key("Names, or one regular expression, of the modules to adapt.")
    lora_target_linear: bool | None = key("Adapt every linear layer but the output head (also the default).")
    lora_target_parameters: str | list[str] | None = key("Names of bare parameters to adapt (mixture of experts).")
    lora_modules_to_save: list[str] | None = key("Modules trained in full and saved with the adapter.")
    lora_rank_pattern: dict[str, PositiveInt] | None = key("Rank per module name or regular expression.")
    lora_alpha_pattern: dict[str, PositiveInt] | None = key("Alpha per module name or regular expression.")
    lora_fan_in_fan_out: bool | None = key("The base layer stores its weight as (in, out), as GPT-2 does.")
    peft_layers_to_transform: list[int] | None = key("Indices of the layers to adapt.")
    peft_layers_pattern: list[str] | None = key("Name of the list of layers, for peft_layers_to_transform.")
    peft_use_dora: bool | None = key("Weight-decomposed adapter (DoRA).")
    peft_use_rslora: bool | None = key("Scale by alpha / sqrt(rank) (rsLoRA).")
    peft_layer_replication: list[tuple[int, int]] | None = key("Ranges of layers to stack again, sharing weights.")
    peft_init_lora_weights: bool | str | None = key("Initialisation of the adapter: true, gaussian, olora, pissa, ...")
    peft_trainable_token_indices: list[int] | dict[str, list[int]] | None = key("Embedding rows to train.")
    peft_ensure_weight_tying: bool | None = key("Keep tied weights tied where the adapter touches one of them.")
    peft_autocast_adapter_dtype: bool | None = key("Keep adapter weights in float32 beside a half-precision base.")
